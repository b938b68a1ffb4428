"""Training steps of whole networks: losses, gradients and updated weights follow the reference, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from parity import GRIDS, instances, load, mmdet_name, network_input, reference_model

from solov2.losses import SOLOv2Criterion
from solov2.models.solov2 import SOLOv2
from solov2.targets import TargetAssigner
from solov2.training.optim import build_optimizer

TRAJECTORIES = load("trajectories.json.gz")


def start(stored: dict[str, Any], dtype: torch.dtype) -> SOLOv2:
    """The network before the first step, in training mode."""
    config = stored["config"]
    return reference_model(config, load("forward.json.gz")[config]["overrides"]).to(dtype).train()


def forward(model: SOLOv2, stored: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Losses of the stored batch."""
    images = network_input(**stored["input"]).to(next(model.parameters()).dtype)
    assign = TargetAssigner(GRIDS, stored["scale_ranges"], num_classes=80)
    targets = assign([instances(image) for image in stored["images"]], tuple(images.shape[-2:]))
    return SOLOv2Criterion(num_classes=80)(model(images), targets)


def train(
    model: SOLOv2, stored: dict[str, Any]
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]]:
    """(losses, gradient norm before clipping, gradients before clipping) of one step after the other."""
    recipe = stored["optimizer"]
    assert recipe["type"] == "SGD"
    optimizer = build_optimizer(
        model,
        name="sgd",
        learning_rate=recipe["lr"],
        momentum=recipe["momentum"],
        weight_decay=recipe["weight_decay"],
        decay_norms=True,
    )
    while True:
        optimizer.zero_grad()
        losses = forward(model, stored)
        sum(losses.values()).backward()
        gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])
        optimizer.step()
        yield losses, norm, gradients


def assert_losses(losses: dict[str, torch.Tensor], step: dict[str, float], tolerance: float) -> None:
    assert losses["loss_mask"].item() == pytest.approx(step["loss_mask"], rel=tolerance)
    assert losses["loss_category"].item() == pytest.approx(step["loss_cls"], rel=tolerance)


def assert_gradients(
    model: SOLOv2, gradients: dict[str, torch.Tensor], stored: dict[str, Any], tolerance: float
) -> None:
    """Every trainable parameter has the reference's gradient norm, every frozen one no gradient."""
    norms = {mmdet_name(name): gradient.double().norm().item() for name, gradient in gradients.items()}
    assert norms == pytest.approx(stored["grad_l2_first_step"], rel=tolerance)
    assert len(norms) == stored["trainable"]
    names = {mmdet_name(name) for name, _ in model.named_parameters()}
    assert names - norms.keys() == set(stored["frozen"])


def test_first_steps() -> None:
    """Two steps of light R18 in float32 and the forward pass of the third, which sees the momentum of the second."""
    stored = TRAJECTORIES["trajectory"]
    model = start(stored, torch.float32)
    for step, (losses, norm, gradients) in zip(stored["steps"][:2], train(model, stored)):
        assert_losses(losses, step, 3e-5)
        assert norm.item() == pytest.approx(step["grad_norm_before_clip"], rel=1e-4)
        assert norm > stored["optimizer"]["clip_norm"]
        if step is stored["steps"][0]:
            assert_gradients(model, gradients, stored, 1e-3)
    with torch.no_grad():
        assert_losses(forward(model, stored), stored["steps"][2], 3e-5)


# The reference's own float32 run lies within 3e-5 (losses, gradient norms) and 5e-8 (weights) of its float64 run;
# gradient norms of another float32 run within 5e-5.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance", "norm_tolerance", "weight_tolerance"),
    [(torch.float64, 1e-8, 1e-8, 1e-10), (torch.float32, 3e-5, 1e-4, 5e-8)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_step(
    name: str, dtype: torch.dtype, tolerance: float, norm_tolerance: float, weight_tolerance: float
) -> None:
    stored = TRAJECTORIES[name]
    model = start(stored, dtype)
    before = {mmdet_name(key): value.clone() for key, value in model.state_dict().items()}
    for number, (step, (losses, norm, gradients)) in enumerate(zip(stored["steps"], train(model, stored))):
        assert_losses(losses, step, tolerance)
        assert norm.item() == pytest.approx(step["grad_norm_before_clip"], rel=norm_tolerance)
        if number == 0:
            assert_gradients(model, gradients, stored, 1e-8 if dtype == torch.float64 else 1e-3)
    after = {mmdet_name(key): value for key, value in model.state_dict().items()}
    for key, norm in stored["l2_after"].items():
        assert after[key].double().norm().item() == pytest.approx(norm, rel=weight_tolerance)
        if dtype == torch.float64:
            update = (after[key] - before[key]).norm().item()
            assert update == pytest.approx(stored["update_l2"][key], rel=1e-7)
    for key, norm in stored["unchanged"].items():
        assert torch.equal(after[key], before[key])
        assert after[key].double().norm().item() == pytest.approx(norm, rel=1e-6)
