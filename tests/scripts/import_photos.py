"""Copy real photographs into other formats, import each copy, and compare the instances with the originals.

    python tests/scripts/import_photos.py COCO_PHOTOS FOLDER

COCO_PHOTOS has annotations/, train2017/ and val2017/; FOLDER should be empty or new. A copy is written by
`solov2.formats` and read by one command, `solov2 import`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from solov2.formats import coco, labelme, masks, yolo
from solov2.formats.annotated import Reading, to_coco

Instances = dict[str, list[tuple[str, bool, np.ndarray]]]  # stem of the image -> (class, is crowd, mask)


def photographs(root: Path, folder: Path) -> Reading:
    """Both splits as one set, with their images in one folder."""
    folder.mkdir(parents=True)
    train, val = (
        coco.read(root / f"annotations/instances_{split}2017.json", root / f"{split}2017") for split in ("train", "val")
    )
    for reading in (train, val):
        for image in reading.images:
            shutil.copy(reading.root / image.file_name, folder)
    return replace(train, root=folder, images=[*train.images, *val.images])


def write_copy(reading: Reading, name: str, folder: Path) -> None:
    """The set in a format, with its images."""
    images = folder if name == "labelme" else folder / "images"
    shutil.copytree(reading.root, images)
    if name == "labelme":
        labelme.write(reading.images, reading.root, folder)
    elif name == "yolo":
        yolo.write(reading.images, reading.class_names, folder)
    elif name == "masks":
        masks.write(reading.images, reading.class_names, folder)
    else:
        (folder / "labels.json").write_text(json.dumps(to_coco(reading)))


def instances(path: Path) -> Instances:
    """The masks of a COCO file."""
    content, found = COCO(str(path)), defaultdict(list)
    for entry in content.dataset["annotations"]:
        stem = Path(content.imgs[entry["image_id"]]["file_name"]).stem
        name = content.cats[entry["category_id"]]["name"]
        found[stem].append((name, bool(entry["iscrowd"]), content.annToMask(entry) > 0))
    return found


def flattened(truth: Instances) -> Instances:
    """What is left of each mask where later ones cover it."""
    flat: Instances = defaultdict(list)
    for stem, known in truth.items():
        free = np.ones_like(known[0][2])
        for name, crowd, mask in reversed(known):
            if (mask & free).any():
                flat[stem].append((name, crowd, mask & free))
            free &= ~mask
    return flat


def equal(known: Instances, found: Instances) -> int:
    """How many instances have an equal one of their class in the same image."""
    number = 0
    for stem, own in known.items():
        left: list[Any] = list(found.get(stem, ()))
        for name, _, mask in own:
            match = next((i for i, (other, _, x) in enumerate(left) if other == name and np.array_equal(mask, x)), None)
            if match is not None:
                left.pop(match)
                number += 1
    return number


def main() -> None:
    """Print for each format how many instances come back equal in every pixel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    reading = photographs(args.photos, args.folder / "photographs")
    files = (args.photos / f"annotations/instances_{split}2017.json" for split in ("train", "val"))
    originals = {stem: own for file in files for stem, own in instances(file).items()}
    for name in ("coco", "labelme", "yolo", "masks"):
        write_copy(reading, name, args.folder / name)
        started, output = time.perf_counter(), args.folder / f"{name}.json"
        command = [sys.executable, "-m", "solov2", "import", str(args.folder / name), "--output", str(output)]
        subprocess.run([*command, "--val-split", "0"], check=True, capture_output=True)
        seconds = time.perf_counter() - started
        known, found = flattened(originals) if name == "masks" else originals, instances(output)
        if name == "yolo":
            known = {stem: [x for x in own if not x[1]] for stem, own in known.items()}
        numbers = sum(map(len, known.values())), sum(map(len, found.values())), equal(known, found)
        what = {"yolo": " without crowds", "masks": ", flattened"}.get(name, "")
        print(
            f"{name}: {numbers[0]} instances{what}; {numbers[1]} read, {numbers[2]} equal; {seconds:.1f} s", flush=True
        )


if __name__ == "__main__":
    main()
