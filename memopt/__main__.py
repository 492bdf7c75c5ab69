"""`python -m memopt`: the command line."""

from __future__ import annotations

from memopt.cli import main

if __name__ == "__main__":
    main(prog_name="memopt")
