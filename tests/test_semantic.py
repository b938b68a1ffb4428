"""The semantic head and its loss: the reference's numbers, sizes, initial weights, and how batches are counted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shared_folder
from helpers.parity import DATA, FORWARD, load, mmdet_name, mmdet_weights, network_input, reference_model
from helpers.tiny_models import tiny_model, tiny_targets
from torch import Tensor, nn

from solov2.benchmarking.flops import count_flops
from solov2.losses import SOLOv2Criterion
from solov2.models.semantic import SemanticHead

STORED = load("panoptic/semantic.json.gz")
ARRAYS = load("panoptic/semantic_head.npz")
MODEL_ARRAYS = load("panoptic/semantic_model.npz")
CASES = {case["name"]: case for case in STORED["head"]["cases"]}
SEED = STORED["head"]["seed"]


def load_reference(head: SemanticHead, overrides: Mapping[str, Any]) -> None:
    """Give a head the reference's weights."""
    names = {name: mmdet_name(f"semantic_head.{name}") for name in head.state_dict()}
    shapes = {theirs: tuple(head.state_dict()[ours].shape) for ours, theirs in names.items()}
    state = mmdet_weights(shapes, overrides, SEED)
    head.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})


def reference_head(case: Mapping[str, Any], dtype: torch.dtype) -> tuple[SemanticHead, list[Tensor]]:
    """A head with the reference's weights, and P2..P5."""
    head = SemanticHead(case["channels"], case["inner"], case["stuff"])
    load_reference(head, {})
    pyramid = [network_input(tag, shape, seed=SEED) for tag, shape in zip(case["tags"], case["shapes"], strict=True)]
    return head.to(dtype), [level.to(dtype).requires_grad_() for level in pyramid]


def losses_of(logits: Tensor, labels: Tensor, **settings: Any) -> dict[str, Tensor]:
    """Losses of a batch without instances."""
    empty = torch.zeros(len(logits), 4, 1, 1, dtype=logits.dtype)
    raw = {
        "category_logits": [empty],
        "kernels": [empty[:, :1]],
        "mask_features": logits[:, :1],
        "semantic_logits": logits,
    }
    targets = {
        "category": torch.full((len(logits), 1), 4),
        "positives": torch.zeros(0, 3, dtype=torch.int64),
        "masks": torch.zeros(0, *logits.shape[2:], dtype=torch.uint8),
        "semantic": labels,
    }
    return SOLOv2Criterion(num_classes=4, **settings.pop("weights", {}))(raw, targets, **settings)


def assert_sampled(found: Tensor, arrays: Mapping[str, np.ndarray], name: str, tolerance: float) -> None:
    sampled = found.detach().flatten()[:: int(arrays[f"{name}.stride"])].double()
    torch.testing.assert_close(sampled, torch.from_numpy(arrays[f"{name}.values"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_the_references(name: str) -> None:
    case = CASES[name]
    head, pyramid = reference_head(case, torch.float64)
    logits = head(pyramid)
    assert_sampled(logits, ARRAYS, f"{name}.logits", 1e-9)
    loss = losses_of(logits, torch.from_numpy(ARRAYS[f"{name}.target"]))["loss_semantic"]
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(case["loss_semantic"], rel=1e-9, abs=0)
    loss.backward()
    for number, (level, norm) in enumerate(zip(pyramid, case["grad_inputs"], strict=True), 2):
        assert_sampled(level.grad, ARRAYS, f"{name}.grad_P{number}", 1e-9)
        assert level.grad.norm().item() == pytest.approx(norm, rel=1e-9, abs=0)
    norms = {mmdet_name(f"semantic_head.{key}"): value.grad.norm().item() for key, value in head.named_parameters()}
    assert norms == pytest.approx(case["grad_parameters"], rel=1e-9, abs=0)


@pytest.mark.parametrize("name", CASES)
def test_float32_logits(name: str) -> None:
    head, pyramid = reference_head(CASES[name], torch.float32)
    assert_sampled(head(pyramid), ARRAYS, f"{name}.logits", 4e-6)


def test_whole_network_is_the_references() -> None:
    """R50-FPN with a semantic head: logits, label maps, merged maps and segments at the original sizes."""
    stored, forward = STORED["model"], FORWARD["solov2_r50"]
    model = reference_model("solov2_r50", forward["overrides"])
    model.semantic_head = SemanticHead(256, 128, 53)
    load_reference(model.semantic_head, stored["semantic_overrides"])
    assert sum(parameter.numel() for parameter in model.parameters()) == stored["parameters"] == 48_223_686
    assert len(model.state_dict()) == stored["entries"] == 409
    with torch.no_grad():
        raw = model.double()(network_input(**forward["input"]).double())
    logits = raw["semantic_logits"]
    assert_sampled(logits, MODEL_ARRAYS, "semantic_logits", 1e-9)
    for i, (meta, own) in enumerate(zip(stored["metas"], logits, strict=True)):
        height, width = meta["img_shape"]
        padded = F.interpolate(own[None], scale_factor=4, mode="bilinear")[..., :height, :width]
        labels = F.interpolate(padded, size=meta["ori_shape"], mode="bilinear")[0].argmax(0)
        assert np.array_equal(labels.numpy(), MODEL_ARRAYS[f"semantic_{i}"])
    wanted = stored["images"]
    sizes, original_sizes = ([meta[key] for meta in stored["metas"]] for key in ("img_shape", "ori_shape"))
    assert {image["stuff_area_limit"] for image in wanted} == {300}
    results = model.postprocess_panoptic(
        raw,
        sizes,
        original_sizes,
        panoptic_score_threshold=wanted[0]["score_threshold"],
        panoptic_overlap_threshold=wanted[0]["overlap_threshold"],
        stuff_area_limit=300,
    )
    for i, (image, result) in enumerate(zip(wanted, results, strict=True)):
        assert len(result["scores"]) == image["instances"]
        assert np.array_equal(result["panoptic_map"].numpy(), MODEL_ARRAYS[f"panoptic_{i}"])
        names = {"id": "id", "isthing": "is_thing", "label": "label", "area": "area"}
        found = [{theirs: segment[ours] for theirs, ours in names.items()} for segment in result["segments"]]
        assert found == image["segments"]


def test_stored_numbers_match_the_golden_files() -> None:
    golden = shared_folder("panoptic") / "golden" / "semantic"
    assert STORED["head"] == json.loads((golden / "semantic_head.json").read_text())
    assert STORED["model"] == json.loads((golden / "model.json").read_text())
    for stored, original in (("semantic_head", "semantic_head"), ("semantic_model", "model")):
        assert (DATA / "panoptic" / f"{stored}.npz").read_bytes() == (golden / f"{original}.npz").read_bytes()


def test_size_of_the_head() -> None:
    """1,630,774 parameters in 23 entries; 29.3 GMAC for an image of 800 x 1216."""
    with torch.device("meta"):
        head = SemanticHead(256, 128, 53)
        pyramid = [torch.zeros(1, 256, 800 // stride, 1216 // stride) for stride in (4, 8, 16, 32)]
        flops = count_flops(lambda: head(pyramid)).total()
    assert sum(parameter.numel() for parameter in head.parameters()) == 1_630_774 and len(head.state_dict()) == 23
    assert flops / 2e9 == pytest.approx(29.3, abs=0.05)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    head = SemanticHead(256, 128, 53)
    for module in head.levels.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
            assert module.bias is None
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == 32 and (module.weight == 1).all() and not module.bias.any()
    assert head.predictor.weight.std().item() == pytest.approx(0.01, rel=0.05) and not head.predictor.bias.any()
    with torch.no_grad():
        logits = head([torch.randn(1, 256, 32 // 2**i, 32 // 2**i) for i in range(4)])
    first = losses_of(logits, torch.randint(54, (1, 32, 32), dtype=torch.uint8))["loss_semantic"]
    assert first.item() == pytest.approx(0.5 * math.log(54), rel=0.02)


def test_norm_of_the_head() -> None:
    norms = {type(step.norm) for level in SemanticHead(8, 8, 2, norm="batch").levels for step in level}
    assert norms == {nn.BatchNorm2d}


def test_recomputed_activations_change_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        head, pyramid = reference_head(CASES["small"], torch.float64)
        head.recompute = recompute
        head(pyramid).square().sum().backward()
        gradients.append([level.grad for level in (*pyramid, *head.parameters())])
    assert all(map(torch.equal, *gradients))


# ---- loss


def test_loss_counts_labeled_pixels_of_the_whole_batch() -> None:
    """Sums and counts add up over images: it is not a mean of the images' means."""
    logits, labels = torch.randn(2, 6, 8, 12), torch.randint(6, (2, 8, 12), dtype=torch.uint8)
    labels[0, :6] = labels[1, 0, 0] = 255
    both = losses_of(logits, labels)["loss_semantic"]
    sums = [
        0.5 * F.cross_entropy(x[None], y[None].long(), ignore_index=255, reduction="sum")
        for x, y in zip(logits, labels)
    ]
    assert both.item() == pytest.approx(sum(sums).item() / (24 + 95))
    given = [losses_of(logits[i : i + 1], labels[i : i + 1], num_labeled=119)["loss_semantic"] for i in range(2)]
    assert sum(given).item() == pytest.approx(both.item())
    as_tensor = losses_of(logits, labels, num_labeled=torch.tensor(119))["loss_semantic"]
    assert torch.equal(as_tensor, both)
    assert losses_of(logits, labels, weights={"semantic_weight": 2.0})["loss_semantic"] == 4 * both


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_logits_is_float32(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(1, 5, 8, 8).to(dtype), torch.randint(5, (1, 8, 8), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=dtype):
        loss = losses_of(logits, labels)["loss_semantic"]
    assert loss.dtype == torch.float32 and torch.equal(loss, losses_of(logits.float(), labels)["loss_semantic"])


def test_void_gives_zero_with_zero_gradients() -> None:
    logits = torch.randn(1, 5, 8, 8, requires_grad=True)
    loss = losses_of(logits, torch.full((1, 8, 8), 255, dtype=torch.uint8))["loss_semantic"]
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_instance_targets_have_no_semantic_loss() -> None:
    model = tiny_model()
    raw = model(torch.randn(1, 3, 64, 96))
    assert raw.keys() == {"category_logits", "kernels", "mask_features"}
    assert not [name for name in model.state_dict() if name.startswith("semantic")]
    assert SOLOv2Criterion(num_classes=3)(raw, tiny_targets(model, [2], (64, 96))).keys() == {
        "loss_category",
        "loss_mask",
    }
