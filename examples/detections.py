"""What an exported file does not contain, in numpy and Pillow alone: image file -> its input, outputs -> instances."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from panoptic_merge import resizing
from PIL import Image, ImageOps


def load(file: str | BinaryIO, padded: Sequence[int], input_scale: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Decode an image, upright, and resize and pad it as the library does.

    Args:
        file: the image file.
        padded: (height, width) that the exported file takes.
        input_scale: (maximum long edge, maximum short edge), from the metadata of the exported file.

    Returns:
        pixels uint8 [1, 3, *padded] in RGB, sizes int64 [1, 2] before padding, original size int64 [2].
    """
    with Image.open(file) as opened:
        image = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    original = image.shape[:2]
    factor = min(max(input_scale) / max(original), min(input_scale) / min(original), *np.divide(padded, original))
    height, width = (max(1, int(side * factor + 0.5)) for side in original)
    pixels = np.zeros((1, 3, *padded), dtype=np.uint8)
    pixels[0, :, :height, :width] = resize(image, (height, width)).transpose(2, 0, 1)
    return pixels, np.array([[height, width]]), np.array(original)


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """uint8 [h, w, 3] -> [H, W, 3]."""

    def neighbors(source: int, target: int, columns: bool) -> tuple[np.ndarray, ...]:
        position = ((np.arange(target) + 0.5) * (1 / (target / source)) - 0.5).astype(np.float32)
        first = np.floor(position)
        fraction = position - first
        if columns:
            fraction[(first < 0) | (first >= source - 1)] = 0
        weights = [np.rint(part * np.float32(2048)).astype(np.int32)[:, None] for part in (1 - fraction, fraction)]
        return *((first.astype(int) + offset).clip(0, source - 1) for offset in (0, 1)), *weights

    left, right, a, b = neighbors(image.shape[1], size[1], columns=True)
    top, bottom, c, d = neighbors(image.shape[0], size[0], columns=False)
    pixels = image.astype(np.int32)
    lines = (pixels[:, left] * a + pixels[:, right] * b) >> 4
    return (((lines[top] * c[..., None] >> 16) + (lines[bottom] * d[..., None] >> 16) + 2) >> 2).astype(np.uint8)


def instances(
    scores: np.ndarray,
    labels: np.ndarray,
    masks: np.ndarray,
    size: Sequence[int],
    original: Sequence[int],
    metadata: Mapping[str, str],
    score_threshold: float = 0.3,
) -> list[dict[str, Any]]:
    """The instances of one image, best first.

    Args:
        scores, labels, masks: outputs for the image: float32 [K], int64 [K], float32 [K, H / 4, W / 4].
        size, original: (height, width) of the image inside the padded input, and as it was.
        metadata: of the exported file: class_names and mask_threshold, in JSON.
        score_threshold: minimum score.

    Returns:
        Per instance: score, label, name of the class, and mask bool [H, W] at the original size.
    """
    names, threshold = (json.loads(metadata[key]) for key in ("class_names", "mask_threshold"))
    rows, columns = (resizing(*sizes) for sizes in zip(masks.shape[1:], size, original))
    return [
        {"score": float(score), "label": int(label), "name": names[label], "mask": rows @ soft @ columns.T > threshold}
        for score, label, soft in zip(scores, labels, masks)
        if score > 0 and score >= score_threshold
    ]


def describe(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Instances ready for JSON: name, label, score, box [left, top, right, bottom], and area of the mask in pixels."""
    described = []
    for instance in found:
        rows, columns = (instance["mask"].any(axis).nonzero()[0] for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 0, 0]
        entry = {key: instance[key] for key in ("name", "label", "score")}
        described.append({**entry, "box": [int(side) for side in box], "area": int(instance["mask"].sum())})
    return described
