"""A generated dataset in the layout of COCO's panoptic annotations: textured shapes on textured stuff.

The shapes are those of `solov2.data.shapes`. Behind them, stuff fills one to three bands, separated by wavy lines.
Only the patterns identify the classes; the colors are random. The seed determines everything.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from solov2.data.generate import (
    LICENSE,
    draw_in_parallel,
    file_name,
    image_entry,
    save_image,
    scene_generator,
    write_dataset,
)
from solov2.data.shapes import CLASSES, add_noise, draw_objects, gradient
from solov2.ops.panoptic import MAX_SEGMENT_ID, measure_segments, rgb_from_ids

STUFF = {"waves": 10, "bricks": 12, "dots": 13, "grain": 17, "plain": 20}  # name -> category id
BAND_SHARES = (0.2, 0.45, 0.35)  # of the images with one, two and three bands
VOID_EVERY = 7  # one image in this many has a band that is not annotated


def generate_panoptic_shapes(
    root: str | Path, *, train_images: int, val_images: int, size: int, seed: int, progress: bool = False
) -> bool:
    """Write the dataset unless it exists already: arguments, result and errors as for `generate_shapes`."""
    recipe = {"kind": "panoptic", "train_images": train_images, "val_images": val_images, "size": size, "seed": seed}
    return write_dataset(Path(root), {**recipe, "version": 1}, _write_split, progress=progress)


def _write_split(root: Path, split: str, count: int, size: int, seed: int, progress: bool) -> None:
    (root / split).mkdir(parents=True)
    (root / "annotations" / f"panoptic_{split}").mkdir(parents=True)
    draw = functools.partial(_write_scene, root, split, size, seed)
    segments = [*draw_in_parallel(draw, count, f"drawing {split}", progress=progress)]
    content = {
        "info": {"description": f"textured shapes on textured stuff, {split}, seed {seed}"},
        "licenses": [LICENSE],
        "categories": [
            {"id": number, "name": name, "isthing": isthing, "supercategory": kind}
            for isthing, kind, classes in ((1, "shape", CLASSES), (0, "texture", STUFF))
            for name, number in classes.items()
        ],
        "images": [image_entry(index, size) for index in range(count)],
        "annotations": [
            {"image_id": index + 1, "file_name": file_name(index, ".png"), "segments_info": found}
            for index, found in enumerate(segments)
        ],
    }
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))


def _write_scene(root: Path, split: str, size: int, seed: int, index: int) -> list[dict[str, Any]]:
    """Draw one image, and save it and its segments; returns its `segments_info`."""
    pixels, ids, segments = draw_panoptic_scene(scene_generator(seed, split, index), size, index)
    save_image(root / split / file_name(index), pixels)
    png = root / "annotations" / f"panoptic_{split}" / file_name(index, ".png")
    PIL.Image.fromarray(rgb_from_ids(ids)).save(png)
    return segments


def draw_panoptic_scene(
    rng: np.random.Generator, size: int, index: int
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """One image and its segments.

    Args:
        rng: source of all randomness.
        size: side in pixels.
        index: position in the split; determines whether the image has no objects, a crowd region or a void band.

    Returns:
        image uint8 [size, size, 3] RGB; ids int32 [size, size]; `segments_info` of the segments that can be seen.
    """
    bands = _bands(rng, size)
    names = [str(name) for name in rng.permutation(list(STUFF))[: bands.max() + 1]]
    canvas = np.zeros((size, size, 3), dtype=np.float32)
    for band, name in enumerate(names):
        inside = bands == band
        canvas[inside] = _texture(rng, size, name)[inside]
    void = int(rng.integers(len(names))) if index % VOID_EVERY == VOID_EVERY - 1 else -1
    crowd, shapes = draw_objects(canvas, rng, index)
    layers = [(STUFF[name], 0, bands == band) for band, name in enumerate(names) if band != void]
    layers += [] if crowd is None else [(CLASSES[crowd["name"]], 1, crowd["visible"])]
    layers += [(CLASSES[shape["name"]], 0, shape["visible"]) for shape in shapes]
    numbers = (1 + rng.choice(MAX_SEGMENT_ID, len(layers), replace=False)).tolist()
    ids = np.zeros((size, size), dtype=np.int32)
    for number, (_, _, mask) in zip(numbers, layers):
        ids[mask] = number
    table, kinds = measure_segments(ids), dict(zip(numbers, layers))
    segments = []
    for number, area, (x1, y1, x2, y2) in zip(*(column.tolist() for column in table)):
        category, iscrowd, _ = kinds[number]
        box = [x1, y1, x2 - x1, y2 - y1]
        segments.append({"id": number, "category_id": category, "area": area, "bbox": box, "iscrowd": iscrowd})
    return add_noise(canvas, rng), ids, segments


def _bands(rng: np.random.Generator, size: int) -> np.ndarray:
    """The band of each pixel, int64 [size, size], counted from 0."""
    cuts = {1: [], 2: [(0.35, 0.65)], 3: [(0.25, 0.42), (0.58, 0.75)]}[int(rng.choice((1, 2, 3), p=BAND_SHARES))]
    y, x = np.mgrid[:size, :size] / size
    angle = rng.uniform(0, 2 * math.pi)
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    along = (along - along.min()) / (along.max() - along.min())
    bands = np.zeros((size, size), dtype=np.int64)
    for low, high in cuts:  # further apart than the waves are high, so that lines do not cross
        wave = rng.uniform(0.01, 0.04) * np.sin(2 * math.pi * (rng.uniform(1, 3) * across + rng.random()))
        bands += along > rng.uniform(low, high) + wave
    return bands


def _waves(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    bend = rng.uniform(2, 4) * np.sin(2 * math.pi * v / rng.uniform(35, 60))
    return np.sin(2 * math.pi * (u + bend) / rng.uniform(9, 13))


def _bricks(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    height, width, joint = rng.uniform(10, 14), rng.uniform(20, 28), 1.6
    row = np.floor(v / height)
    in_joint = (v % height < joint) | ((u + row % 2 * width / 2) % width < joint)
    return np.where(in_joint, -1.0, 1.0)


def _dots(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    every = rng.uniform(8, 11)
    distance = np.hypot(u % every - every / 2, v % every - every / 2)
    return np.where(distance < 2.4, 1.0, -1.0)


# A function of (rng, along, across) in pixels, from about -1 to 1.
TEXTURES: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]] = {
    "waves": _waves,
    "bricks": _bricks,
    "dots": _dots,
    "grain": lambda rng, u, _: rng.normal(0, 0.8, u.shape),
    "plain": lambda _, u, __: np.zeros_like(u),
}


def _texture(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """A texture at a random angle and contrast, on a gradient of two random colors: float32 [size, size, 3]."""
    y, x = np.mgrid[:size, :size].astype(np.float64)
    angle = rng.uniform(0, 2 * math.pi)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    pattern = rng.uniform(20, 34) * TEXTURES[name](rng, u, v)
    return gradient(rng, size, rng.uniform(0, 2 * math.pi)) + pattern[..., None].astype(np.float32)
