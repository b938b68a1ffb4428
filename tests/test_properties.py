"""Degenerate instances through transforms, collate, targets, loss and postprocess: no exception, no NaN, valid results.

Instances are any mixture of boxes without area, outside the image, of one pixel, overlapping or equal, larger than the
image, with empty masks; images may have none. Images and raw outputs add up to at least 2,000 cases.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="property tests need hypothesis: pip install -e '.[test]'")
from hypothesis import given, settings
from hypothesis import strategies as st

from solov2.data.loader import Collate
from solov2.data.transforms import EvalTransform, TrainTransform, seeded_generator
from solov2.losses import SOLOv2Criterion
from solov2.models.postprocess import postprocess
from solov2.ops.masks import encode_rle, masks_to_boxes
from solov2.settings import PostprocessSettings
from solov2.targets import TargetAssigner

GRIDS, CLASSES, KERNEL = (4, 3, 1), 3, 4
RANGES = ((1, 16), (8, 32), (24, 2048))
PADDED = (64, 64)
IMAGES = 4  # in a batch
EXAMPLES = {"targets": 250, "pipeline": 200, "loss": 150, "postprocess": 200}
CASES = IMAGES * (EXAMPLES["targets"] + EXAMPLES["loss"]) + EXAMPLES["pipeline"] + EXAMPLES["postprocess"]


def check(count: int):
    """Hypothesis settings: always the same examples, no time limit."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


KINDS = ("box", "line", "point", "equal", "pixel", "empty", "full", "other mask")
SEED = st.integers(0, 2**32 - 1)
SPECIAL = np.array([-100.0, 0.0, 1.0, 31.5, 32.0, 63.0, 64.0, 1e4])


@st.composite
def samples(draw: st.DrawFn) -> dict:
    """A sample (solov2/data/coco.py): hypothesis draws the kinds of instances, their numbers follow from a seed."""
    kinds, generator = draw(st.lists(st.sampled_from(KINDS), max_size=5)), np.random.RandomState(draw(SEED))
    height, width = generator.randint(1, 65, 2) if generator.rand() < 0.9 else (1, 1)
    boxes, masks = [], []
    for kind in kinds:
        values = np.where(generator.rand(4) < 0.3, generator.choice(SPECIAL, 4), generator.uniform(-40, 110, 4))
        (x1, x2), (y1, y2) = np.sort(values[:2]), np.sort(values[2:])
        box = {"line": [x1, y1, x1, y2], "point": [x1, y1, x1, y1]}.get(kind, [x1, y1, x2, y2])
        mask = np.zeros((height, width), dtype=np.uint8)
        if kind == "equal" and masks:
            box, mask = boxes[-1], masks[-1]
        elif kind == "pixel":
            row, column = generator.randint(height), generator.randint(width)
            mask[row, column], box = 1, [column, row, column + 1, row + 1]
        elif kind == "full":
            mask[:], box = 1, [0, 0, width, height]
        elif kind == "other mask":
            mask[:] = generator.rand(height, width) < 0.2
        elif kind != "empty":
            left, top, right, bottom = (int(np.clip(value, 0, 64)) for value in box)
            mask[top : bottom + 1, left : right + 1] = 1
        boxes.append(box)
        masks.append(mask)
    planes = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8)
    return {
        "image": torch.full((3, int(height), int(width)), 7, dtype=torch.uint8),
        "boxes": torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4),
        "labels": torch.from_numpy(generator.randint(0, CLASSES, len(kinds))).long(),
        "masks": planes,
        "image_id": 1,
        "original_size": (int(height), int(width)),
    }


BATCH = st.lists(samples(), min_size=IMAGES, max_size=IMAGES)


def assigner() -> TargetAssigner:
    return TargetAssigner(GRIDS, RANGES, num_classes=CLASSES)


def assert_targets(targets: dict, batch: list[dict], padded: tuple[int, int]) -> None:
    """Check what every consumer of targets relies on."""
    cells = sum(size * size for size in GRIDS)
    image, cell, instance = targets["positives"].unbind(1)
    labels = torch.cat([truth["labels"] for truth in batch])
    owner = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor([len(truth["labels"]) for truth in batch]))
    assert targets["category"].shape == (len(batch), cells) and targets["category"].dtype == torch.int64
    assert targets["masks"].shape == (len(labels), padded[0] // 4, padded[1] // 4)
    assert targets["masks"].dtype == torch.uint8 and targets["masks"].sum() == (targets["masks"] > 0).sum()
    assert ((cell >= 0) & (cell < cells)).all() and torch.equal(owner[instance], image)
    # A cell has a category exactly where an instance claims it, and it is one of theirs.
    claimed = torch.zeros(len(batch), cells, dtype=torch.bool)
    claimed[image, cell] = True
    assert torch.equal(claimed, targets["category"] < CLASSES)
    theirs = torch.zeros(len(batch), cells, CLASSES, dtype=torch.bool)
    theirs[image, cell, labels[instance]] = True
    assert theirs[claimed].gather(1, targets["category"][claimed][:, None]).all()
    assert targets["positives_per_image"] == torch.bincount(image, minlength=len(batch)).tolist()


@check(EXAMPLES["targets"])
@given(BATCH)
def test_targets(batch: list[dict]) -> None:
    assert_targets(assigner()(batch, PADDED), batch, PADDED)


@check(EXAMPLES["pipeline"])
@given(samples(), st.integers(8, 64), st.booleans(), st.integers(0, 99))
def test_transforms_and_collate(sample: dict, scale: int, dihedral: bool, seed: int) -> None:
    transform = TrainTransform(scales=[scale], max_size=64, dihedral=dihedral)
    training = transform(sample, seeded_generator(seed))
    again = transform(sample, seeded_generator(seed))
    for key in ("image", "boxes", "labels", "masks"):
        assert torch.equal(training[key], again[key])
    height, width = training["image"].shape[1:]
    assert max(height, width) <= 64 and training["masks"].shape[1:] == (height, width)
    boxes = training["boxes"]
    assert len(boxes) == len(training["labels"]) == len(training["masks"]) <= len(sample["labels"])
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    evaluation = EvalTransform(short=scale, long=64)(sample)
    batch = Collate(assigner())([training, evaluation])
    assert batch["pixels"].shape[2] % 32 == batch["pixels"].shape[3] % 32 == 0
    assert_targets(batch["targets"], [training, evaluation], tuple(batch["pixels"].shape[2:]))


def outputs(images: int, seed: int, gain: float) -> dict:
    """Raw outputs of a head with tiny grids, as leaf tensors; a large gain saturates every sigmoid.

    A negative gain makes every mask probability exactly 0: with an empty mask target, only its epsilon keeps the dice
    loss from dividing 0 by 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        values = torch.randn(images, *shape, generator=generator)
        return (gain * values if gain >= 0 else values.abs()).requires_grad_()

    return {
        "category_logits": [noise(CLASSES, size, size) for size in GRIDS],
        "kernels": [(min(gain, 1) * noise(KERNEL, size, size)).detach().requires_grad_() for size in GRIDS],
        "mask_features": noise(KERNEL, PADDED[0] // 4, PADDED[1] // 4),
    }


@check(EXAMPLES["loss"])
@given(BATCH, st.integers(0, 99), st.sampled_from([0.0, 1.0, 30.0, 1e4, -1e6]))
def test_loss(batch: list[dict], seed: int, gain: float) -> None:
    targets = assigner()(batch, PADDED)
    raw = outputs(len(batch), seed, gain)
    losses = SOLOv2Criterion(num_classes=CLASSES)(raw, targets)
    assert all(loss.isfinite() and loss >= 0 for loss in losses.values())
    (losses["loss_category"] + losses["loss_mask"]).backward()
    leaves = [*raw["category_logits"], *raw["kernels"], raw["mask_features"]]
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
    if not len(targets["positives"]):
        assert losses["loss_mask"] == 0


@check(EXAMPLES["postprocess"])
@given(
    st.integers(0, 999),
    st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from(["gaussian", "linear"]),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_postprocess(
    seed: int, gain: float, size: tuple[int, int], original_size: tuple[int, int], kernel: str, threshold: float
) -> None:
    raw = {
        key: [level.detach() for level in value] if isinstance(value, list) else value.detach()
        for key, value in outputs(1, seed, gain).items()
    }
    options = PostprocessSettings(area_thresholds=(0, 2, 8), category_threshold=threshold, nms_kernel=kernel)
    [result] = postprocess(raw, [size], [original_size], options)
    scores, boxes, masks = result["scores"], result["boxes"], result["masks"]
    assert masks.shape == (len(scores), *original_size) and masks.dtype == torch.bool
    assert len(scores) == len(boxes) == len(result["labels"]) <= options.max_instances
    assert ((scores >= options.score_threshold) & (scores <= 1)).all() and (scores[1:] <= scores[:-1]).all()
    assert torch.equal(boxes, masks_to_boxes(masks))
    [other] = postprocess(raw, [size], [original_size], options, mask_format="rle")
    assert other["masks"] == encode_rle(masks) and torch.equal(other["scores"], scores)


def test_there_are_enough_cases() -> None:
    assert CASES >= 2000
