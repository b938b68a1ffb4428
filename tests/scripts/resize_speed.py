"""Time the resize of one image, in one thread: torchvision's (other values), OpenCV's if installed, and our own form.

    python tests/scripts/resize_speed.py [--size 480 640] [--to 800 1067] [--rounds 100]

Prints JSON: the least milliseconds of all rounds for each, which take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from solov2.ops import resize  # noqa: E402


def main() -> int:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--to", type=int, nargs=2, default=(800, 1067), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    image = torch.randint(256, (*args.size, 3), dtype=torch.uint8).permute(2, 0, 1)  # interleaved, as from a file
    forms = {
        "torchvision": lambda: TF.resize(image, list(args.to), antialias=False),
        "own": lambda: resize._resize_on_host(image, tuple(args.to)),
    }
    if resize._opencv_resize() is not None:
        forms["OpenCV"] = lambda: resize.resize_image(image, tuple(args.to))
    least = dict.fromkeys(forms, float("inf"))
    for _ in range(args.rounds):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            least[name] = min(least[name], time.perf_counter() - started)
    print(json.dumps({name: round(1000 * seconds, 2) for name, seconds in least.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
