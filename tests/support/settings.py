"""Numbers, tensors and functions that captured functions of the tests read from an imported module."""

import torch

scale = 2.0
squared = False
weight = torch.ones(4)
function = torch.tanh


class Rates:
    """As programs keep their settings."""

    beta = 1.0
