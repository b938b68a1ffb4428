"""Non-finite steps change nothing; they are counted, or end the run with an error that explains them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.tiny_runs import flat_plan, random_batch, tiny_config

from solov2.build import build_criterion, construct
from solov2.checkpoint import load_file
from solov2.compute import Compute
from solov2.training.epochs import train_one_epoch
from solov2.training.guard import (
    DELAY,
    FAILED,
    MAX_OVERFLOWS,
    OVERFLOWED,
    NonFiniteError,
    NonFiniteGuard,
    first_nonfinite,
    stuck_mask_loss,
)
from solov2.training.optim import build_optimizer
from solov2.training.step import take_step, update_weights

CPU = torch.device("cpu")
COMPUTE = Compute(CPU)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parts(kind="adamw"):
    config = tiny_config()
    torch.manual_seed(0)
    model = construct(config.model, list("abcd")).train()
    optimizer = build_optimizer(model, name=kind, learning_rate=1e-3, momentum=0.9, weight_decay=1e-4, decay_norms=True)
    return config, model, build_criterion(config.model), optimizer


def broken(batch):
    """A batch whose pixels become NaN on the way into the network."""
    return {**batch, "pixels": torch.full_like(batch["pixels"], float("nan"), dtype=torch.float32)}


def train(tmp_path, batches, *, skip, kind="adamw"):
    config, model, criterion, optimizer = parts(kind)
    guard = NonFiniteGuard(tmp_path, skip=skip, file_name=lambda image_id: f"image{image_id}.jpg")
    plan = flat_plan(len(batches), 1e-3, log_every=100, clip_norm=35.0)
    steps = train_one_epoch(model, criterion, batches, optimizer, COMPUTE.scaler(), COMPUTE, plan, guard, epoch=0)
    return model, guard, list(steps)


def test_an_optimizer_that_cannot_skip_a_step_is_refused():
    _, model, _, _ = parts("sgd")
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SGD .*fused=True"):
        update_weights(plain, torch.amp.GradScaler("cpu", enabled=False), clip_norm=0.0)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_failed_step_changes_nothing(kind):
    config, model, criterion, optimizer = parts(kind)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = random_batch(config, seed=0)
    take_step(model, criterion, [batch], optimizer, scaler, COMPUTE, clip_norm=35.0)
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    losses, status = take_step(model, criterion, [broken(batch)], optimizer, scaler, COMPUTE, clip_norm=35.0)
    assert status.item() == FAILED and not any(loss.isfinite() for loss in losses.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for key, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert value is None or torch.equal(value, moments[key][name]), name
    _, status = take_step(model, criterion, [batch], optimizer, scaler, COMPUTE, clip_norm=35.0)
    assert not status.item() and any(not torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_update_clips_and_steps_like_torch(clip_norm):
    _, model, _, optimizer = parts("sgd")
    other = copy.deepcopy(model)
    plain = torch.optim.SGD(other.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        for one, two in zip(model.parameters(), other.parameters()):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        norm = update_weights(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_norm=clip_norm)
        expected = torch.nn.utils.clip_grad_norm_(other.parameters(), clip_norm or 1e9)
        plain.step()
        assert norm == pytest.approx(expected.item()) and all(p.grad is None for p in model.parameters())
    for one, two in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_a_failed_step_names_its_images_and_saves_its_batches(tmp_path):
    config = tiny_config()
    batches = [random_batch(config, seed=seed) for seed in range(DELAY + 4)]
    batches[2] = {**broken(batches[2]), "image_ids": [7, 9]}
    with pytest.raises(NonFiniteError, match=r"step 3 .*image7.jpg, image9.jpg: the output of backbone"):
        train(tmp_path, batches, skip=False)
    saved = load_file(tmp_path / "nonfinite_step_3_process_0.pth")
    assert saved["step"] == 2 and saved["batches"][0]["image_ids"] == [7, 9]
    assert set(saved["batches"][0]["targets"]) >= {"category", "positives", "masks"}


def test_too_many_overflows_in_a_row_are_a_failure(tmp_path):
    """In fp16 a smaller loss scale cures one overflow, but not NaN gradients in every step."""
    guard = NonFiniteGuard(tmp_path)
    for step in range(2 * MAX_OVERFLOWS):
        guard.watch(step, torch.tensor(OVERFLOWED if step % MAX_OVERFLOWS else 0), [])
    assert guard.failure(now=True) is None
    guard.watch(64, torch.tensor(OVERFLOWED), [{"image_ids": [7]}])
    assert guard.failure(now=True) == (64, [{"image_ids": [7]}])


def test_fp16_overflow_differs_from_failure():
    config, model, criterion, optimizer = parts("sgd")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, enabled=True)
    batch = random_batch(config, seed=0)
    for parameter in model.parameters():  # float32 gradients of a huge loss: infinite once scaled
        parameter.register_hook(lambda gradient: gradient * 2.0**100)
    _, status = take_step(model, criterion, [batch], optimizer, scaler, COMPUTE, clip_norm=35.0)
    assert status.item() == OVERFLOWED
    _, status = take_step(model, criterion, [broken(batch)], optimizer, scaler, COMPUTE, clip_norm=35.0)
    assert status.item() == FAILED


def test_skipped_steps_are_counted_and_change_nothing(tmp_path):
    config = tiny_config()
    good = [random_batch(config, seed=seed) for seed in range(4)]
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    # Both runs take the same good steps.
    model, guard, steps = train(tmp_path / "with", [*good[:2], broken(good[0]), *good[2:]], skip=True, kind="sgd")
    other, *_ = train(tmp_path / "without", good, skip=True, kind="sgd")
    assert guard.skipped == 1
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(one, two) or "num_batches" in name, name
    assert 0 < steps[-1].figures["loss"] < 100


def test_the_first_non_finite_tensor_is_named():
    config, model, criterion, _ = parts()
    batch = random_batch(config, seed=0)
    images = model.normalize(batch["pixels"], batch["sizes"])

    def forward():
        return criterion(model(images), batch["targets"])

    assert "finite when repeated" in first_nonfinite(model, forward)
    assert first_nonfinite(model, lambda: {"loss_mask": torch.tensor(float("inf"))}) == "loss_mask is inf"
    weight = model.fpn.lateral[0].weight
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    assert "gradient of fpn.lateral.0.weight" in first_nonfinite(model, forward)
    hook.remove()
    handle = model.fpn.output[1].register_forward_hook(lambda _m, _i, output: output * float("inf"))
    assert "output of fpn.output.1" in first_nonfinite(model, forward)
    handle.remove()
    with torch.no_grad():
        weight[0] = float("nan")
    assert first_nonfinite(model, forward) == "fpn.lateral.0.weight is not finite"


@pytest.mark.parametrize(("loss", "weight", "stuck"), [(2.95, 3.0, True), (2.6, 3.0, False), (0.99, 1.0, True)])
def test_a_stuck_mask_loss_is_a_warning(loss, weight, stuck):
    assert (stuck_mask_loss(loss, weight) is not None) == stuck
