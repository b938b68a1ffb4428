"""A generated dataset in COCO's layout: textured shapes on textured backgrounds, as JPEGs and COCO JSON.

It lets a first training run start without a download, on the same code path as COCO: polygons for fully visible shapes,
compressed RLE for partly hidden ones, uncompressed RLE for crowd regions, category ids with gaps, objects cut off by
the border, empty images. The seed determines everything.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from solov2.data.generate import (
    LICENSE,
    draw_in_parallel,
    file_name,
    image_entry,
    save_image,
    scene_generator,
    write_dataset,
)

CLASSES = {"disc": 1, "square": 3, "triangle": 4, "star": 7}  # name -> category id, with gaps as in COCO
EMPTY_EVERY = 50  # one image in this many has no objects
CROWD_EVERY = 25  # one image in this many has a crowd region
SMALL_SHARE = 0.33  # of objects: smaller than 1/8 of the image side
OVERLAP_SHARE = 0.4  # of objects: placed over an earlier one
MIN_VISIBLE = 0.4  # share of each object that must stay visible


def generate_shapes(
    root: str | Path, *, train_images: int, val_images: int, size: int, seed: int, progress: bool = False
) -> bool:
    """Write the dataset unless it exists already.

    Args:
        root: folder to create; it is moved into place when complete, so it is never partial.
        train_images, val_images: number of images in each split; the splits use different seeds.
        size: side of the square images in pixels.
        seed: determines the whole dataset.
        progress: show a bar on a terminal.

    Returns:
        True if the dataset was written, False if the same one exists already.

    Raises:
        InputError: `root` holds other data or cannot be written, or a process was killed while drawing.
    """
    recipe = {"train_images": train_images, "val_images": val_images, "size": size, "seed": seed, "version": 2}
    return write_dataset(Path(root), recipe, _write_split, progress=progress)


def _write_split(root: Path, split: str, count: int, size: int, seed: int, progress: bool) -> None:
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    draw = functools.partial(_write_scene, root, split, size, seed)
    for i, objects in enumerate(draw_in_parallel(draw, count, f"drawing {split}", progress=progress)):
        images.append(image_entry(i, size))
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": i + 1, **entry})
    content = {
        "info": {"description": f"textured shapes, {split}, seed {seed}"},
        "licenses": [LICENSE],
        "categories": [{"id": number, "name": name, "supercategory": "shape"} for name, number in CLASSES.items()],
        "images": images,
        "annotations": annotations,
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _write_scene(root: Path, split: str, size: int, seed: int, index: int) -> list[dict[str, Any]]:
    """Draw one image and save it; returns its annotations."""
    pixels, objects = draw_scene(scene_generator(seed, split, index), size, index)
    save_image(root / split / file_name(index), pixels)
    return objects


def draw_scene(rng: np.random.Generator, size: int, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image and its annotations.

    Args:
        rng: source of all randomness.
        size: side in pixels.
        index: position in the split; determines whether the image is empty or has a crowd region.

    Returns:
        image uint8 [size, size, 3] RGB, and COCO annotations without id and image_id.
    """
    canvas = _background(rng, size)
    crowd, shapes = draw_objects(canvas, rng, index)
    entries = [] if crowd is None else [_crowd_annotation(crowd)]
    entries.extend(_annotation(shape) for shape in shapes)
    return add_noise(canvas, rng), entries


def draw_objects(
    canvas: np.ndarray, rng: np.random.Generator, index: int
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Paint the objects of one image on its background, float32 [size, size, 3].

    Args:
        canvas: the background.
        rng: source of all randomness.
        index: as for `draw_scene`.

    Returns:
        The crowd region, or None, and the shapes: each with its `name` and its `visible` pixels, bool [size, size].
    """
    if index % EMPTY_EVERY == EMPTY_EVERY - 1:
        return None, []
    size, crowd = len(canvas), None
    blocked = np.zeros((size, size), bool)
    if index % CROWD_EVERY == CROWD_EVERY // 2:
        crowd = _draw_crowd(canvas, rng)
        blocked = crowd["visible"]
    shapes: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(3, 9))):
        shape = _place(rng, size, shapes, blocked)
        if shape is not None:
            for other in shapes:
                other["visible"] = other["visible"] & ~shape["mask"]
            shapes.append(shape)
    for shape in shapes:
        _paint(canvas, shape, rng)
    return crowd, shapes


def _place(
    rng: np.random.Generator, size: int, shapes: list[dict[str, Any]], blocked: np.ndarray
) -> dict[str, Any] | None:
    """A new shape that leaves enough of itself and of all earlier ones visible, or None after 40 attempts."""
    name = str(rng.choice(list(CLASSES)))
    small = rng.random() < SMALL_SHARE
    should_overlap = bool(shapes) and rng.random() < OVERLAP_SHARE
    for _ in range(40):
        low, high = (0.095, 0.125) if small else (0.22, 0.54)
        side = size * math.exp(rng.uniform(math.log(low), math.log(high)))
        if should_overlap:
            other = shapes[rng.integers(len(shapes))]
            angle, reach = rng.uniform(0, 2 * math.pi), 0.4 * (side + other["side"])
            center = (other["center"][0] + reach * math.cos(angle), other["center"][1] + reach * math.sin(angle))
        else:
            center = tuple(rng.uniform(0.03 * size, 0.97 * size, 2))
        polygon = _outline(name, center, side, rng.uniform(0, 2 * math.pi))
        mask = _rasterize(polygon, size)
        area = _polygon_area(polygon)
        if mask.sum() < MIN_VISIBLE * area or (mask & blocked).any():
            continue
        overlaps = any((mask & other["mask"]).any() for other in shapes)
        if overlaps == should_overlap and all(
            (other["visible"] & ~mask).sum() >= MIN_VISIBLE * other["area"] for other in shapes
        ):
            return {
                "name": name,
                "center": center,
                "side": side,
                "polygon": polygon,
                "mask": mask,
                "visible": mask,
                "area": area,
            }
    return None


def _outline(name: str, center: tuple[float, float], side: float, rotation: float) -> np.ndarray:
    """Polygon float64 [n, 2] of (x, y), about `side` pixels across."""
    if name == "star":
        angles, radii = np.arange(10) * math.pi / 5, np.where(np.arange(10) % 2, 0.34, 0.62)
    else:
        corners, radius = {"disc": (32, 0.5), "square": (4, 0.62), "triangle": (3, 0.62)}[name]
        angles, radii = np.arange(corners) * 2 * math.pi / corners, np.full(corners, radius)
    points = np.stack([np.cos(angles + rotation), np.sin(angles + rotation)], 1) * radii[:, None] * side
    return (points + np.asarray(center)).round(3)  # painted from the rounded numbers that the JSON has


def _polygon_area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


def _rasterize(polygon: np.ndarray, size: int) -> np.ndarray:
    """The polygon filled by pycocotools, bool [size, size], so that the painted pixels are those annotated."""
    clipped = np.clip(polygon, 0, size)
    return mask_api.decode(mask_api.frPyObjects([clipped.ravel().tolist()], size, size))[..., 0].astype(bool)


def _annotation(shape: dict[str, Any]) -> dict[str, Any]:
    size, visible = len(shape["mask"]), shape["visible"]
    encoded = mask_api.encode(np.asfortranarray(visible.astype(np.uint8)))
    if (visible == shape["mask"]).all():
        segmentation: Any = [np.clip(shape["polygon"], 0, size).ravel().tolist()]
        encoded = mask_api.frPyObjects(segmentation, size, size)[0]
    else:
        segmentation = {"size": [size, size], "counts": encoded["counts"].decode()}
    return {
        "category_id": CLASSES[shape["name"]],
        "iscrowd": 0,
        "segmentation": segmentation,
        "area": float(mask_api.area(encoded)),
        "bbox": mask_api.toBbox(encoded).tolist(),
    }


def _draw_crowd(canvas: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Paint a cluster of tiny shapes of one class; returns its name and its region, bool [size, size]."""
    size = len(canvas)
    name = str(rng.choice(list(CLASSES)))
    middle = rng.uniform(0.15 * size, 0.85 * size, 2)
    region = np.zeros((size, size), bool)
    for _ in range(12):
        center = tuple(middle + rng.uniform(-0.12 * size, 0.12 * size, 2))
        polygon = _outline(name, center, 0.08 * size, rng.uniform(0, 2 * math.pi))
        shape = {"name": name, "center": center, "side": 0.08 * size, "mask": _rasterize(polygon, size)}
        _paint(canvas, shape, rng)
        region |= shape["mask"]
    return {"name": name, "visible": region}


def _crowd_annotation(crowd: dict[str, Any]) -> dict[str, Any]:
    region = crowd["visible"]
    pixels = region.T.ravel()  # column-major, as in COCO
    borders = np.flatnonzero(np.diff(np.concatenate([[False], pixels, [False]]))).tolist()
    counts = np.diff([0, *borders, pixels.size]).tolist()
    encoded = mask_api.encode(np.asfortranarray(region.astype(np.uint8)))
    return {
        "category_id": CLASSES[crowd["name"]],
        "iscrowd": 1,
        "segmentation": {"size": [*region.shape], "counts": counts},
        "area": float(region.sum()),
        "bbox": mask_api.toBbox(encoded).tolist(),
    }


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A soft two-color gradient with waves, float32 [size, size, 3]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle, frequency = rng.uniform(0, 2 * math.pi), rng.uniform(2, 7)
    waves = np.sin(2 * math.pi * frequency * (math.sin(angle) * x - math.cos(angle) * y))[..., None]
    return (gradient(rng, size, angle) + 10 * waves).astype(np.float32)


def gradient(rng: np.random.Generator, size: int, angle: float) -> np.ndarray:
    """A soft gradient of two random colors along a direction, float32 [size, size, 3]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    along = math.cos(angle) * x + math.sin(angle) * y
    blend = (0.5 + 0.5 * np.sin(2 * math.pi * (along * rng.uniform(0.3, 0.8) + rng.random())))[..., None]
    first, second = rng.uniform(40, 200, (2, 3)).astype(np.float32)
    return first * blend + second * (1 - blend)


# Each class has its own texture, as real classes do: a function of (along, across) in units of the object's side.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.cos(2 * math.pi * 3 * np.hypot(u, v)),
    "square": lambda u, v: np.sign(np.sin(2 * math.pi * 2 * u) * np.sin(2 * math.pi * 2 * v)),
    "triangle": lambda u, v: np.sin(2 * math.pi * 4 * u),
    "star": lambda u, v: 2 * u,
}


def _paint(canvas: np.ndarray, shape: dict[str, Any], rng: np.random.Generator) -> None:
    """Fill the shape's mask with a random color and its class's pattern, at a random angle and contrast."""
    rows, columns = np.nonzero(shape["mask"])
    angle = rng.uniform(0, 2 * math.pi)
    x, y = (columns - shape["center"][0]) / shape["side"], (rows - shape["center"][1]) / shape["side"]
    pattern = PATTERNS[shape["name"]](
        x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    )
    color = rng.uniform(20, 235, 3)
    contrast = rng.uniform(25, 60)
    canvas[rows, columns] = color + contrast * pattern[:, None]


def add_noise(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise and round to uint8."""
    noise = rng.normal(0, 6, canvas.shape).astype(np.float32)
    return (canvas + noise).clip(0, 255).round().astype(np.uint8)
