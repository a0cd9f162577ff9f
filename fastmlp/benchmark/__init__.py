"""What `fastmlp.bench` and `python -m fastmlp bench` measure with, and the repository's benchmarks too.

contest.py has the contenders for a model and compares their results before they are timed, timing.py takes their times
in turn, machine.py says on what, report.py prints, writes and draws, peers.py has the other libraries, and standard.py
the standard networks beside PyTorch's own modules. Nothing of it is imported by `import fastmlp`.
"""
