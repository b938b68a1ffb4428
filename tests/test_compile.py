"""`torch.compile` turns forward pass and losses into one graph each, without breaks and with the same results."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.parity import raw_tensors
from helpers.tiny_models import VARIANTS, lively, tiny_model, tiny_targets
from helpers.tiny_runs import random_batch, tiny_config
from torch import Tensor, nn

from solov2.build import build_compute, build_criterion, build_model, construct, prepare_for_training
from solov2.errors import InputError
from solov2.losses import SOLOv2Criterion
from solov2.models.solov2 import SOLOv2
from solov2.models.winograd import WinogradConv2d, compiled_convolve
from solov2.training.guard import first_nonfinite
from solov2.training.optim import WeightAverage
from solov2.training.step import backward, repeat_forward

SIZE = (64, 96)
# Both kinds of norm, with and without deformable convolutions; the full networks are among the slow tests.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "light, group norm": ("basic blocks", {"backbone": "resnet10"}),
    "batch norm, deformable": (
        "nothing frozen, batch norm",
        {"deformable_tower_convs": 1, "deformable_mask_branch": True},
    ),
}


# torch 2.11 compiles P6 again for P5 of an odd height or width.
MAX_GRAPHS = 1 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14) else 4


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Graphs compiled by other tests count towards torch's limit per function."""
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that `nn.Module.compile` makes, which run uncompiled, without a C++ compiler."""
    monkeypatch.setattr(shutil, "which", lambda name: name)
    original, found = nn.Module.compile, []

    def backend(graph: Any, _examples: Any) -> Any:
        found.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", lambda self, **words: original(self, backend=backend, **words))
    return found


@pytest.mark.parametrize("variant", ["basic blocks", "nothing frozen, batch norm"])
def test_one_compilation_serves_all_sizes(graphs: list[Any], variant: str) -> None:
    """Without oneDNN, whose choice of a kernel makes torch compile again for maps of less than 20,480 values."""
    model = lively(tiny_model(variant))
    plain, fast = model.optimize(), model.optimize(compile=True)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        for size in ((256, 320), (320, 256), (512, 384), (480, 640), (352, 352)):
            images = torch.randn(1, 3, *size)
            for wanted, found in zip(raw_tensors(plain(images)), raw_tensors(fast(images)), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # other sums, in float32
    assert 1 <= len(graphs) <= MAX_GRAPHS


def test_training_compiles_once_for_all_sizes(graphs: list[Any]) -> None:
    """With the losses and gradients of the uncompiled network, the same names of weights, and an average of them."""
    found = []
    for compile in (False, True):
        config = tiny_config(f"train.compile={compile}", "train.winograd=false")
        compute, criterion = build_compute(config, torch.device("cpu")), build_criterion(config.model)
        torch.manual_seed(0)
        model = prepare_for_training(construct(config.model, list("abcd")), config, compute).train()
        average, values = WeightAverage(model, 0.9), []
        with torch.backends.mkldnn.flags(enabled=False):
            for seed, size in enumerate(((96, 128), (128, 96), (160, 192))):
                batch = random_batch(config, seed=seed, size=size)
                losses = backward(model, criterion, [batch], compute.scaler(), compute)
                values += [*losses.values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            average.update(model)
        found.append((values, list(model.state_dict())))
    assert 1 <= len(graphs) <= MAX_GRAPHS
    (values, names), (same_values, same_names) = found
    assert names == same_names and average.updates == 1
    for value, same in zip(values, same_values, strict=True):
        torch.testing.assert_close(value, same, rtol=1e-4, atol=1e-6)


def test_the_first_module_that_is_not_finite_is_named_in_a_compiled_network(graphs: list[Any]) -> None:
    config = tiny_config("train.compile=true")
    compute, criterion = build_compute(config, torch.device("cpu")), build_criterion(config.model)
    model = prepare_for_training(construct(config.model, list("abcd")), config, compute).train()
    batch = random_batch(config, seed=0)
    model(model.normalize(batch["pixels"], batch["sizes"]))  # compiled before the hooks are there
    broken = {**batch, "pixels": torch.full_like(batch["pixels"], float("nan"), dtype=torch.float32)}
    cause = first_nonfinite(model, lambda: repeat_forward(model, criterion, [broken], compute))
    assert "output of backbone.conv1" in cause and len(graphs) == 1


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    config = tiny_config("train.compile=true")
    compute = build_compute(config, torch.device("cpu"))
    with pytest.raises(InputError, match="train.compile .*compiler"):
        prepare_for_training(construct(config.model, list("abcd")), config, compute)


def compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def step(model: SOLOv2, backend: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(losses, gradients) of a training step with compiled forward pass and losses; eager if `backend` is None."""
    torch.manual_seed(3)
    images = torch.randn(3, 3, *SIZE, dtype=model.fpn.lateral[0].weight.dtype)
    targets = tiny_targets(model, (3, 0, 2), SIZE)
    forward, criterion = model.train().forward, SOLOv2Criterion(num_classes=3).forward
    if backend is not None:
        forward, criterion = compiled(forward, backend), compiled(criterion, backend)
    losses = criterion(forward(images), targets)
    model.zero_grad()
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model: SOLOv2, backend: str, tolerance: float) -> None:
    """Gradients agree relative to the maximum of their tensor, or to a thousandth of the overall maximum."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    wanted_losses, wanted = step(model, None)
    model.load_state_dict(state)  # running statistics have changed
    losses, gradients = step(model, backend)
    for name, loss in wanted_losses.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=tolerance)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = max(gradient.abs().max(), 1e-3 * largest)
        assert (gradients[name] - gradient).abs().max() <= tolerance * scale, name


def assert_same_forward(model: SOLOv2, backend: str, tolerance: float) -> None:
    images = torch.randn(2, 3, *SIZE, dtype=model.fpn.lateral[0].weight.dtype)
    with torch.no_grad():
        wanted, found = raw_tensors(model.eval()(images)), raw_tensors(compiled(model.forward, backend)(images))
    for one, other in zip(wanted, found, strict=True):
        assert (one - other).abs().max() <= tolerance * one.std()


@pytest.mark.parametrize("kind", SMALL)
def test_training_has_no_graph_break(kind: str) -> None:
    """Forward pass and losses of a batch that includes an empty image."""
    variant, changes = SMALL[kind]
    assert_same_step(tiny_model(variant, **changes).double(), "eager", 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_winograd_convolutions_are_traced(bias: bool) -> None:
    """The one module that `SOLOv2.optimize` adds, followed by an in-place ReLU as in a residual block.

    The full optimized model is among the slow tests.
    """
    conv = WinogradConv2d.from_conv(nn.Conv2d(64, 64, 3, padding=1, bias=bias).requires_grad_(False)).eval()
    conv.prepare()

    def forward(x: Tensor) -> Tensor:
        return torch.relu_(conv(x))

    x = torch.randn(1, 64, 16, 24)
    assert torch.allclose(compiled(forward, "aot_eager")(x), forward(x), atol=1e-6)
    torch.library.opcheck(compiled_convolve, ([x], conv.prepared, conv.weight, conv.bias))


def test_losses_forward_and_backward_are_traced() -> None:
    """The criterion's forward and backward graphs give the losses and gradients of eager mode."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_model()
    targets, sizes = tiny_targets(model, (3, 0), SIZE), model.grid_sizes

    def run(criterion: Callable[..., dict[str, Tensor]]) -> list[Tensor]:
        leaves = [level.clone().requires_grad_() for level in levels]
        losses = criterion(
            {"category_logits": leaves[:5], "kernels": leaves[5:10], "mask_features": leaves[10]}, targets
        )
        return [*losses.values(), *torch.autograd.grad(sum(losses.values()), leaves)]

    shapes = [*((2, 3, size, size) for size in sizes), *((2, 8, size, size) for size in sizes), (2, 8, 16, 24)]
    levels = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    criterion = SOLOv2Criterion(num_classes=3)
    for one, other in zip(run(criterion), run(compiled(criterion.forward, "aot_eager")), strict=True):
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_network_is_traced_forward_and_backward(variant: str) -> None:
    model = lively(tiny_model(variant)).double()
    assert_same_forward(model, "aot_eager", 1e-10)
    assert_same_step(model, "aot_eager", 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["solov2_light_r18_fpn_3x", "solov2_light_r50_dcn_fpn_3x"])
def test_optimized_model_is_traced(name: str) -> None:
    torch.manual_seed(0)
    assert_same_forward(lively(build_model(name, num_classes=3)).optimize(), "aot_eager", 1e-4)


@pytest.mark.slow
def test_inductor() -> None:
    """The optimized model and a training step with Inductor, which needs a C++ compiler on a CPU."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    model = lively(tiny_model("nothing frozen, batch norm"))
    images = torch.randn(2, 3, *SIZE)
    with torch.no_grad():
        wanted, found = raw_tensors(model.optimize()(images)), raw_tensors(model.optimize(compile=True)(images))
    for one, other in zip(wanted, found, strict=True):
        assert (one - other).abs().max() <= 1e-4 * one.std()
    assert_same_step(model, "inductor", 1e-3)
