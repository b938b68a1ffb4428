"""The picture saved at the end of a run: ground truth beside predictions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from solov2.data.class_matching import match_categories
from solov2.data.coco import CocoInstances
from solov2.models.solov2 import SOLOv2
from solov2.ops.images import read_image
from solov2.visualize import contact_sheet, draw_instances, instance_color


def draw_predictions(model: SOLOv2, validation: CocoInstances, *, count: int, score_threshold: float) -> Image.Image:
    """One sheet with ground truth and predictions of the first `count` validation images that have instances."""
    return contact_sheet(itertools.islice(_pairs(model, validation, score_threshold), count))


def _pairs(
    model: SOLOv2, validation: CocoInstances, score_threshold: float
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Pictures of ground truth and predictions of each validation image that has instances, at their full size."""
    labels = {category: label for label, category in enumerate(match_categories(model.class_names, validation))}
    for image_id in validation.image_ids:
        entries = [a for a in validation.coco.imgToAnns[image_id] if not a["iscrowd"] and a["category_id"] in labels]
        if not entries:
            continue
        path = validation.image_root / validation.coco.imgs[image_id]["file_name"]
        image = read_image(path, apply_exif=False, max_pixels=validation.max_pixels)
        truth = {
            "labels": [labels[a["category_id"]] for a in entries],
            "masks": [validation.coco.annToRLE(a) for a in entries],
        }
        scale = max(1, 512 // max(image.shape[1:]))
        [found] = model.predict([image], score_threshold=score_threshold, mask_format="rle")
        ranks = {"truth": range(len(entries)), "found": matching_ranks(found, truth)}
        known, predicted = (
            draw_instances(
                image,
                result,
                model.class_names,
                score_threshold=score_threshold,
                scale=scale,
                colors=[instance_color(rank) for rank in ranks[side]],
            )
            for side, result in (("truth", truth), ("found", found))
        )
        yield known, predicted


def matching_ranks(found: Mapping[str, Any], truth: Mapping[str, Any], *, min_iou: float = 0.5) -> list[int]:
    """Match predicted instances to ground truth, so that both can be drawn in the same color.

    As in COCO: in descending order of score, each takes the unmatched instance of its class with the highest mask IoU.

    Args:
        found: `labels` int64 [N] and `masks` (N RLE dicts), by descending score.
        truth: `labels` (M integers) and `masks` (M RLE dicts).
        min_iou: minimum mask IoU of a match.

    Returns:
        For each of the N predictions, the index of its ground truth in 0..M-1, or M, M + 1, ... if it matches none.
    """
    labels, count = found["labels"].tolist(), len(truth["labels"])
    if not labels or not count:
        return list(range(count, count + len(labels)))
    overlaps = np.asarray(mask_api.iou(found["masks"], truth["masks"], [0] * count))  # float64 [N, M]
    overlaps[np.asarray(labels)[:, None] != np.asarray(truth["labels"])[None]] = 0
    ranks, unmatched = [], count
    for row in overlaps:
        best = int(row.argmax())
        if row[best] >= min_iou:
            ranks.append(best)
            overlaps[:, best] = 0  # taken
        else:
            ranks.append(unmatched)
            unmatched += 1
    return ranks
