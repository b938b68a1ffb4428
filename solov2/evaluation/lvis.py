"""The rules and figures of LVIS (Gupta et al., arXiv 1908.03195), whose images are annotated for some classes only.

As in the LVIS API (lvis-api, eval.py and results.py):

- A class is evaluated on the images that have an instance of it and on those that list it in `neg_category_ids`;
  predictions of it on other images do not count.
- On an image that lists it in `not_exhaustive_category_ids`, unmatched predictions of it are no false positives.
- 300 predictions count per image, all classes together, those with the highest scores.
- APr, APc and APf are the AP of the rare, common and frequent classes, by the `frequency` of the categories.

The second is faster-coco-eval's. It also knows the first, but 1.8 fails where it leaves out all predictions of an image
without ground truth, and its limit is one per class: the first and the third are applied here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from solov2.data.annotations import is_integer
from solov2.errors import InputError
from solov2.evaluation.curves import (
    FASTER,
    Curves,
    Found,
    GroundTruth,
    class_curves,
    coco_figures,
    load_backend,
    mean_precision,
)

LVIS_DETECTIONS = 300  # per image
FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


def require_lvis(coco: COCO, path: str | Path) -> None:
    """Check that an annotation file says what the rules of LVIS need.

    Args:
        coco: its index.
        path: its name, for messages.

    Raises:
        InputError: an image or a category lacks a key; the message names the first.
    """
    for image_id, image in coco.imgs.items():
        for key in LISTS:
            if not isinstance(image.get(key), list) or not all(map(is_integer, image[key])):
                raise InputError(
                    f"image {image_id} of {path} has no list of category ids `{key}`, which evaluation by the rules of "
                    "LVIS needs; leave --lvis out"
                )
    for category_id, category in coco.cats.items():
        if category.get("frequency") not in tuple(FREQUENCIES):
            raise InputError(
                f"category {category_id} of {path} has no `frequency` r, c or f (rare, common, frequent), which "
                "evaluation by the rules of LVIS needs; leave --lvis out"
            )


def lvis_curves(truth: GroundTruth, found: Found, kinds: Iterable[str]) -> dict[str, list[Curves]]:
    """The curves of each class by the rules of LVIS, as `solov2.evaluation.curves.class_curves` gives them.

    Raises:
        InputError: faster-coco-eval is not installed.
    """
    backend = load_backend(FASTER)
    federated = backend._replace(evaluation=functools.partial(backend.evaluation, lvis_style=True))
    judged = {category: truth.image_ids(category) for category in truth.categories}
    for image_id, image in truth.images.items():
        for category in truth.categories.keys() & image["neg_category_ids"]:
            judged[category].add(image_id)
    rows = {
        category: [row for row in rows if row[0] in judged.get(category, ())]
        for category, rows in found.by_category(LVIS_DETECTIONS).items()
    }
    return class_curves(truth, found, rows, dict.fromkeys(kinds, federated), max_detections=LVIS_DETECTIONS)


def lvis_figures(categories: Sequence[dict[str, Any]], curves: Sequence[Curves]) -> dict[str, float]:
    """LVIS's thirteen figures, fractions of 1, from the curves of all classes; -1 without ground truth."""
    figures = coco_figures(curves, LVIS_DETECTIONS)
    groups = {
        name: mean_precision(
            [c for c, category in zip(curves, categories, strict=True) if category["frequency"] == key]
        )
        for key, name in FREQUENCIES.items()
    }
    precisions = {name: value for name, value in figures.items() if name.startswith("AP")}
    recalls = {name: value for name, value in figures.items() if name.startswith("AR") and name not in ("AR1", "AR10")}
    return precisions | groups | recalls


def highest(scores: np.ndarray, most: int | None) -> np.ndarray:
    """The positions of the `most` highest scores, int64 in their order; of equal ones, the first.

    Args:
        scores: float [N].
        most: how many; None means all.
    """
    if most is None or len(scores) <= most:
        return np.arange(len(scores))
    return np.sort(np.argsort(-scores, kind="stable")[:most])
