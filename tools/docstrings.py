"""What griffe, which reads the docstrings for the documentation, has to know of this project's.

They have a section "Example:". griffe shows a section "Examples:" as a session of Python, and takes the other one for a
remark. And a shape such as (*, in_features) is to be shown with its star, which in Markdown begins emphasis.
"""

from typing import Any

import griffe


class AsWritten(griffe.Extension):
    """Has docstrings shown as they are meant."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class and function."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = text.replace("(*,", r"(\*,").replace("(*)", r"(\*)")
