"""`python -m tests.attack`: see `--help`."""

from tests.attack.runner import main

if __name__ == "__main__":
    raise SystemExit(main())
