"""Winograd convolutions equal plain ones in results and gradients, and are used only where intended."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers.tiny_models import lively
from torch import Tensor, nn

from solov2.build import build_assigner, build_compute, build_criterion, build_model, prepare_for_training
from solov2.config import load_config
from solov2.models import winograd
from solov2.models.head import SOLOv2Head
from solov2.models.optimize import use_winograd
from solov2.models.winograd import MIN_TILES, MIN_TRAINING_TILES, WinogradConv2d, convolve_levels_jointly, transforms

SIZES = [(16, 16), (13, 22), (40, 9), (5, 70), (8, 8)]


def gradients(conv: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """Results of a convolution on every map, and the gradients of maps, weight and bias."""
    maps = [x.clone().requires_grad_() for x in maps]
    results = convolve_levels_jointly(conv, maps)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in results]
    return [*results, *torch.autograd.grad(results, [*maps, *conv.parameters()], given)]


def test_transforms_filter_exactly() -> None:
    to_input, to_weight, to_output = transforms()
    signal, weight = np.random.default_rng(0).standard_normal(6), np.array([0.3, -1.2, 0.7])
    expected = [signal[i : i + 3] @ weight for i in range(4)]
    assert np.allclose(to_output @ ((to_weight @ weight) * (to_input @ signal)), expected, atol=1e-13)


@pytest.fixture(autouse=True)
def use_for_small_maps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Winograd for small maps, too, to keep the tests quick; except in the test of where it begins."""
    if "stay_plain" not in request.node.name:
        monkeypatch.setattr(winograd, "MIN_TRAINING_TILES", MIN_TILES)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_results_and_gradients_equal_those_of_the_convolution(
    batch: int, size: tuple[int, int], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 96, 3, padding=1, bias=batch == 3).double()
    x = torch.randn(batch, 64, *size, dtype=torch.float64).contiguous(memory_format=layout)
    expected = gradients(conv, [x])
    for own, plain in zip(gradients(WinogradConv2d.from_conv(conv), [x]), expected, strict=True):
        assert (own - plain).abs().max() <= 1e-12 * max(1, plain.std(correction=0))
    conv = conv.float()
    for own, plain in zip(gradients(WinogradConv2d.from_conv(conv), [x.float()]), expected, strict=True):
        assert (own - plain).abs().max() <= 1e-4 * max(1, plain.std(correction=0))


def test_several_maps_in_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where chunks end inside a map, and where a single row of tiles exceeds the chunk size."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1).double()
    maps = [torch.randn(2, 64, side, side + 3, dtype=torch.float64) for side in (24, 9, 4, 1)]
    expected = gradients(conv, maps)
    for values in (2**21, 3 * 36 * 64 * 2 * 7, 1):
        monkeypatch.setattr(winograd, "CHUNK_VALUES", values)
        monkeypatch.setattr(winograd, "GRADIENT_CHUNK_VALUES", values)
        for own, plain in zip(gradients(WinogradConv2d.from_conv(conv), maps), expected, strict=True):
            assert (own - plain).abs().max() <= 1e-12 * max(1, plain.std())


def test_small_maps_evaluation_and_other_convolutions_stay_plain() -> None:
    for conv in (
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
    ):
        assert not WinogradConv2d.is_suitable(conv)
    conv = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
    own = WinogradConv2d.from_conv(conv)
    assert own.weight is conv.weight and own.bias is conv.bias

    def uses_winograd(tiles: int) -> bool:
        x = torch.randn(1, 64, 4, 4 * tiles)
        return not torch.equal(own(x), conv(x))

    assert uses_winograd(MIN_TRAINING_TILES) and not uses_winograd(MIN_TRAINING_TILES - 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_winograd(MIN_TRAINING_TILES)
    own.eval()
    assert not uses_winograd(MIN_TRAINING_TILES)
    own.prepare()
    assert uses_winograd(MIN_TILES) and not uses_winograd(MIN_TILES - 1)
    assert own(torch.randn(1, 64, 16, 16)).is_contiguous(memory_format=torch.channels_last)


def test_inputs_stay_and_unneeded_gradients_are_not_computed() -> None:
    conv = WinogradConv2d.from_conv(nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(1, 64, 20, 20)
    before = x.clone()
    conv(x).sum().backward()
    assert torch.equal(x, before) and x.grad is None and conv.weight.grad is not None


def test_training_step_equals_that_of_the_plain_network() -> None:
    """Losses and every gradient of a network wide enough to gain, frozen stages and folded norms included.

    In float64, because float32 rounding that crosses a ReLU's zero changes a gradient by 1e-3 in any implementation.
    """
    config = load_config("solov2_light_r18_fpn_3x", {"model.grid_sizes": [16, 12, 9, 6, 4], "model.num_classes": 5})
    torch.manual_seed(0)
    plain = lively(build_model(config, weights=None)).double()
    truth = {
        "boxes": torch.tensor([[8.0, 8, 60, 50], [70, 20, 120, 90]]),
        "labels": torch.tensor([1, 3]),
        "masks": torch.zeros(2, 96, 128, dtype=torch.uint8),
    }
    truth["masks"][0, 8:50, 8:60] = 1
    truth["masks"][1, 20:90, 70:120] = 1
    targets = build_assigner(config.model)([truth], (96, 128))
    assert len(targets["positives"])
    images = torch.randn(1, 3, 96, 128, dtype=torch.float64)

    def step(model: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
        model.train().zero_grad()
        losses = build_criterion(config.model)(model(images.contiguous(memory_format=torch.channels_last)), targets)
        sum(losses.values()).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return [loss.item() for loss in losses.values()], found

    expected, plain_gradients = step(plain)
    names = list(plain.state_dict())
    fast = prepare_for_training(plain, config, build_compute(config, torch.device("cpu")))
    assert sum(isinstance(module, WinogradConv2d) for module in fast.modules()) > 15
    assert list(fast.state_dict()) == names
    losses, fast_gradients = step(fast)
    assert losses == pytest.approx(expected, rel=1e-10)
    for name, gradient in plain_gradients.items():
        assert (fast_gradients[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


def test_not_used_when_switched_off_or_in_bf16() -> None:
    for overrides in ({"train.winograd": False}, {"train.precision": "bf16"}):
        config = load_config("solov2_light_r18_fpn_3x", overrides)
        model = build_model(config, weights=None)
        model = prepare_for_training(model, config, build_compute(config, torch.device("cpu")))
        assert not any(isinstance(module, WinogradConv2d) for module in model.modules())
        assert model.head.convolve is SOLOv2Head.convolve


def test_a_head_convolves_all_levels_in_one_product() -> None:
    """Also in a copy and after pickling, with the same parameters; other heads convolve level by level."""
    model = build_model("solov2_light_r18_fpn_3x", num_classes=5)
    parameters = list(model.parameters())
    use_winograd(model)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    for head in (model.head, copy.deepcopy(model).head, pickle.loads(pickle.dumps(model)).head):
        assert head.convolve is convolve_levels_jointly
    assert SOLOv2Head.convolve is not convolve_levels_jointly

    # On its own the coarsest level is too small for Winograd; together it is not, which shows in its rounding.
    torch.manual_seed(0)
    head = model.head.train()
    grids = [torch.randn(1, 256, side, side) for side in (40, 36, 24, 16, 12)]
    with torch.no_grad():
        together = head.convolve(head.category_tower[0].conv, grids)
        alone = SOLOv2Head.convolve(head.category_tower[0].conv, grids)
    assert not torch.equal(together[-1], alone[-1])
    for one, other in zip(together, alone, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.std()
