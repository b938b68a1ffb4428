"""Ground truth beside predictions, for the picture saved at the end of a run and for its report."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_api

from solov2.data.class_matching import match_categories, match_stuff
from solov2.data.coco import CocoInstances
from solov2.data.image_dataset import ImageDataset
from solov2.data.panoptic import CocoPanoptic
from solov2.models.solov2 import SOLOv2
from solov2.ops.masks import encode_rle
from solov2.ops.panoptic import measure_segments, replace_ids
from solov2.visualize import contact_sheet, draw_instances, instance_color
from solov2.visualize_panoptic import draw_panoptic

SHARP = 512  # smaller images are enlarged to about this many pixels, or labels would hide them


def draw_predictions(model: SOLOv2, validation: ImageDataset, *, count: int, score_threshold: float) -> Image.Image:
    """One sheet with ground truth and predictions of the first `count` validation images that have annotations.

    `score_threshold` is for instances; a panoptic model draws what its own settings leave.
    """
    pairs = (
        _panoptic_pairs(model, validation)
        if isinstance(validation, CocoPanoptic)
        else _pairs(model, validation, score_threshold)
    )
    return contact_sheet(itertools.islice(pairs, count))


def _panoptic_pairs(model: SOLOv2, validation: CocoPanoptic) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Pictures of ground truth and predictions of each validation image that has segments, at their full size."""
    for position in range(len(validation)):
        truth = _panoptic_truth(model, validation, position)
        if truth["segments"]:
            yield draw_panoptic_pair(model, validation, position, truth)


def draw_panoptic_pair(
    model: SOLOv2, validation: CocoPanoptic, position: int, truth: Mapping[str, Any] | None = None
) -> tuple[Image.Image, Image.Image]:
    """Ground truth and predictions of a panoptic model on the image at a position, in matching colors."""
    truth = _panoptic_truth(model, validation, position) if truth is None else truth
    image = validation.image(position)
    scale = max(1, SHARP // max(image.shape[1:]))
    [found] = model.predict_panoptic([image])
    things = [_things(result) for result in (truth, found)]
    ranks = matching_ranks(things[1], things[0])
    known, predicted = (
        draw_panoptic(image, result, model, scale=scale, colors=[instance_color(rank) for rank in own])
        for result, own in ((truth, range(len(things[0]["labels"]))), (found, ranks))
    )
    return known, predicted


def _panoptic_truth(model: SOLOv2, validation: CocoPanoptic, position: int) -> dict[str, Any]:
    """The annotation of an image as a result of a model, without crowds and the classes that the model lacks."""
    segments = validation.panoptic[validation.image_ids[position]].segments
    labels = {
        category: (label, is_thing)
        for ids, is_thing in (
            (match_categories(model.class_names, validation), True),
            (match_stuff(model.stuff_names, validation), False),
        )
        for label, category in enumerate(ids)
    }
    shown = [x for x in segments if not x.is_crowd and x.category_id in labels]
    ids = validation.panoptic.read_map(validation.image_ids[position])
    ids = replace_ids(ids, {x.id: number for number, x in enumerate(shown, 1)}, other=0, dtype=np.int32)
    measured = measure_segments(ids)
    boxes = dict(zip(measured.ids.tolist(), measured.boxes.tolist(), strict=True))
    entries = [
        {"id": number, "label": labels[x.category_id][0], "is_thing": labels[x.category_id][1], "box": boxes[number]}
        for number, x in enumerate(shown, 1)
        if number in boxes
    ]
    return {"panoptic_map": torch.from_numpy(ids), "segments": entries}


def _things(result: Mapping[str, Any]) -> dict[str, Any]:
    """The things of a panoptic result: `labels` int64 [N] and `masks` (N RLE dicts)."""
    things = [segment for segment in result["segments"] if segment["is_thing"]]
    masks = [encode_rle((result["panoptic_map"] == segment["id"])[None])[0] for segment in things]
    return {"labels": torch.tensor([segment["label"] for segment in things], dtype=torch.int64), "masks": masks}


def _pairs(
    model: SOLOv2, validation: ImageDataset, score_threshold: float
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Pictures of ground truth and predictions of each validation image that has instances, at their full size."""
    assert isinstance(validation, CocoInstances)
    category_ids = match_categories(model.class_names, validation)
    for position in range(len(validation)):
        if _instances(validation, position, category_ids):
            [found] = model.predict([validation.image(position)], score_threshold=score_threshold, mask_format="rle")
            known, predicted = draw_instance_views(
                validation, position, [found], model.class_names, category_ids, score_threshold=score_threshold
            )
            yield known, predicted


def draw_instance_views(
    validation: CocoInstances,
    position: int,
    found: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    category_ids: Sequence[int | None],
    *,
    score_threshold: float,
) -> list[Image.Image]:
    """Ground truth of the image at a position, then each of several results, in matching colors.

    Args:
        validation: has the image.
        position: of the image.
        found: results with `labels` int64 [N], `scores` float32 [N] and `masks` (N RLE dicts), by descending score.
        class_names, category_ids: name, and category id in the annotation file, of each label of these results.
        score_threshold: minimum score of the predictions that are drawn.
    """
    labels = {category: label for label, category in enumerate(category_ids)}
    entries = _instances(validation, position, category_ids)
    truth = {
        "labels": [labels[a["category_id"]] for a in entries],
        "masks": [validation.coco.annToRLE(a) for a in entries],
    }
    image = validation.image(position)
    scale = max(1, SHARP // max(image.shape[1:]))
    drawn = [(truth, range(len(entries))), *((result, matching_ranks(result, truth)) for result in found)]
    return [
        draw_instances(
            image,
            result,
            class_names,
            score_threshold=score_threshold,
            scale=scale,
            colors=[instance_color(rank) for rank in ranks],
        )
        for result, ranks in drawn
    ]


def _instances(validation: CocoInstances, position: int, category_ids: Sequence[int | None]) -> list[Mapping[str, Any]]:
    """The annotations of an image that are no crowds and have one of some categories."""
    annotations = validation.coco.imgToAnns[validation.image_ids[position]]
    return [a for a in annotations if not a["iscrowd"] and a["category_id"] in category_ids]


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
