"""`python -m solov2 COMMAND ...`, the same as `solov2 COMMAND ...`."""

from __future__ import annotations

import sys

from solov2.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
