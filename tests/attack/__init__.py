"""The generated attack: random programs on the library, against native PyTorch under bounds.

A case is a function of a surface and a seed, and nothing else: `python -m tests.attack --surface frozen --seed 7` plays
one again. `cases.py` says what a case is, `drawn.py` and `nets.py` what is drawn, `oracle.py` what a result must be;
every surface has a file of its own, and `surfaces.py` lists them. Programs for `fastmlp.capture` are drawn as source
text, which `--seed 7 --show` prints: `captured.py` judges them, `scripts.py` says how they are drawn.
"""
