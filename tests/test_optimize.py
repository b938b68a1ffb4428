"""The optimized form for inference computes the same function as the plain model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.parity import (
    FORWARD,
    MODELS,
    assert_outputs,
    assert_same_instances,
    network_input,
    raw_tensors,
    reference_model,
    run_network,
)
from helpers.tiny_models import VARIANTS, lively, tiny_model
from torch import nn

from solov2.build import build_model
from solov2.models.optimize import fold_batch_norms, optimize_for_inference
from solov2.models.solov2 import SOLOv2
from solov2.models.winograd import WinogradConv2d


def scrambled(model: SOLOv2) -> SOLOv2:
    """Randomize the batch norms, so that a wrongly folded one shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return model


def outputs(model: SOLOv2, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return raw_tensors(model.eval()(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_norms_change_nothing(variant: str) -> None:
    model = scrambled(lively(tiny_model(variant))).double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    before = outputs(model, images)
    fold_batch_norms(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for plain, folded in zip(before, outputs(model, images), strict=True):
        assert (plain - folded).abs().max() <= 1e-10 * plain.std()


def test_optimized_model_gives_the_results_of_the_plain_one() -> None:
    """Wide enough for Winograd: raw outputs to float32 tolerance, the same instances, the model unchanged."""
    torch.manual_seed(0)
    model = scrambled(lively(build_model("solov2_light_r18_fpn_3x", grid_sizes=(16, 12, 9, 6, 4), num_classes=5)))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = model.optimize()
    assert sum(isinstance(module, WinogradConv2d) for module in fast.modules()) > 15
    assert not fast.training and not any(parameter.requires_grad for parameter in fast.parameters())
    images = torch.randn(2, 3, 96, 128)
    for plain, quick in zip(outputs(model, images), outputs(fast, images), strict=True):
        assert (plain - quick).abs().max() <= 1e-3 * plain.std()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    photo = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    (expected,), (result,) = (m.predict([photo]) for m in (model, fast))
    assert len(expected["scores"]) == len(result["scores"]) > 0
    differences = (expected["scores"] - result["scores"]).abs()
    # Rounding can move a pixel of a small mask across the threshold, which changes its score and order.
    assert differences.median() <= 1e-5 and differences.max() <= 1e-2


def test_bf16_keeps_the_pixel_statistics() -> None:
    model = tiny_model()
    fast = model.optimize(precision="bf16")
    assert fast.head.category_predictor.weight.dtype == torch.bfloat16 and fast.pixel_mean.dtype == torch.float32
    raw = fast(torch.randn(1, 3, 64, 64))
    assert raw["mask_features"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="bf16"):
        model.optimize(precision="fp16")


# Maximum difference of raw outputs, in standard deviations of their tensor, and of scores rank by rank. Folding and
# Winograd stay as close to the reference's float64 numbers as its own float32 run; bf16 keeps two or three digits.
RAW_TOLERANCES = {"float64": 1e-8, "float32": 3e-5, "bf16": 0.2}
SCORE_TOLERANCES = {"float64": 5e-8, "float32": 2e-4, "bf16": 0.05}


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ("solov2_light_r18", "float32"),
        *(
            pytest.param(config, precision, marks=pytest.mark.slow)
            for config in MODELS
            for precision in RAW_TOLERANCES
            if (config, precision) != ("solov2_light_r18", "float32")
        ),
    ],
)
def test_optimized_network_matches_the_reference(config: str, precision: str) -> None:
    """Raw outputs and final instances of the published networks with every optimization switched on."""
    stored = FORWARD[config]
    model = reference_model(config, stored["overrides"])
    if precision == "float64":  # not offered by `optimize`: folded and channels last, without Winograd
        model = optimize_for_inference(model.double(), dtype=torch.float64)
    else:
        model = model.optimize(precision=precision)
    images = network_input(**stored["input"])[:1]
    outputs, raw = run_network(model, images.double() if precision == "float64" else images)
    assert_outputs(config, outputs, RAW_TOLERANCES[precision])
    meta, expected = stored["predict"]["metas"][0], stored["predict"]["results"][0]
    (result,) = model.postprocess(raw, [meta["img_shape"]], [meta["ori_shape"]])
    tolerance = SCORE_TOLERANCES[precision]
    if precision == "bf16":  # order and masks change with the scores, and some scores cross the threshold
        own, theirs = result["scores"].numpy(), np.array(expected["scores"])
        both = min(len(own), len(theirs))
        assert abs(len(own) - len(theirs)) <= len(theirs) / 3  # random weights put many scores at the threshold
        assert np.abs(own[:both] - theirs[:both]).max() <= tolerance
    else:
        assert_same_instances(result, expected, score_tolerance=tolerance, pixels=int(precision == "float32"))
