"""Predict a photograph of 4000 x 6000 pixels whole and in tiles, and compare which of its objects are found.

    python tests/scripts/large_photo.py WEIGHTS SHAPES [--seed 0] [--tile 2000]

WEIGHTS is best.pth of a quickstart run, SHAPES the folder of its data. The photograph is made of several: objects of
the validation images, 700 to 1200 pixels large, on one of them, blurred. An object counts as found whole with an IoU
above 0.6.
"""

from __future__ import annotations

import argparse
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

import solov2
from solov2.data.coco import CocoInstances
from solov2.ops.masks import encode_rle
from solov2.ops.rle import ious
from solov2.tiles import predict_tiles

HEIGHT, WIDTH = 4000, 6000
SIDES = 700, 1200  # pixels of the longer side of an object
TRIES = 60  # places for an object
FOUND = 0.6  # IoU


def photograph(shapes: CocoInstances, seed: int) -> tuple[Image.Image, list[tuple[int, dict[str, Any]]]]:
    """The photograph, and (label, RLE) of each object in it."""
    chooser, truth, taken = random.Random(seed), [], list[tuple[int, int, int, int]]()
    blurred = Image.fromarray(shapes.image(0).permute(1, 2, 0).contiguous().numpy()).filter(
        ImageFilter.GaussianBlur(40)
    )
    picture = blurred.resize((WIDTH, HEIGHT))
    for position in chooser.sample(range(len(shapes)), min(40, len(shapes))):
        sample = shapes[position]
        number = chooser.randrange(len(sample["labels"]))
        left, top, right, bottom = sample["boxes"][number].int().tolist()
        factor = chooser.uniform(*SIDES) / max(right - left, bottom - top)
        width, height = int((right - left) * factor), int((bottom - top) * factor)
        pixels = sample["image"][:, top:bottom, left:right].permute(1, 2, 0).contiguous().numpy()
        plane = sample["masks"][number, top:bottom, left:right].numpy() * 255
        mask = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC).point(lambda v: 255 * (v > 127))
        for _ in range(TRIES):
            x, y = chooser.randrange(WIDTH - width), chooser.randrange(HEIGHT - height)
            if all(x + width < a or c < x or y + height < b or d < y for a, b, c, d in taken):
                picture.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), (x, y), mask)
                taken.append((x - 60, y - 60, x + width + 60, y + height + 60))
                full = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
                full[0, y : y + height, x : x + width] = torch.from_numpy(np.asarray(mask) > 0)
                truth.append((int(sample["labels"][number]), encode_rle(full)[0]))
                break
    return picture, truth


def best_ious(truth: list[tuple[int, dict[str, Any]]], found: dict[str, Any]) -> np.ndarray:
    """The highest IoU of each object with an instance of its class: float64 [N]."""
    same = np.array([[label == own for own in found["labels"].tolist()] for label, _ in truth])
    return (ious([rle for _, rle in truth], found["masks"]) * same).max(axis=1, initial=0)


def main() -> None:
    """Print how many objects are found whole, and the lowest IoU in tiles of those that are found without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("shapes", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tile", type=int, default=2000)
    args = parser.parse_args()
    file, images = args.shapes / "annotations/instances_val2017.json", args.shapes / "val2017"
    picture, truth = photograph(CocoInstances(file, images, training=True), args.seed)
    model = solov2.load(args.weights)
    tiled = best_ious(truth, predict_tiles(model, picture, args.tile, score_threshold=0.3))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    whole = best_ious(truth, model.predict(picture, score_threshold=0.3, mask_format="rle")[0])
    kept = tiled[whole > FOUND]
    print(f"{len(truth)} objects: {len(kept)} found whole, {(tiled > FOUND).sum()} in tiles of {args.tile};")
    print(f"those {len(kept)} in tiles with an IoU of at least {kept.min(initial=1):.2f}; {peak:.0f} MiB with tiles")


if __name__ == "__main__":
    main()
