"""Losses and gradients match the reference's; normalizers, empty images and half precision behave as documented."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.parity import BATCHES, criterion_of, raw_tensors, stored_batch

from solov2.losses import SOLOv2Criterion
from solov2.targets import TargetAssigner


def test_all_batches_are_present() -> None:
    assert len(BATCHES) == 12


# float64 agrees to 1e-14; for float32 the bounds are those within which the reference agrees with itself.
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-10, 1e-10), (torch.float32, 2e-7, 2e-6)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients(name: str, dtype: torch.dtype, loss_tolerance: float, gradient_tolerance: float) -> None:
    case = BATCHES[name]
    raw, targets = stored_batch(case, dtype)
    losses = criterion_of(case)(raw, targets)
    assert losses["loss_mask"].dtype == losses["loss_category"].dtype == dtype
    assert losses["loss_mask"].item() == pytest.approx(case["loss_mask"], rel=loss_tolerance)
    assert losses["loss_category"].item() == pytest.approx(case["loss_cls"], rel=loss_tolerance)
    sum(losses.values()).backward()
    assert_gradients(raw, case, gradient_tolerance)


def assert_gradients(raw: dict[str, Any], case: dict[str, Any], tolerance: float) -> None:
    """Values relative to the largest gradient of their kind, norms relative to themselves."""
    for level, stored in zip(raw["category_logits"], case["grad_cls"], strict=True):
        assert_sampled(level.grad, stored, tolerance)
    assert_sampled(raw["mask_features"].grad, case["grad_feat"], tolerance)
    stored = case["grad_kernel"]
    largest = max(level.grad.abs().max() for level in raw["kernels"])
    for level, image, cell, *values in stored["rows"]:
        gradient = raw["kernels"][level].grad[image].flatten(1)[:, cell].double()
        assert (gradient - torch.tensor(values, dtype=torch.float64)).abs().max() <= tolerance * largest
    for level, norm, count in zip(raw["kernels"], stored["l2"], stored["nonzero_cells"], strict=True):
        assert level.grad.double().norm().item() == pytest.approx(norm, rel=tolerance)
        assert level.grad.any(1).sum() == count


def assert_sampled(gradient: torch.Tensor, stored: dict[str, Any], tolerance: float) -> None:
    values = torch.tensor(stored["values"], dtype=torch.float64)
    assert (gradient.flatten()[:: stored["stride"]].double() - values).abs().max() <= tolerance * gradient.abs().max()
    assert gradient.double().norm().item() == pytest.approx(stored["l2"], rel=tolerance)


@pytest.mark.parametrize("name", [name for name, case in BATCHES.items() if case["num_pos"]])
def test_explicit_number_of_positives(name: str) -> None:
    """Dividing by the number of pairs gives the authors' mean over pairs; the category loss divides by one more."""
    case = BATCHES[name]
    raw, targets = stored_batch(case, torch.float64)
    own = criterion_of(case)(raw, targets)
    for count in (case["num_entries"], float(case["num_entries"]), torch.tensor(case["num_entries"])):
        given = criterion_of(case)(raw, targets, count)
        assert given["loss_mask"].item() == pytest.approx(case["loss_mask_mean_over_pairs"], rel=1e-8)
        ratio = (case["num_pos"] + 1) / (case["num_entries"] + 1)
        assert given["loss_category"].item() == pytest.approx(own["loss_category"].item() * ratio, rel=1e-6)


def test_weight_of_the_mask_loss() -> None:
    case = BATCHES["single"]
    raw, targets = stored_batch(case, torch.float64)
    losses = SOLOv2Criterion(num_classes=5, mask_weight=1.5)(raw, targets)
    assert losses["loss_mask"].item() == pytest.approx(case["loss_mask"] / 2)
    assert losses["loss_category"].item() == pytest.approx(case["loss_cls"])


@pytest.mark.parametrize("name", ["three_one_without_gt", "many_and_empty_mask", "gts_but_no_positive", "no_gt_at_all"])
def test_counts_on_the_host_are_optional(name: str) -> None:
    """positives_per_image and instances_per_image only avoid a synchronization with the device."""
    case = BATCHES[name]
    raw, targets = stored_batch(case, torch.float64)
    bare = {key: targets[key] for key in ("category", "positives", "masks")}
    assert criterion_of(case)(raw, bare) == criterion_of(case)(raw, targets)


@pytest.mark.parametrize("position", range(3))
def test_counts_on_the_host_are_optional_wherever_the_empty_image_is(position: int) -> None:
    raw, targets = random_batch([3 * (image != position) for image in range(3)])
    bare = {key: targets[key] for key in ("category", "positives", "masks")}
    assert SOLOv2Criterion(num_classes=3)(raw, bare) == SOLOv2Criterion(num_classes=3)(raw, targets)


def test_losses_of_images_combine_by_the_normalizers() -> None:
    """Sums over images add up: mask loss times positives, category loss times (positives + 1)."""
    counts = [3, 0, 5]
    raw, targets = random_batch(counts, torch.float64)
    loss = SOLOv2Criterion(num_classes=3)
    whole, positives = loss(raw, targets), (targets["category"] < 3).sum(1)
    parts = [loss(*one_image(raw, targets, image)) for image in range(len(counts))]
    mask_sum = sum(part["loss_mask"] * count for part, count in zip(parts, positives))
    category_sum = sum(part["loss_category"] * (count + 1) for part, count in zip(parts, positives))
    assert whole["loss_mask"].item() == pytest.approx(mask_sum.item() / positives.sum().item(), rel=1e-10)
    assert whole["loss_category"].item() == pytest.approx(category_sum.item() / (positives.sum().item() + 1), rel=1e-6)


def test_accumulated_batches_equal_the_large_batch() -> None:
    """Given the total number of positives, losses and gradients of the parts sum to those of the whole batch."""
    raw, targets = random_batch([4, 0, 2], torch.float64)
    loss = SOLOv2Criterion(num_classes=3)
    whole = torch.autograd.grad(sum(loss(raw, targets).values()), raw_tensors(raw))
    positives = (targets["category"] < 3).sum()
    parts = [sum(loss(*one_image(raw, targets, image), positives).values()) for image in range(3)]
    for one, other in zip(whole, torch.autograd.grad(sum(parts), raw_tensors(raw)), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("counts", "ranges"),
    [([0, 0], None), ([2, 3], [(500, 600)] * 3)],
    ids=["no instance", "no instance in the scale range of a level"],
)
def test_no_positive_cell(counts: list[int], ranges: list[tuple[float, float]] | None) -> None:
    """The mask loss is a zero connected to the graph; the category loss divides by 1."""
    raw, targets = random_batch(counts, ranges=ranges)
    assert len(targets["positives"]) == 0
    losses = SOLOv2Criterion(num_classes=3)(raw, targets)
    assert losses["loss_mask"].item() == 0 and losses["loss_category"] > 0
    sum(losses.values()).backward()
    for tensor in raw_tensors(raw):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
    assert not any(tensor.grad.any() for tensor in (*raw["kernels"], raw["mask_features"]))
    assert all(level.grad.any() for level in raw["category_logits"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    raw, targets = random_batch([3, 2])
    half = {
        key: [level.detach().to(dtype) for level in value] if isinstance(value, list) else value.detach().to(dtype)
        for key, value in raw.items()
    }
    wide = {
        key: [level.float() for level in value] if isinstance(value, list) else value.float()
        for key, value in half.items()
    }
    loss = SOLOv2Criterion(num_classes=3)
    assert loss(half, targets) == loss(wide, targets)
    for autocast_dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=autocast_dtype):
            losses = loss(half, targets)
        assert losses == loss(wide, targets)
        assert all(value.dtype == torch.float32 for value in losses.values())


def test_extreme_logits_stay_finite() -> None:
    raw, targets = random_batch([3, 2])
    for scale in (1e2, 1e4):
        scaled = {
            key: [level * scale for level in value] if isinstance(value, list) else value * scale
            for key, value in raw.items()
        }
        losses = SOLOv2Criterion(num_classes=3)(scaled, targets)
        gradients = torch.autograd.grad(sum(losses.values()), raw_tensors(raw))
        assert all(torch.isfinite(value).all() for value in (*losses.values(), *gradients))


def test_perfect_masks_cost_nothing() -> None:
    """Mask logits of +-40 with the sign of the target cost 0 except for the epsilon; inverted, the full weight."""
    raw, targets = random_batch([1])
    _, cell, _ = targets["positives"].T
    sign = targets["masks"][0].float() * 2 - 1
    features = torch.zeros(1, 4, *sign.shape)
    features[0, 0] = 40 * sign
    for value, wanted in ((1.0, 0.0), (-1.0, 3.0)):
        kernels = [torch.zeros(1, 4, size, size) for size in (8, 6, 4)]
        for level in kernels:
            level[:, 0] = value
        losses = SOLOv2Criterion(num_classes=3)(raw | {"kernels": kernels, "mask_features": features}, targets)
        assert losses["loss_mask"].item() == pytest.approx(
            wanted * len(cell) / (targets["category"] < 3).sum().item(), abs=1e-4
        )


def test_focal_settings() -> None:
    """gamma 0 and alpha 0.5 give half the binary cross entropy."""
    raw, targets = random_batch([3, 1], torch.float64)
    loss = SOLOv2Criterion(num_classes=3, focal_gamma=0.0, focal_alpha=0.5)(raw, targets)["loss_category"]
    logits = torch.cat([level.flatten(2) for level in raw["category_logits"]], 2).mT  # [B, cells, C]
    truth = torch.nn.functional.one_hot(targets["category"], 4)[..., :3].double()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    assert loss.item() == pytest.approx(0.5 * entropy.item() / ((targets["category"] < 3).sum().item() + 1), rel=1e-6)


def test_inputs_are_left_untouched() -> None:
    raw, targets = random_batch([3, 2])
    kept = [tensor.detach().clone() for tensor in raw_tensors(raw)]
    kept_targets = copy.deepcopy(targets)
    sum(SOLOv2Criterion(num_classes=3)(raw, targets).values()).backward()
    assert all(torch.equal(tensor, other) for tensor, other in zip(raw_tensors(raw), kept, strict=True))
    for key, value in kept_targets.items():
        assert torch.equal(targets[key], value) if isinstance(value, torch.Tensor) else targets[key] == value


def random_batch(
    instances_per_image: list[int], dtype: torch.dtype = torch.float32, ranges: list[tuple[float, float]] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(raw, targets) of rectangles in images of 64 x 96; three levels, three classes, kernels of four values."""
    generator, grids = torch.Generator().manual_seed(7), (8, 6, 4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    truths = []
    for count in instances_per_image:
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([60.0, 30.0])
        boxes = torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 25], 1).round()
        masks = torch.zeros(count, 64, 96, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
            mask[top:bottom, left:right] = 1
        truths.append({"boxes": boxes, "labels": torch.randint(0, 3, (count,), generator=generator), "masks": masks})
    targets = TargetAssigner(grids, ranges or [(1, 20), (10, 40), (20, 100)], num_classes=3)(truths, (64, 96))
    batch = len(instances_per_image)
    raw = {
        "category_logits": [normal(batch, 3, size, size) for size in grids],
        "kernels": [normal(batch, 4, size, size) for size in grids],
        "mask_features": normal(batch, 4, 16, 24),
    }
    return raw, targets


def one_image(raw: dict[str, Any], targets: dict[str, Any], image: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The part of a batch that belongs to one image."""
    pick = slice(image, image + 1)
    positives = targets["positives"].split(targets["positives_per_image"])[image].clone()
    first = sum(targets["instances_per_image"][:image])
    positives -= torch.tensor([image, 0, first])
    own = {
        "category": targets["category"][pick],
        "positives": positives,
        "masks": targets["masks"].split(targets["instances_per_image"])[image],
        "positives_per_image": targets["positives_per_image"][pick],
        "instances_per_image": targets["instances_per_image"][pick],
    }
    return {
        key: [level[pick] for level in value] if isinstance(value, list) else value[pick] for key, value in raw.items()
    }, own
