"""A generated data set in COCO's own layout: textured shapes on textured backgrounds, real JPEGs and real COCO JSON.

It exists so that a first training run needs no download and still walks exactly the path that COCO walks: polygons for
whole shapes, compressed RLE for partly hidden ones, uncompressed RLE for crowd regions, category ids with gaps, objects
cut by the border, empty images. Everything follows from the seed.
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

CLASSES = {"disc": 1, "square": 3, "triangle": 4, "star": 7}  # name -> category id; with gaps, as in COCO
SPLITS = ("train2017", "val2017")
EMPTY_EVERY = 50  # one image in so many holds nothing
CROWD_EVERY = 25  # one image in so many holds a crowd region
SMALL_SHARE = 0.33  # of the objects are drawn smaller than 1/8 of the image side
OVERLAP_SHARE = 0.4  # of the objects are put onto an earlier one
MIN_VISIBLE = 0.4  # no object may hide more of another than this leaves


def generate_shapes(
    root: str | Path, *, train_images: int, val_images: int, size: int, seed: int, progress: bool = False
) -> bool:
    """Write the data set unless it is there already.

    Args:
        root: folder to create; it appears complete or not at all.
        train_images, val_images: number of images of each split; the splits use different seeds.
        size: side of the square images in pixels.
        seed: everything is a function of it.
        progress: show a bar on a terminal.

    Returns:
        Whether anything was written; False where the same data set is already there.

    Raises:
        InputError: `root` holds something else, or cannot be written.
    """
    root = Path(root)
    recipe = {"train_images": train_images, "val_images": val_images, "size": size, "seed": seed, "version": 2}
    if _is_there(root, recipe):
        return False
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        unfinished = root.parent / f".{root.name}.{secrets.token_hex(4)}"
        unfinished.mkdir()
    except OSError as error:
        raise InputError(f"cannot write the generated data set to {root}: {error.strerror}") from error
    try:
        for split, count in zip(SPLITS, (train_images, val_images), strict=True):
            _write_split(unfinished, split, count, size, seed, progress)
        (unfinished / "shapes.json").write_text(json.dumps(recipe))
        return _publish(unfinished, root, recipe)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _publish(unfinished: Path, root: Path, recipe: dict[str, int]) -> bool:
    """Move the complete data set to its place; False where a run that started at the same time has been faster."""
    try:
        if root.exists():
            root.rmdir()
        os.replace(unfinished, root)
    except OSError:
        if not _is_there(root, recipe):
            raise
        shutil.rmtree(unfinished)
        return False
    return True


def _is_there(root: Path, recipe: dict[str, int]) -> bool:
    """Whether the folder holds the data set; an InputError where it holds something else."""
    if not root.exists() or not any(root.iterdir()):
        return False
    marker = root / "shapes.json"
    if marker.is_file() and json.loads(marker.read_text()) == recipe:
        return True
    raise InputError(f"{root} already holds other data; remove it or name another folder with --data-root")


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
        raise InputError("a drawing process was killed, perhaps for lack of memory; run the command again") from error
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
    """Draw one image into its file; returns its annotations."""
    pixels, objects = draw_scene(np.random.default_rng([seed, SPLITS.index(split), index]), size, index)
    PIL.Image.fromarray(pixels).save(root / split / _file_name(index), quality=92)
    return objects


def draw_scene(random: np.random.Generator, size: int, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image and its annotations.

    Args:
        random: source of every choice.
        size: side in pixels.
        index: position in the split; decides whether the image is empty or holds a crowd.

    Returns:
        RGB uint8 [size, size, 3] and COCO annotations without id and image_id.
    """
    canvas = _background(random, size)
    if index % EMPTY_EVERY == EMPTY_EVERY - 1:
        return _finish(canvas, random), []
    entries = []
    blocked = np.zeros((size, size), bool)
    if index % CROWD_EVERY == CROWD_EVERY // 2:
        blocked, entry = _draw_crowd(canvas, random)
        entries.append(entry)
    shapes: list[dict[str, Any]] = []
    for _ in range(int(random.integers(3, 9))):
        shape = _place(random, size, shapes, blocked)
        if shape is not None:
            for other in shapes:
                other["visible"] = other["visible"] & ~shape["mask"]
            shapes.append(shape)
    for shape in shapes:
        _paint(canvas, shape, random)
    entries.extend(_annotation(shape) for shape in shapes)
    return _finish(canvas, random), entries


def _place(
    random: np.random.Generator, size: int, shapes: list[dict[str, Any]], blocked: np.ndarray
) -> dict[str, Any] | None:
    """A new shape that leaves enough of itself and of all earlier ones visible, or None after many tries."""
    name = str(random.choice(list(CLASSES)))
    small = random.random() < SMALL_SHARE
    onto = bool(shapes) and random.random() < OVERLAP_SHARE
    for _ in range(40):
        low, high = (0.095, 0.125) if small else (0.22, 0.54)
        side = size * math.exp(random.uniform(math.log(low), math.log(high)))
        if onto:
            other = shapes[random.integers(len(shapes))]
            angle, reach = random.uniform(0, 2 * math.pi), 0.4 * (side + other["side"])
            center = (other["center"][0] + reach * math.cos(angle), other["center"][1] + reach * math.sin(angle))
        else:
            center = tuple(random.uniform(0.03 * size, 0.97 * size, 2))
        polygon = _outline(name, center, side, random.uniform(0, 2 * math.pi))
        mask = _rasterise(polygon, size)
        area = _polygon_area(polygon)
        if mask.sum() < MIN_VISIBLE * area or (mask & blocked).any():
            continue
        touching = any((mask & other["mask"]).any() for other in shapes)
        if touching == onto and all(
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


def _outline(name: str, center: tuple[float, float], side: float, turn: float) -> np.ndarray:
    """Polygon [n, 2] of (x, y), about `side` across."""
    if name == "star":
        angles, radii = np.arange(10) * math.pi / 5, np.where(np.arange(10) % 2, 0.34, 0.62)
    else:
        corners, radius = {"disc": (32, 0.5), "square": (4, 0.62), "triangle": (3, 0.62)}[name]
        angles, radii = np.arange(corners) * 2 * math.pi / corners, np.full(corners, radius)
    points = np.stack([np.cos(angles + turn), np.sin(angles + turn)], 1) * radii[:, None] * side
    return (points + np.asarray(center)).round(3)  # as written to the JSON, so that both rasterise alike


def _polygon_area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


def _rasterise(polygon: np.ndarray, size: int) -> np.ndarray:
    """The polygon as pycocotools fills it, bool [size, size]; what is annotated is then exactly what is painted."""
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


def _draw_crowd(canvas: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """Paint a heap of tiny shapes of one class; returns its region and a crowd annotation in uncompressed RLE."""
    size = len(canvas)
    name = str(random.choice(list(CLASSES)))
    middle = random.uniform(0.15 * size, 0.85 * size, 2)
    region = np.zeros((size, size), bool)
    for _ in range(12):
        center = tuple(middle + random.uniform(-0.12 * size, 0.12 * size, 2))
        polygon = _outline(name, center, 0.08 * size, random.uniform(0, 2 * math.pi))
        shape = {"name": name, "center": center, "side": 0.08 * size, "mask": _rasterise(polygon, size)}
        _paint(canvas, shape, random)
        region |= shape["mask"]
    pixels = region.T.ravel()  # column-major, as COCO counts
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


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    """A soft two-color gradient with waves and grain, float32 [size, size, 3] in 0..255."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle, frequency = random.uniform(0, 2 * math.pi), random.uniform(2, 7)
    along = math.cos(angle) * x + math.sin(angle) * y
    blend = (0.5 + 0.5 * np.sin(2 * math.pi * (along * random.uniform(0.3, 0.8) + random.random())))[..., None]
    waves = np.sin(2 * math.pi * frequency * (math.sin(angle) * x - math.cos(angle) * y))[..., None]
    first, second = random.uniform(40, 200, (2, 3)).astype(np.float32)
    return (first * blend + second * (1 - blend) + 10 * waves).astype(np.float32)


# Each class has its own pattern over (along, across) in units of the object's side, as real classes have textures.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda u, v: np.cos(2 * math.pi * 3 * np.hypot(u, v)),
    "square": lambda u, v: np.sign(np.sin(2 * math.pi * 2 * u) * np.sin(2 * math.pi * 2 * v)),
    "triangle": lambda u, v: np.sin(2 * math.pi * 4 * u),
    "star": lambda u, v: 2 * u,
}


def _paint(canvas: np.ndarray, shape: dict[str, Any], random: np.random.Generator) -> None:
    """Fill the shape's mask with a color and its class's pattern, at a random turn and contrast."""
    rows, columns = np.nonzero(shape["mask"])
    angle = random.uniform(0, 2 * math.pi)
    x, y = (columns - shape["center"][0]) / shape["side"], (rows - shape["center"][1]) / shape["side"]
    pattern = PATTERNS[shape["name"]](
        x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    )
    color = random.uniform(20, 235, 3)
    contrast = random.uniform(25, 60)
    canvas[rows, columns] = color + contrast * pattern[:, None]


def _finish(canvas: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Add grain, round, uint8."""
    grain = random.normal(0, 6, canvas.shape).astype(np.float32)
    return (canvas + grain).clip(0, 255).round().astype(np.uint8)
