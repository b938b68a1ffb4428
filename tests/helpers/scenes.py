"""Scenes of squares with perfect results, and faults to plant in them."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

SIZE = 96


def rle(y: int, x: int, height: int = 20, width: int = 20) -> dict[str, Any]:
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8, order="F")
    mask[max(0, y) : y + height, max(0, x) : x + width] = 1
    counts = mask_api.encode(mask)
    return {"size": counts["size"], "counts": counts["counts"].decode()}


def scene(seed: int, images: int = 12, *, crowds: bool = True) -> tuple[COCO, list[dict[str, Any]]]:
    """Four squares of three classes in each image, and a perfect result. With `crowds`, every fourth image has one."""
    generator = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for number, (y, x) in enumerate(((4, 4), (4, 54), (54, 4), (54, 54))):
            mask, category = rle(y, x), int(generator.integers(1, 4))
            crowd = int(crowds and number == 3 and image % 4 == 0)
            box = mask_api.toBbox({**mask, "counts": mask["counts"].encode()}).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": category, "segmentation": mask,
                 "iscrowd": crowd, "area": 400.0, "bbox": box}
            )  # fmt: skip
            if not crowd:
                score = float(generator.uniform(0.5, 1))
                results.append({"image_id": image, "category_id": category, "segmentation": mask, "score": score})
    coco = COCO()
    coco.dataset = {
        "info": {},
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2, 3)],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco, results


def shifted(mask: dict[str, Any], pixels: int) -> dict[str, Any]:
    x, y, *_ = mask_api.toBbox({**mask, "counts": mask["counts"].encode()}).astype(int).tolist()
    return rle(y, x + pixels)


def plant(kind: str, coco: COCO, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results with every third one made wrong."""
    chosen = {id(entry) for entry in results[::3]}
    others = {1: 2, 2: 3, 3: 1}
    if kind == "missed":
        return [entry for entry in results if id(entry) not in chosen]
    found = []
    for entry in results:
        if id(entry) in chosen and kind == "classification":
            entry = {**entry, "category_id": others[entry["category_id"]]}
        if id(entry) in chosen and kind == "localization":
            entry = {**entry, "segmentation": shifted(entry["segmentation"], 9)}  # IoU 0.38
        if id(entry) in chosen and kind == "both":
            moved = shifted(entry["segmentation"], 9)
            entry = {**entry, "segmentation": moved, "category_id": others[entry["category_id"]]}
        found.append(entry)
        if id(entry) in chosen and kind == "duplicate":
            found.append({**entry, "score": entry["score"] - 0.01, "segmentation": shifted(entry["segmentation"], 1)})
        if id(entry) in chosen and kind == "background":
            found.append({**entry, "segmentation": rle(38, 38, 12, 12)})
    return found


def as_predictions(
    results: Sequence[dict[str, Any]], category_ids: Sequence[int]
) -> tuple[list[int], list[dict[str, Any]]]:
    """Results in COCO's format as a model gives them: image ids, and a dictionary of each."""
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in results:
        by_image[entry["image_id"]].append(entry)
    found = []
    for entries in by_image.values():
        masks = [entry["segmentation"] for entry in entries]
        boxes = np.array([mask_api.toBbox({**mask, "counts": mask["counts"].encode()}) for mask in masks])
        boxes[:, 2:] += boxes[:, :2]
        found.append(
            {
                "scores": torch.tensor([entry["score"] for entry in entries]),
                "labels": torch.tensor([category_ids.index(entry["category_id"]) for entry in entries]),
                "masks": masks,
                "boxes": torch.from_numpy(boxes).float(),
            }
        )
    return [*by_image], found
