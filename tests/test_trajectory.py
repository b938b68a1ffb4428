"""Training steps of complete models: losses, gradients and updated weights match the reference in every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.parity import mmdet_name
from helpers.training_parity import TRAJECTORIES, start_of_trajectory, trajectory_losses, trajectory_steps

from solov2.models.solov2 import SOLOv2


def assert_losses(losses: dict[str, torch.Tensor], step: dict[str, float], tolerance: float) -> None:
    assert losses["loss_mask"].item() == pytest.approx(step["loss_mask"], rel=tolerance)
    assert losses["loss_category"].item() == pytest.approx(step["loss_cls"], rel=tolerance)


def assert_gradients(
    model: SOLOv2, gradients: dict[str, torch.Tensor], stored: dict[str, Any], tolerance: float
) -> None:
    """Every trainable parameter has the gradient norm of the reference; no frozen one has a gradient."""
    norms = {mmdet_name(name): gradient.double().norm().item() for name, gradient in gradients.items()}
    assert norms == pytest.approx(stored["grad_l2_first_step"], rel=tolerance)
    assert len(norms) == stored["trainable"]
    names = {mmdet_name(name) for name, _ in model.named_parameters()}
    assert names - norms.keys() == set(stored["frozen"])


def test_first_steps() -> None:
    """Two steps of light R18 in float32, and the losses of the third, which depend on the momentum of the second."""
    stored = TRAJECTORIES["trajectory"]
    model = start_of_trajectory(stored, torch.float32)
    for step, (losses, norm, gradients) in zip(stored["steps"][:2], trajectory_steps(model, stored)):
        assert_losses(losses, step, 3e-5)
        assert norm.item() == pytest.approx(step["grad_norm_before_clip"], rel=1e-4)
        assert norm > stored["optimizer"]["clip_norm"]
        if step is stored["steps"][0]:
            assert_gradients(model, gradients, stored, 1e-3)
    with torch.no_grad():
        assert_losses(trajectory_losses(model, stored), stored["steps"][2], 3e-5)


# The reference's float32 run is within 3e-5 (losses, gradient norms) and 5e-8 (weights) of its float64 run, and the
# gradient norms of another float32 run are within 5e-5.
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
    model = start_of_trajectory(stored, dtype)
    before = {mmdet_name(key): value.clone() for key, value in model.state_dict().items()}
    for number, (step, (losses, norm, gradients)) in enumerate(zip(stored["steps"], trajectory_steps(model, stored))):
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
