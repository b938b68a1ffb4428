"""Measure the speedup of `torch.compile` in the forward pass, and its compile time.

    python tests/scripts/compile_gain.py [--model solov2_light_r50_fpn_3x] [--size 448 768] [--precision float32]

Random weights, one image; the variants are timed in turn, and the median of --rounds rounds is reported. "plain" is
`model(images)`, "optimized" is `model.optimize()`, each with and without compilation. Compile time is the time of the
first call with a cold cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from solov2.build import build_model  # noqa: E402
from solov2.compute import select_device  # noqa: E402
from solov2.models.solov2 import SOLOv2  # noqa: E402


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="solov2_light_r50_fpn_3x")
    parser.add_argument("--size", nargs=2, type=int, default=(448, 768), metavar=("H", "W"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    args = parser.parse_args()
    device = select_device(args.device)
    model = build_model(args.model, device=device)
    compiled = build_model(args.model, device=device)
    compiled.compile(fullgraph=True, dynamic=False)
    forms = {
        "plain": model,
        "plain, compiled": compiled,
        "optimized": model.optimize(precision=args.precision),
        "optimized, compiled": model.optimize(precision=args.precision, compile=True),
    }
    images = torch.randn(1, 3, *args.size, device=device)
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        first = {name: seconds(form, images) for name, form in forms.items()}
        times = {name: [] for name in forms}
        for _ in range(args.rounds):
            for name, form in forms.items():
                times[name].append(seconds(form, images))
    plain = statistics.median(times["plain"])
    print(f"{args.model} {args.size[0]} x {args.size[1]}, {args.precision}, {device}, torch {torch.__version__}")
    print(f"{'forward':<22}{'ms':>8}{'gain':>8}{'first call, s':>16}")
    for name in forms:
        median = statistics.median(times[name])
        print(f"{name:<22}{1000 * median:>8.0f}{plain / median:>7.2f}x{first[name]:>16.1f}")
    return 0


def seconds(model: SOLOv2, images: torch.Tensor) -> float:
    """Seconds of one forward pass."""
    start = time.perf_counter()
    model(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
