"""A generated dataset in COCO's layout: textured shapes on textured backgrounds, as JPEGs and COCO JSON.

It lets a first training run start without a download, on the same code path as COCO: polygons for fully visible shapes,
compressed RLE for partly hidden ones, uncompressed RLE for crowd regions, category ids with gaps, objects cut off by
the border, empty images. The seed determines everything.
"""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as mask_api
from tqdm import tqdm

from solov2.errors import InputError

CLASSES = {"disc": 1, "square": 3, "triangle": 4, "star": 7}  # name -> category id, with gaps as in COCO
SPLITS = ("train2017", "val2017")
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
    root = Path(root)
    recipe = {"train_images": train_images, "val_images": val_images, "size": size, "seed": seed, "version": 2}
    if _already_generated(root, recipe):
        return False
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = root.parent / f".{root.name}.{secrets.token_hex(4)}"
        partial.mkdir()
    except OSError as error:
        raise InputError(f"cannot write the generated dataset to {root}: {error.strerror}") from error
    try:
        for split, count in zip(SPLITS, (train_images, val_images), strict=True):
            _write_split(partial, split, count, size, seed, progress)
        (partial / "shapes.json").write_text(json.dumps(recipe))
        return _publish(partial, root, recipe)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _publish(partial: Path, root: Path, recipe: dict[str, int]) -> bool:
    """Move the complete dataset into place; False if another run has put the same one there in the meantime."""
    try:
        if root.exists():
            root.rmdir()
        os.replace(partial, root)
    except OSError:
        if not _already_generated(root, recipe):
            raise
        shutil.rmtree(partial)
        return False
    return True


def _already_generated(root: Path, recipe: dict[str, int]) -> bool:
    """Whether the folder holds this very dataset; InputError if it holds anything else."""
    if not root.exists() or not any(root.iterdir()):
        return False
    marker = root / "shapes.json"
    if marker.is_file() and json.loads(marker.read_text()) == recipe:
        return True
    raise InputError(
        f"{root} holds other data than the shapes that data.shapes generates; name another folder with --data, or "
        "train on what is there with --set data.shapes=false"
    )


def _write_split(root: Path, split: str, count: int, size: int, seed: int, progress: bool) -> None:
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    bar = tqdm(desc=f"drawing {split}", total=count, leave=False, unit="image", disable=None if progress else True)
    draw = functools.partial(_write_scene, root, split, size, seed)
    ignore_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        with bar, ProcessPoolExecutor(min(os.cpu_count() or 1, 8), initializer=ignore_interrupts) as pool:
            for i, objects in enumerate(pool.map(draw, range(count), chunksize=8)):
                bar.update()
                name = _file_name(i)
                images.append({"id": i + 1, "file_name": name, "width": size, "height": size, "license": 0})
                for entry in objects:
                    annotations.append({"id": len(annotations) + 1, "image_id": i + 1, **entry})
    except BrokenProcessPool as error:
        raise InputError("a drawing process was killed, perhaps out of memory; run the command again") from error
    content = {
        "info": {"description": f"textured shapes, {split}, seed {seed}"},
        "licenses": [{"id": 0, "name": "generated, no rights reserved", "url": ""}],
        "categories": [{"id": number, "name": name, "supercategory": "shape"} for name, number in CLASSES.items()],
        "images": images,
        "annotations": annotations,
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _file_name(index: int) -> str:
    return f"{index + 1:012d}.jpg"


def _write_scene(root: Path, split: str, size: int, seed: int, index: int) -> list[dict[str, Any]]:
    """Draw one image and save it; returns its annotations."""
    pixels, objects = draw_scene(np.random.default_rng([seed, SPLITS.index(split), index]), size, index)
    PIL.Image.fromarray(pixels).save(root / split / _file_name(index), quality=92)
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
    if index % EMPTY_EVERY == EMPTY_EVERY - 1:
        return _add_noise(canvas, rng), []
    entries = []
    blocked = np.zeros((size, size), bool)
    if index % CROWD_EVERY == CROWD_EVERY // 2:
        blocked, entry = _draw_crowd(canvas, rng)
        entries.append(entry)
    shapes: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(3, 9))):
        shape = _place(rng, size, shapes, blocked)
        if shape is not None:
            for other in shapes:
                other["visible"] = other["visible"] & ~shape["mask"]
            shapes.append(shape)
    for shape in shapes:
        _paint(canvas, shape, rng)
    entries.extend(_annotation(shape) for shape in shapes)
    return _add_noise(canvas, rng), entries


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


def _draw_crowd(canvas: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """Paint a cluster of tiny shapes of one class; returns its region bool [size, size] and its crowd annotation."""
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
    pixels = region.T.ravel()  # column-major, as in COCO
    borders = np.flatnonzero(np.diff(np.concatenate([[False], pixels, [False]]))).tolist()
    counts = np.diff([0, *borders, pixels.size]).tolist()
    encoded = mask_api.encode(np.asfortranarray(region.astype(np.uint8)))
    return region, {
        "category_id": CLASSES[name],
        "iscrowd": 1,
        "segmentation": {"size": [size, size], "counts": counts},
        "area": float(region.sum()),
        "bbox": mask_api.toBbox(encoded).tolist(),
    }


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A soft two-color gradient with waves, float32 [size, size, 3]."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle, frequency = rng.uniform(0, 2 * math.pi), rng.uniform(2, 7)
    along = math.cos(angle) * x + math.sin(angle) * y
    blend = (0.5 + 0.5 * np.sin(2 * math.pi * (along * rng.uniform(0.3, 0.8) + rng.random())))[..., None]
    waves = np.sin(2 * math.pi * frequency * (math.sin(angle) * x - math.cos(angle) * y))[..., None]
    first, second = rng.uniform(40, 200, (2, 3)).astype(np.float32)
    return (first * blend + second * (1 - blend) + 10 * waves).astype(np.float32)


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


def _add_noise(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise and round to uint8."""
    noise = rng.normal(0, 6, canvas.shape).astype(np.float32)
    return (canvas + noise).clip(0, 255).round().astype(np.uint8)
