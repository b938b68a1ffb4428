"""Train a model: `python train.py configs/solov2_r50_fpn_1x.yaml`. The code is in solov2/commands/train.py."""

from __future__ import annotations

import sys

from solov2.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
