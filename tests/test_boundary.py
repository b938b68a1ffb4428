"""AP of boundaries: equal to Boundary IoU written down again, over pycocotools' evaluation."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers.scenes import SIZE, as_predictions, plant, rle, scene
from pycocotools import mask as mask_api
from pycocotools.cocoeval import COCOeval

from solov2.errors import InputError
from solov2.evaluation.coco import CocoEvaluator, format_table
from solov2.evaluation.curves import FIGURES

CATEGORY_IDS = [1, 2, 3]


def boundary(mask: dict[str, Any]) -> dict[str, Any]:
    """The pixels of a mask that erosion by 2% of the diagonal removes; outside of the image there is no mask."""
    pixels = torch.from_numpy(mask_api.decode(mask))
    eroded = torch.nn.functional.pad(pixels, (1, 1, 1, 1)).float()[None]
    for _ in range(max(1, round(0.02 * np.hypot(*pixels.shape)))):
        eroded = -torch.nn.functional.max_pool2d(-eroded, 3, stride=1, padding=1)
    kept = eroded[0, 1:-1, 1:-1].byte()
    return mask_api.encode(np.asfortranarray(pixels - kept))


class BoundaryEvaluation(COCOeval):
    """pycocotools' evaluation with the smaller IoU of masks and their boundaries."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        known, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not known or not found:
            return []
        order = np.argsort([-entry["score"] for entry in found], kind="mergesort")[: self.params.maxDets[-1]]
        masks = [found[position]["segmentation"] for position in order], [entry["segmentation"] for entry in known]
        crowds = [int(entry["iscrowd"]) for entry in known]
        ious = mask_api.iou(*masks, crowds)
        edges = mask_api.iou(*([boundary(mask) for mask in each] for each in masks), crowds)
        return np.where(np.array(crowds, dtype=bool), ious, np.minimum(ious, edges))


def figures_by_hand(coco: Any, results: list[dict[str, Any]]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = BoundaryEvaluation(coco, coco.loadRes([dict(entry) for entry in results]), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(FIGURES, evaluation.stats.tolist(), strict=True))


def evaluated(coco: Any, results: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    evaluator = CocoEvaluator(coco, CATEGORY_IDS, boundary=True, **options)
    evaluator.update(*as_predictions(results, CATEGORY_IDS))
    return evaluator.summarize(per_class=True)


@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
def test_boundary_ap_is_that_of_the_smaller_iou(backend: str) -> None:
    pytest.importorskip("faster_coco_eval")
    coco, results = scene(3)
    generator = np.random.default_rng(0)
    results = [
        {**entry, "segmentation": moved(entry["segmentation"], generator)}
        for entry in plant("duplicate", coco, plant("localization", coco, results))
    ]
    summary = evaluated(coco, results, backend=backend)
    expected = figures_by_hand(coco, results)
    assert summary["boundary"] == pytest.approx(expected, rel=0, abs=1e-12)
    assert 0.05 < summary["boundary"]["AP"] < summary["segm"]["AP"] - 0.05
    plain = CocoEvaluator(coco, CATEGORY_IDS, backend=backend)
    plain.update(*as_predictions(results, CATEGORY_IDS))
    figures = plain.summarize(per_class=True)
    assert "boundary" not in figures and all(figures[kind] == summary[kind] for kind in ("segm", "bbox"))
    aps = [each["boundary_AP"] for each in summary["per_class"].values()]
    assert np.mean(aps) == pytest.approx(summary["boundary"]["AP"], abs=1e-12)
    table = format_table(summary).split("\n")
    assert table[0].split() == ["mask", "box", "boundary"] and len({len(line) for line in table[:13]}) == 1
    assert table[1].split()[3] == f"{100 * summary['boundary']['AP']:.1f}"


def moved(mask: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
    """A square of about the same place and size."""
    x, y, width, height = mask_api.toBbox({**mask, "counts": mask["counts"].encode()}).astype(int).tolist()
    top, left, more = generator.integers(-1, 2, 3).tolist()
    return rle(min(y + top, SIZE - 4), min(x + left, SIZE - 4), height + more, width)


def test_a_missing_backend_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    coco, _ = scene(3, images=1)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"faster-coco-eval .*solov2\[fast\]"):
        CocoEvaluator(coco, CATEGORY_IDS, boundary=True)
