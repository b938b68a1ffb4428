"""Evaluate a model on COCO: `python eval.py CONFIG --weights FILE`. The code is in solov2/commands/evaluate.py."""

from __future__ import annotations

import sys

from solov2.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
