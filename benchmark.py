"""Measure images per second, stage by stage: `python benchmark.py`. The code is in solov2/commands/benchmark.py."""

from __future__ import annotations

import sys

from solov2.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
