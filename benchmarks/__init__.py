"""What fastmlp's speed is measured on: `pytest benchmarks/`, or `python -m benchmarks.compare` for ratios."""
