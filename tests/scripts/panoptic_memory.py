"""Measure time and memory of merging 100 instances and 53 classes of stuff.

    python tests/scripts/panoptic_memory.py --original 3000 4000

Smooth regions at 800 x 1216; extra memory is the peak resident size minus the size before. Linux only.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from solov2.ops.label_map import label_map  # noqa: E402
from solov2.ops.merge import merge_segments  # noqa: E402
from solov2.ops.resample import MaskResampler  # noqa: E402


def main() -> int:
    """Print the milliseconds of both steps and the extra memory in MB (10^6 bytes)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--original", nargs=2, type=int, default=(480, 640), metavar=("H", "W"))
    size, original = (800, 1216), tuple(parser.parse_args().original)
    features = (size[0] // 4, size[1] // 4)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 154, 8, 12, generator=generator)
    smooth = F.interpolate(coarse, features, mode="bicubic")[0]
    y, x = (torch.rand(100, 1, 1, generator=generator) * side for side in features)
    near = (torch.arange(features[0])[:, None] - y).abs().maximum((torch.arange(features[1]) - x).abs()) < 40
    resampler = MaskResampler(features, size, original, 0.5, dtype=torch.float32, device=torch.device("cpu"))
    rles, boxes = resampler.to_rles((smooth[54:] * 4).sigmoid() * near)
    instances = {"scores": torch.linspace(1, 0.3, 100), "labels": torch.zeros(100).long(), "masks": rles}
    limits = {"score_threshold": 0.3, "overlap_threshold": 0.5, "stuff_area_limit": 4096}
    merge_segments(instances, label_map(smooth[:54, :8, :8], (32, 32), original), 53, **limits)  # warm up
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = resident("VmRSS"), time.perf_counter()
    semantic = label_map(4 * smooth[:54], size, original)
    middle = time.perf_counter()
    result = merge_segments({**instances, "boxes": boxes}, semantic, 53, **limits)
    stop, extra = time.perf_counter(), resident("VmHWM") - before
    print(
        f"{original[0]} x {original[1]}: labels {1e3 * (middle - start):.0f} ms, merge {1e3 * (stop - middle):.0f} ms, "
        f"{len(result['segments'])} segments, {extra / 1e6:.0f} MB extra"
    )
    return 0


def resident(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
