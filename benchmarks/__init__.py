"""How fast fastmlp is, and beside whom.

`python -m benchmarks.report` says all there is to say, targets met and missed. `python -m
benchmarks.compare` compares contenders on chosen workloads, `python -m benchmarks.random_shapes` on
random ones, `python -m benchmarks.account` takes training steps apart, and `pytest benchmarks/` times each
contender by itself.
"""
