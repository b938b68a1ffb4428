"""Fine-tune on a small set with the proposed settings and without: mask AP50 of both, by seed.

    python tests/scripts/proposal_gain.py COCO_PHOTOS WEIGHTS FOLDER [--classes person,car,cup] [--seeds 0 1 2]

COCO_PHOTOS has annotations/, train2017/ and val2017/; WEIGHTS is best.pth of a quickstart run. The set is cut from the
photographs: a square of twice its longer side around each large enough instance of the classes; what is small in it
does not count.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from PIL import Image
from pycocotools import mask as mask_api

import solov2
from solov2.config import load_config
from solov2.data.coco import CocoInstances
from solov2.formats.annotated import AnnotatedImage, AnnotatedInstance, Losses, Reading, to_coco
from solov2.ops.masks import encode_rle

MIN_SIDE = 96  # pixels of an instance that gets a cutting
MIN_SHARE = 1 / 6  # of the side of a cutting: instances below it become crowds, which do not count
MIN_VISIBLE = 0.5  # share of an instance that must be inside a cutting to count there


def cut(photos: CocoInstances, folder: Path) -> Reading:
    """Write the cuttings of a split; returns what is on them."""
    folder.mkdir(parents=True, exist_ok=True)
    reading = Reading(folder, folder, photos.class_names, [], Losses())
    for position in range(len(photos)):
        sample = photos[position]
        image, masks, boxes = sample["image"], sample["masks"], sample["boxes"]
        height, width = image.shape[1:]
        for number, (left, top, right, bottom) in enumerate(boxes.round().int().tolist()):
            side = max(right - left, bottom - top)
            if side < MIN_SIDE:
                continue
            x, y = max(0, (left + right) // 2 - side), max(0, (top + bottom) // 2 - side)
            rows, columns = slice(y, min(height, y + 2 * side)), slice(x, min(width, x + 2 * side))
            part, inside = image[:, rows, columns], masks[:, rows, columns]
            name = f"{sample['image_id']}_{number}.jpg"
            Image.fromarray(part.permute(1, 2, 0).contiguous().numpy()).save(folder / name, quality=95)
            entry = AnnotatedImage(name, part.shape[1], part.shape[2])
            for label, before, after in zip(sample["labels"].tolist(), masks, inside, strict=True):
                if after.any() and after.sum() >= MIN_VISIBLE * before.sum():
                    rle = encode_rle(after[None].bool())[0]
                    small = max(mask_api.toBbox(rle)[2:]) < MIN_SHARE * max(entry.height, entry.width)
                    entry.instances.append(AnnotatedInstance(photos.class_names[label], rle, is_crowd=bool(small)))
            reading.images.append(entry)
    return reading


def make_data(photos: Path, folder: Path, classes: list[str]) -> None:
    """COCO files of the cuttings in a layout that `solov2 train --data` finds."""
    for split, name in (("train2017", "train"), ("val2017", "val")):
        source = CocoInstances(
            photos / f"annotations/instances_{split}.json", photos / split, training=True, classes=classes
        )
        reading = cut(source, folder / name)
        (folder / f"{name}.json").write_text(json.dumps(to_coco(reading)))
        print(f"{name}: {len(reading.images)} cuttings, {sum(len(x.instances) for x in reading.images)} instances")


def main() -> None:
    """Make the set, train each form with each seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", default="person,car,cup")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if not (args.folder / "data").exists():
        make_data(args.photos, args.folder / "data", args.classes.split(","))
    recipe = load_config("quickstart", {"data.shapes": False})
    for seed in args.seeds:
        for propose in (False, True):
            started = time.perf_counter()
            settings: dict[str, Any] = {"device": "cpu", "seed": seed, "overwrite": True, "propose": propose}
            output = args.folder / f"{'proposed' if propose else 'recipe'}_{seed}"
            result = solov2.train(recipe, data=args.folder / "data", weights=args.weights, output=output, **settings)
            figures = "  ".join(f"{name} {100 * result.metrics[name]:.1f}" for name in ("segm_AP50", "segm_AP"))
            print(f"{output.name}: {figures}  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
