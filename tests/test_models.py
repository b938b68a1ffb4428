"""The network matches the reference layer by layer, and training updates what it should."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.operations import Operations
from helpers.parity import (
    DATA,
    FORWARD,
    MODELS,
    assert_outputs,
    assert_same_instances,
    load,
    mmdet_name,
    network_input,
    raw_tensors,
    reference_model,
    run_network,
)
from helpers.tiny_models import VARIANTS, lively, tiny_model, tiny_targets
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from solov2.build import build_model
from solov2.losses import SOLOv2Criterion
from solov2.models.head import apply_tower
from solov2.models.layers import ConvNormReLU, DeformConv2d, make_norm
from solov2.models.mask_feature import double_axis, upsample_twice
from solov2.models.resnet import ResNet, SubsampledConv2d
from solov2.models.solov2 import SOLOv2
from solov2.ops.coords import arithmetic_positions, coordinate_channels

# ---- parity

# float64 agrees to 2e-15, except for the float32 coordinates, whose last bit may depend on the CPU. The reference's
# own float32 run lies within 1.4e-5 of its float64 run. A mask pixel that flips in float32 moves the score of a
# suppressed instance by up to 2e-4, and instances may then change places.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1.4e-5}
SCORE_TOLERANCES = {torch.float64: 5e-8, torch.float32: 2e-4}
BOTH = (torch.float64, torch.float32)


@pytest.mark.parametrize(
    ("config", "images", "dtypes"),
    [
        pytest.param("solov2_r50", 1, (torch.float64,), id="r50, first image"),
        pytest.param("solov2_light_r18", 1, BOTH, id="light_r18, first image"),
        pytest.param("solov2_light_r50_dcn", 1, BOTH, id="light_r50_dcn, first image"),
        *(
            pytest.param(config, 2, BOTH, id=config.removeprefix("solov2_"), marks=pytest.mark.slow)
            for config in MODELS
        ),
    ],
)
def test_network_matches_the_reference(
    config: str, images: int, dtypes: Sequence[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, every feature map, raw outputs and final instances of one of the published networks."""
    # oneDNN's float32 convolutions (Winograd) round about three times as coarsely as those of the reference's run.
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    stored = FORWARD[config]
    model = reference_model(config, stored["overrides"])
    state = {mmdet_name(name): tensor.double() for name, tensor in model.state_dict().items()}
    for name, (total, norm) in stored["weights_check"].items():
        assert (state[name].sum().item(), state[name].norm().item()) == pytest.approx((total, norm), rel=1e-9)
    inputs, predicted = network_input(**stored["input"])[:images], stored["predict"]
    metas = predicted["metas"][:images]
    for dtype in dtypes:
        outputs, raw = run_network(model.to(dtype), inputs.to(dtype))
        assert_outputs(config, outputs, TOLERANCES[dtype])
        results = model.postprocess(raw, [meta["img_shape"] for meta in metas], [meta["ori_shape"] for meta in metas])
        for result, expected in zip(results, predicted["results"]):
            assert_same_instances(
                result, expected, score_tolerance=SCORE_TOLERANCES[dtype], pixels=int(dtype == torch.float32)
            )


def test_stored_numbers_match_the_golden_files(golden: Path) -> None:
    """tests/data is a copy of the reference's files, with every fourth sampled value of the forward passes."""
    for name in ("targets", "losses", "postprocess"):
        assert load(f"{name}.json.gz") == json.loads((golden / f"{name}.json").read_text())
    for name, stored in load("trajectories.json.gz").items():
        assert stored == json.loads((golden / f"{name}.json").read_text())
    assert load("schedule.json") == json.loads((golden / "schedule.json").read_text())
    assert (DATA / "matrix_nms.npz").read_bytes() == (golden / "matrix_nms.npz").read_bytes()
    with np.load(DATA / "forward.npz") as kept:
        for config, stored in FORWARD.items():
            original = json.loads((golden / "forward" / f"{config}.json").read_text())
            assert {key: value for key, value in stored.items() if key != "outputs"} == original
            with np.load(golden / "forward" / f"{config}.npz") as full:
                assert np.array_equal(
                    kept[config], np.concatenate([full[f"{x}.values"][::4] for x in stored["outputs"]])
                )


def test_coordinates() -> None:
    """x, then y, from -1 to 1 inclusive; float32 values in every dtype."""
    for dtype in (torch.float32, torch.float64):
        channels = coordinate_channels(3, 5, dtype=dtype, device=torch.device("cpu"))
        assert channels.shape == (1, 2, 3, 5) and channels.dtype == dtype
        assert channels[0, 0].tolist() == [[-1, -0.5, 0, 0.5, 1]] * 3
        assert channels[0, 1].tolist() == [[-1] * 5, [0] * 5, [1] * 5]
    double = coordinate_channels(7, 7, dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(double, double.float().double())


def test_arithmetic_positions_are_those_of_linspace() -> None:
    """To the last bit on CPUs with a fused multiply-add, to 1/2 ulp of 1 on the others."""
    fused = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    for count in range(1, 600):
        wanted, found = torch.linspace(-1, 1, count), arithmetic_positions(count, torch.device("cpu"))
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted) if fused else (found - wanted).abs().max() <= 2**-24, count


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (9, 16)])
def test_upsampling_by_slices_equals_interpolation(size: tuple[int, int]) -> None:
    """The deterministic form of 2x upsampling, with its gradient."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    by_slices, wanted = double_axis(double_axis(x, 2), 3), F.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(by_slices, wanted, rtol=0, atol=1e-15)
    weight = torch.randn_like(wanted)
    gradients = [torch.autograd.grad(y, x, weight)[0] for y in (by_slices, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


def test_deterministic_upsampling_on_an_accelerator_is_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with FakeTensorMode():
        x = torch.empty(1, 4, 6, 5, dtype=torch.bfloat16, device="cuda")
        with Operations() as seen:
            y = upsample_twice(x)
    assert y.shape == (1, 4, 12, 10) and y.dtype == torch.bfloat16
    assert not [name for name in seen.names if "upsample" in name or "index" in name]
    assert len(seen.names) <= 12


# ---- layers and initial weights


def test_deformable_convolution_is_initialized_as_a_plain_one() -> None:
    """With zero offsets DCNv1 equals the convolution and DCNv2 half of it, since sigmoid(0) = 0.5."""
    images = torch.randn(2, 8, 9, 11)
    for modulated, factor in ((False, 1.0), (True, 0.5)):
        layer = DeformConv2d(8, 4, 3, stride=2, padding=1, groups=2, modulated=modulated)
        assert layer.weight.abs().max() <= 1 / math.sqrt(36) and layer.weight.std() > 0.05
        plain = nn.functional.conv2d(images, layer.weight, stride=2, padding=1, groups=2)
        assert torch.allclose(layer(images), factor * plain, atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_convolution_reads_offsets_as_y_then_x(modulated: bool) -> None:
    """A constant offset of one row down and two columns left shifts the image; the modulation is the last channel."""
    layer = DeformConv2d(1, 1, 1, modulated=modulated)
    nn.init.ones_(layer.weight)
    layer.conv_offset.bias.data = torch.tensor([1.0, -2.0, 40.0] if modulated else [1.0, -2.0])
    image = torch.arange(30.0).view(1, 1, 5, 6)
    moved = torch.zeros_like(image)
    moved[..., :4, 2:] = image[..., 1:, :4]
    assert torch.equal(layer(image), moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deformable_convolution_in_half_types(dtype: torch.dtype) -> None:
    """A CPU has no half-precision kernel: the layer computes in float32 and returns the input's dtype."""
    layer, images = DeformConv2d(8, 4, 3, padding=1), torch.randn(1, 8, 6, 7)
    wanted = layer(images)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = layer(images)
    for result in (under_autocast, layer.to(dtype)(images.to(dtype))):
        assert result.dtype == dtype and torch.allclose(result.float(), wanted, atol=0.05)


def test_conv_norm_relu_has_no_bias_and_never_a_negative_output() -> None:
    step = ConvNormReLU(32, 64)
    assert step.conv.bias is None and step(torch.randn(1, 32, 5, 6)).min() == 0
    assert step(torch.randn(1, 32, 5, 6)).shape == (1, 64, 5, 6)


def test_initial_weights() -> None:
    model = build_model("solov2_light_r50_dcn_fpn_3x", backbone_width=16)
    head, branch = model.head, model.mask_feature_head
    assert torch.equal(head.category_predictor.bias, torch.full((80,), -math.log(99)))
    assert not head.kernel_predictor.bias.any()
    for conv in (
        head.category_predictor,
        head.kernel_predictor,
        head.kernel_tower[0].conv,
        branch.levels[3][0].conv,
        branch.predictor.conv,
    ):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert isinstance(head.category_tower[2].conv, DeformConv2d) and isinstance(head.category_tower[1].conv, nn.Conv2d)
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            assert not module.conv_offset.weight.any() and not module.conv_offset.bias.any()
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == 32 and (module.weight == 1).all() and not module.bias.any()
    for conv in (*model.fpn.lateral, *model.fpn.output):
        fan = sum(conv.weight.shape[:2]) * conv.kernel_size[0] ** 2
        assert conv.weight.abs().max() <= math.sqrt(6 / fan) + 1e-6 and not conv.bias.any()


def test_bottleneck_stride() -> None:
    """torchvision has the stride on the 3x3, MSRA (AdelaiDet's weights) on the first 1x1."""
    for in_first, strides in ((False, (1, 2)), (True, (2, 1))):
        block = ResNet("resnet50", width=8, stride_in_1x1=in_first).layer2[0]
        assert (block.conv1.stride[0], block.conv2.stride[0]) == strides


def test_parts_reject_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="backbone .*resnet18, .*'vgg16'"):
        ResNet("vgg16")
    with pytest.raises(ValueError, match="resnet18 .*basic blocks"):
        ResNet("resnet18", deformable=True)
    with pytest.raises(ValueError, match="'group' .*'batch'.* 'layer'"):
        make_norm("layer", 32)


# ---- training behavior, on networks small enough for a test


def train_step(model: SOLOv2, counts: Sequence[int]) -> dict[str, torch.Tensor]:
    """Losses of one random batch; the gradients stay in the model."""
    raw = model(torch.randn(len(counts), 3, 64, 96))
    losses = SOLOv2Criterion(num_classes=3)(raw, tiny_targets(model, counts, (64, 96)))
    sum(losses.values()).backward()
    return losses


def frozen_parts(stages: int) -> tuple[str, ...]:
    """Name prefixes of frozen tensors."""
    layers = (f"backbone.layer{i}." for i in range(1, stages + 1))
    return ("backbone.conv1.", "backbone.bn1.", *layers) if stages else ()


@pytest.mark.parametrize("counts", [(4, 0), (0, 0)], ids=["some instances", "no instance at all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_gets_a_gradient(variant: str, counts: Sequence[int]) -> None:
    model = tiny_model(variant).train()
    losses = train_step(model, counts)
    assert (losses["loss_mask"] > 0) == (sum(counts) > 0)
    frozen = frozen_parts(model.backbone.frozen_stages)
    for name, parameter in model.named_parameters():
        if name.startswith(frozen):
            assert not parameter.requires_grad and parameter.grad is None, name
            continue
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or not sum(counts), f"{name} has an all-zero gradient"


@pytest.mark.parametrize(
    ("frozen_stages", "frozen_batch_norm"), [(1, True), (0, True), (1, False), (0, False), (2, False)]
)
def test_batch_norm_statistics(frozen_stages: int, frozen_batch_norm: bool) -> None:
    """Statistics of frozen stages never change; those of the others do, unless frozen_batch_norm keeps them."""
    model = tiny_model(frozen_stages=frozen_stages, frozen_batch_norm=frozen_batch_norm).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train_step(model, (2, 1))
    model.eval().train()
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    frozen = frozen_parts(frozen_stages)
    free = {name for name in before if name.startswith("backbone.") and not name.startswith(frozen)}
    assert len(free) > 10 and moved == (set() if frozen_batch_norm else free)


def test_training_and_evaluation_give_the_same_raw_outputs() -> None:
    """Except for the rounding of norms, which are folded in training."""
    model, images = tiny_model().double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        trained, evaluated = raw_tensors(model.train()(images)), raw_tensors(model.eval()(images))
    assert all((one - other).abs().max() <= 1e-12 for one, other in zip(trained, evaluated, strict=True))


@pytest.mark.parametrize("variant", ["basic blocks", "deformable everywhere"])
def test_a_batch_of_two_equals_two_batches_of_one(variant: str) -> None:
    """Raw outputs, results and losses, at equal padded size."""
    model, images = lively(tiny_model(variant)).double(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    images[1, :, 50:], images[1, :, :, 70:] = 0, 0
    sizes, original_sizes = [(64, 96), (50, 70)], [(100, 150), (50, 70)]
    with torch.no_grad():
        together, alone = model(images), [model(images[i : i + 1]) for i in range(2)]
    for i in range(2):
        for one, other in zip(raw_tensors(together), raw_tensors(alone[i]), strict=True):
            assert torch.allclose(one[i], other[0], rtol=1e-10, atol=1e-10)
    results = model.postprocess(together, sizes, original_sizes)
    for i, result in enumerate(results):
        (own,) = model.postprocess(alone[i], sizes[i : i + 1], original_sizes[i : i + 1])
        assert len(own["scores"]) > 5
        for key in own:
            assert torch.allclose(result[key].double(), own[key].double(), atol=1e-7)


def test_tower_batch_norm_covers_all_levels() -> None:
    """In training its statistics are those of the cells of all levels together; in evaluation it works per level."""
    tower = nn.Sequential(ConvNormReLU(4, 8, norm="batch")).train()
    levels = [torch.randn(2, 4, size, size) * size for size in (6, 3)]
    maps = torch.cat([tower[0].conv(level).flatten(2) for level in levels], 2)  # [B, C, cells]
    mean, variance = maps.mean((0, 2)), maps.var((0, 2))
    trained = torch.cat([level.flatten(2) for level in apply_tower(tower, levels)], 2)
    assert torch.allclose(tower[0].norm.running_mean, 0.1 * mean, atol=1e-5)
    assert torch.allclose(tower[0].norm.running_var, 0.9 + 0.1 * variance, rtol=1e-4)
    variance = maps.var((0, 2), correction=0)[:, None] + tower[0].norm.eps
    assert torch.allclose(trained, ((maps - mean[:, None]) / variance.sqrt()).relu(), atol=1e-4)
    tower.eval()
    for level, result in zip(levels, apply_tower(tower, levels), strict=True):
        assert torch.equal(result, tower(level))


def test_towers_round_norms_as_convolutions_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """With group norm in float32, as autocast has it on NVIDIA cards, but without its larger activations."""

    def wide_norm(self: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)

    def round_later(self: ConvNormReLU, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(x))

    monkeypatch.setattr(nn.GroupNorm, "forward", wide_norm)
    tower = nn.Sequential(*(ConvNormReLU(32, 32) for _ in range(3)))
    predictor, levels = nn.Conv2d(32, 5, 3, padding=1), [torch.randn(2, 32, size, size) for size in (12, 8)]
    found, kept = [], []
    for late in (False, True):
        if late:
            monkeypatch.setattr(ConvNormReLU, "norm_relu", round_later)
        saved: dict[int, torch.Tensor] = {}

        def save(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autocast("cpu", dtype=torch.bfloat16), Operations() as seen:
            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                logits = [predictor(x) for x in apply_tower(tower, levels)]
        assert seen.dtypes["native_group_norm"] == torch.float32
        assert seen.dtypes["relu_"] == (torch.float32 if late else torch.bfloat16)
        gradients = torch.autograd.grad(sum(x.float().square().sum() for x in logits), [*tower.parameters()])
        found.append([*logits, *gradients])
        kept.append(sum(tensor.numel() * tensor.element_size() for tensor in saved.values() if tensor.ndim == 4))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert kept[0] < 0.8 * kept[1]


def test_channels_last_is_only_a_layout() -> None:
    model, images = tiny_model(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        planes = raw_tensors(model(images))
        model, images = (item.to(memory_format=torch.channels_last) for item in (model, images))
        interleaved = raw_tensors(model(images))
    for one, other in zip(planes, interleaved, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * one.std())


def test_forward_leaves_its_input_untouched() -> None:
    model, images = tiny_model(), torch.randn(1, 3, 64, 64)
    kept = images.clone()
    model(images)
    assert torch.equal(images, kept)


def test_raw_shapes() -> None:
    model = tiny_model()
    raw = model(torch.randn(2, 3, 64, 96))
    assert model.grid_sizes == (8, 6, 5, 4, 3)
    assert [tuple(level.shape) for level in raw["category_logits"]] == [(2, 3, size, size) for size in model.grid_sizes]
    assert [tuple(level.shape) for level in raw["kernels"]] == [(2, 32, size, size) for size in model.grid_sizes]
    assert raw["mask_features"].shape == (2, 32, 16, 24) and raw["mask_features"].min() >= 0


def test_bf16_autocast_of_quickstart() -> None:
    """Forward under autocast, losses in float32, gradients finite; close to the float32 losses."""
    model = tiny_model("nothing frozen, batch norm").train()
    images, targets = torch.randn(2, 3, 64, 96), tiny_targets(model, (3, 2), (64, 96))
    criterion = SOLOv2Criterion(num_classes=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = model(images)
    losses = criterion(raw, targets)
    assert raw["kernels"][0].dtype == torch.bfloat16
    sum(losses.values()).backward()
    for name, loss in criterion(model(images), targets).items():
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(loss.item(), rel=0.05)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_narrow_strided_shortcuts_subsample_first():
    """torch's own backward pass of a strided 1x1 convolution may crash with fewer than 16 channels in channels last."""
    narrow, wide = ResNet("resnet10", width=8, frozen_stages=0), ResNet("resnet10", width=16, frozen_stages=0)
    assert not [m for m in wide.modules() if isinstance(m, SubsampledConv2d)]
    for module in narrow.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1:
            assert module.in_channels >= 16 or isinstance(module, SubsampledConv2d)
    own = narrow.layer2[0].downsample[0]
    assert isinstance(own, SubsampledConv2d) and own.in_channels == 8
    plain = nn.Conv2d(8, own.out_channels, 1, 2, bias=False).double()
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 8, 7, 5, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(conv(x).square().sum(), x)[0] for conv in (own.double(), plain)]
    assert own(x).shape == (2, own.out_channels, 4, 3)
    torch.testing.assert_close(own(x), plain(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13)
