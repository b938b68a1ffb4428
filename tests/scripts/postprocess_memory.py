"""Measure the memory that post-processing needs when every cell and class is a candidate.

    python tests/scripts/postprocess_memory.py [--size 800 1216] [--original 480 640] [--format bool]

3,872 cells x 80 classes, all above the category threshold. Extra memory is the peak resident size of the process minus
the size before the call, when the raw outputs already exist; it includes the result. Linux only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from solov2.models.postprocess import postprocess  # noqa: E402
from solov2.settings import PostprocessSettings  # noqa: E402

GRIDS = (40, 36, 24, 16, 12)


def main() -> int:
    """Print the extra memory in MB (10^6 bytes), and the memory that the masks of all candidates would need."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--original", nargs=2, type=int, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--channels", type=int, default=256, help="of mask features and kernels")
    parser.add_argument("--format", choices=("bool", "rle"), default="bool")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    height, width = (side // 4 for side in args.size)
    raw = {
        "category_logits": [torch.full((1, 80, side, side), 3.0) for side in GRIDS],
        "kernels": [torch.randn(1, args.channels, side, side, generator=generator) for side in GRIDS],
        "mask_features": torch.randn(1, args.channels, height, width, generator=generator),
    }
    warm_up()
    before = resident("VmRSS")
    (result,) = postprocess(raw, [args.size], [args.original], PostprocessSettings(), mask_format=args.format)
    extra = resident("VmHWM") - before
    candidates = 80 * sum(side**2 for side in GRIDS)
    print(
        f"{extra / 1e6:.0f} MB extra for {len(result['scores'])} instances at {args.original[0]} x {args.original[1]}; "
        f"a mask per cell and class would take {candidates * height * width / 1e6:,.0f} MB"
    )
    return 0


def resident(name: str) -> int:
    """A value of /proc/self/status in bytes; getrusage would include the peak of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def warm_up() -> None:
    """Make a tiny call first, so that libraries loaded on first use are not measured."""
    raw = {
        "category_logits": [torch.full((1, 1, 2, 2), 3.0) for _ in GRIDS],
        "kernels": [torch.ones(1, 1, 2, 2) for _ in GRIDS],
        "mask_features": torch.ones(1, 1, 16, 16),
    }
    postprocess(raw, [(64, 64)], [(64, 64)], PostprocessSettings())


if __name__ == "__main__":
    sys.exit(main())
