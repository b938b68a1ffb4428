"""The oracle: post-processing returns what it encodes, and every loss has a known cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO

from solov2.evaluation.coco import CocoEvaluator
from solov2.evaluation.oracle import oracle_raw
from solov2.models.postprocess import postprocess
from solov2.ops.masks import encode_rle, segmentations_to_masks
from solov2.ops.resize import padded_size, resize_masks, resized_size
from solov2.settings import PostprocessSettings
from solov2.targets import TargetAssigner

GRIDS = (40, 36, 24, 16, 12)
RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
NUM_CLASSES = 3
PADDED = (256, 320)


def ellipses(count: int, seed: int) -> dict[str, torch.Tensor]:
    """One image's instances: upright ellipses that may overlap, each with its tight box."""
    generator = torch.Generator().manual_seed(seed)
    radius = torch.randint(10, 40, (count, 2), generator=generator)
    center = torch.stack([torch.randint(42, side - 42, (count,), generator=generator) for side in (250, 310)], 1)
    y, x = torch.meshgrid(torch.arange(250), torch.arange(310), indexing="ij")
    offsets = (torch.stack([y, x]) - center[:, :, None, None]) / radius[:, :, None, None]
    boxes = torch.cat([(center - radius).flip(1), (center + radius).flip(1) + 1], 1).float()
    labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
    return {"boxes": boxes, "labels": labels, "masks": (offsets.square().sum(1) <= 1).to(torch.uint8)}


def targets_of(instances: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return TargetAssigner(GRIDS, RANGES, num_classes=NUM_CLASSES)(instances, PADDED)


def oracle(targets: dict[str, Any], batch_size: int) -> dict[str, Any]:
    return oracle_raw(targets, batch_size=batch_size, grid_sizes=GRIDS, num_classes=NUM_CLASSES)


def results_of(raw: dict[str, Any], batch_size: int) -> list[dict[str, Any]]:
    sizes = [(250, 310)] * batch_size
    return postprocess(raw, sizes, sizes, PostprocessSettings())


def match(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """IoU [N, M] of masks [N,H,W] and [M,H,W]."""
    found, truth = found.flatten(1).float(), truth.flatten(1).float()
    shared = found @ truth.T
    return shared / (found.sum(1)[:, None] + truth.sum(1) - shared)


def test_every_instance_comes_back_once() -> None:
    instances = [ellipses(4, seed=1), ellipses(6, seed=2), ellipses(1, seed=3)]
    raw = oracle(targets_of(instances), 3)
    assert raw["mask_features"].shape == (3, 6, 64, 80)
    assert [tuple(level.shape) for level in raw["kernels"]] == [(3, 6, size, size) for size in GRIDS]
    for truth, result in zip(instances, results_of(raw, 3), strict=True):
        iou = match(result["masks"], truth["masks"])
        assert len(result["scores"]) == len(truth["labels"])
        assert iou.amax(1).min() > 0.8  # what stride 4 costs on the smallest ones
        partner = iou.argmax(1)
        assert sorted(partner.tolist()) == list(range(len(truth["labels"])))
        assert torch.equal(result["labels"], truth["labels"][partner])


def test_masks_are_the_targets() -> None:
    instances = [ellipses(5, seed=4)]
    targets = targets_of(instances)
    raw = oracle(targets, 1)
    kernels = torch.cat([level.flatten(2) for level in raw["kernels"]], 2)[0]  # [E, cells]
    used = kernels.any(0).nonzero()[:, 0]
    masks = torch.einsum("en,ehw->nhw", kernels[:, used], raw["mask_features"][0]).sigmoid()
    expected = targets["masks"].float()
    assert len(used) == 5
    assert torch.allclose(masks[kernels[:, used].argmax(0).argsort()], expected, atol=1e-6)
    hot = torch.cat([level.flatten(2) for level in raw["category_logits"]], 2)[0].T.sigmoid() > 0.5  # [cells, C]
    assert torch.equal(hot.any(1).nonzero()[:, 0], used)
    assert torch.equal(hot[used].int().argmax(1), targets["category"][0, used])


def test_each_instance_uses_its_own_cell_on_the_finest_level() -> None:
    """Instance 1 overwrites cells of instance 0; both lie on two levels."""
    positives = torch.tensor([[0, 5, 0], [0, 6, 0], [0, 6, 1], [0, 7, 1], [0, 20, 0], [0, 20, 1]])
    category = torch.full((1, 25), 2)
    category[0, 5], category[0, [6, 7, 20]] = 0, 1
    targets = {"category": category, "positives": positives, "masks": torch.ones(2, 4, 4, dtype=torch.uint8)}
    raw = oracle_raw(targets, batch_size=1, grid_sizes=(4, 3), num_classes=2)
    hot = torch.cat([level.flatten(2) for level in raw["category_logits"]], 2)[0] > 0  # [C, cells]
    assert hot.nonzero().tolist() == [[0, 5], [1, 6]]


def test_an_instance_without_a_cell_of_its_own_is_lost() -> None:
    first = ellipses(1, seed=5)
    twice = {key: torch.cat([value, value]) for key, value in first.items()}
    twice["labels"] = torch.tensor([0, 1])
    (result,) = results_of(oracle(targets_of([twice]), 1), 1)
    assert result["labels"].tolist() == [1]


def test_neighboring_cells_of_one_class_survive() -> None:
    """Points NMS keeps ties: equal logits in neighboring cells are two instances."""
    category = torch.full((1, 16), 1)
    category[0, [5, 6, 9]] = 0
    masks = torch.zeros(3, 16, 16, dtype=torch.uint8)
    masks[0, :4, :4], masks[1, :4, 8:12], masks[2, 8:12, :4] = 1, 1, 1
    targets = {"category": category, "positives": torch.tensor([[0, 5, 0], [0, 6, 1], [0, 9, 2]]), "masks": masks}
    raw = oracle_raw(targets, batch_size=1, grid_sizes=(4,), num_classes=1)
    (result,) = postprocess(raw, [(64, 64)], [(64, 64)], PostprocessSettings(area_thresholds=(8,)))
    assert len(result["scores"]) == 3
    assert result["scores"].min() == pytest.approx(1.0)


def test_batches_without_instances() -> None:
    empty = {key: value[:0] for key, value in ellipses(1, seed=0).items()}
    for instances in ([empty, empty], [empty, ellipses(2, seed=6)]):
        raw = oracle(targets_of(instances), 2)
        results = results_of(raw, 2)
        assert [len(result["scores"]) for result in results] == [len(truth["labels"]) for truth in instances]


def test_ap_depends_on_the_instance_size() -> None:
    """Stride 4 costs little AP for ellipses of 20 to 80 pixels, and much for the same ones at a quarter of the size."""
    figures = []
    for shrink in (1, 4):
        instances = [ellipses(3, seed=seed) for seed in range(20, 26)]
        for truth in instances:
            truth["masks"] = truth["masks"][:, ::shrink, ::shrink]
            truth["boxes"] = truth["boxes"] / shrink
        size = tuple(instances[0]["masks"].shape[1:])
        raw = oracle(targets_of(instances), len(instances))
        results = postprocess(raw, [size] * 6, [size] * 6, PostprocessSettings())
        evaluator = CocoEvaluator(_as_coco(instances), [1, 2, 3])
        evaluator.update(range(1, 7), results)
        figures.append(evaluator.summarize()["segm"]["AP"])
    assert figures[0] > 0.8
    assert figures[1] < figures[0] - 0.1


def _as_coco(instances: list[dict[str, torch.Tensor]]) -> COCO:
    rows = [
        (image, label, rle)
        for image, truth in enumerate(instances, 1)
        for label, rle in zip(truth["labels"].tolist(), encode_rle(truth["masks"]), strict=True)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image, "height": 250, "width": 310} for image in range(1, len(instances) + 1)],
        "categories": [{"id": id, "name": str(id)} for id in (1, 2, 3)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": label + 1, "segmentation": rle, "iscrowd": 0}
            for number, (image, label, rle) in enumerate(rows, 1)
        ],
    }
    coco.createIndex()
    return coco


def test_targets_must_fit_the_grids() -> None:
    targets = targets_of([ellipses(1, seed=7)])
    with pytest.raises(ValueError, match="category has shape .*grid_sizes"):
        oracle_raw(targets, batch_size=1, grid_sizes=(40, 36), num_classes=NUM_CLASSES)


@pytest.fixture
def photo_annotations(coco_photos: Path) -> COCO:
    return COCO(str(coco_photos / "annotations/instances_val2017.json"))


def test_bound_on_photographs_at_the_published_input_size(photo_annotations: COCO) -> None:
    """Real polygons through targets, post-processing and evaluation: large objects lose little, small ones much."""
    category_ids = sorted(photo_annotations.cats)
    assign = TargetAssigner(GRIDS, RANGES, num_classes=len(category_ids))
    image_ids = sorted(photo_annotations.imgs)[:8]
    evaluator = CocoEvaluator(photo_annotations, category_ids, image_ids=image_ids)
    for image_id in image_ids:
        image = photo_annotations.imgs[image_id]
        annotations = [entry for entry in photo_annotations.imgToAnns[image_id] if not entry["iscrowd"]]
        size = (image["height"], image["width"])
        resized = resized_size(size, long=1333, short=800)
        boxes = torch.tensor([entry["bbox"] for entry in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = {
            "boxes": boxes * torch.tensor([resized[1] / size[1], resized[0] / size[0]] * 2),
            "labels": torch.tensor([category_ids.index(entry["category_id"]) for entry in annotations]).long(),
            "masks": resize_masks(segmentations_to_masks([e["segmentation"] for e in annotations], size)[0], resized),
        }
        targets = assign([instances], padded_size(resized))
        raw = oracle_raw(targets, batch_size=1, grid_sizes=GRIDS, num_classes=len(category_ids))
        evaluator.update([image_id], postprocess(raw, [resized], [size], PostprocessSettings(), mask_format="rle"))
    figures = evaluator.summarize()["segm"]
    assert figures["AP_large"] > 0.97
    assert 0.75 < figures["AP"] < 0.97
    assert figures["AP_small"] < figures["AP_medium"] < figures["AP_large"]
