"""Small annotation files of other tools, and what to compare of a reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from solov2.formats.annotated import AnnotatedImage, AnnotatedInstance, Reading
from solov2.ops.masks import encode_rle, segmentation_to_mask

HEIGHT, WIDTH = 40, 60


def save_images(folder: Path, *names: str, size: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
    """Black images of `size` (h, w)."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size[::-1]).save(folder / name)


def write(path: Path, content: Any) -> Path:
    """Write text, or anything else as JSON; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def box_mask(x: int, y: int, width: int, height: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    """bool [h, w], True in a rectangle."""
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def rle(mask: np.ndarray) -> dict[str, Any]:
    """The compressed RLE of a bool mask [h, w]."""
    import torch

    return encode_rle(torch.from_numpy(mask)[None])[0]


def mask_of(image: AnnotatedImage, instance: AnnotatedInstance) -> np.ndarray:
    """bool [h, w]."""
    return segmentation_to_mask(instance.segmentation, (image.height, image.width)).numpy() > 0


def boxes(reading: Reading) -> dict[str, list[tuple[str, int, int, int, int, int]]]:
    """{file: (class, x, y, width, height of the mask, its area) of each instance}."""
    found = {}
    for image in reading.images:
        rows = []
        for instance in image.instances:
            y, x = np.nonzero(mask_of(image, instance))
            x1, y1 = int(x.min()), int(y.min())
            rows.append((instance.class_name, x1, y1, int(x.max()) + 1 - x1, int(y.max()) + 1 - y1, len(x)))
        found[image.file_name] = rows
    return found
