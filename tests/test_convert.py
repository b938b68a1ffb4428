"""Files of every family: names are converted, differences become traits, and errors list what does not fit."""

from __future__ import annotations

import collections
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.parity import (
    FORWARD,
    MODELS,
    adelaidet_name,
    assert_outputs,
    load,
    mmdet_name,
    mmdet_shapes,
    mmdet_weights,
    network_input,
    original_name,
    run_network,
    sampled_outputs,
)
from helpers.tiny_models import TINY, lively, tiny_model
from torch import Tensor

from solov2 import published
from solov2.build import build_model
from solov2.checkpoint import load_file
from solov2.commands.convert import main
from solov2.convert import PREFIXES, convert_state_dict, to_mmdet, unwrap
from solov2.download import MIRROR, sha256_of
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.published import PublishedFile
from solov2.weights import convert_file, official_weights

KEYS = load("keys.json.gz")  # family -> network -> name -> shape, listed by the family's own code
CASES = [(family, config) for family, configs in KEYS.items() for config in configs]
# parameters and state-dict entries of mmdetection's networks
SIZES = {
    "solov2_r50_fpn_1x": (46_592_912, 386),
    "solov2_r50_fpn_3x": (46_592_912, 386),
    "solov2_r101_fpn_3x": (65_585_040, 692),
    "solov2_r101_dcn_fpn_3x": (68_729_118, 784),
    "solov2_x101_dcn_fpn_3x": (113_420_574, 784),
    "solov2_light_r18_fpn_3x": (18_271_760, 176),
    "solov2_light_r34_fpn_3x": (28_379_920, 272),
    "solov2_light_r50_fpn_3x": (31_340_560, 374),
    "solov2_light_r50_dcn_fpn_3x": (33_516_965, 410),
}
DCN = "deformable everywhere"


def without_storage(name: str) -> SOLOv2:
    with torch.device("meta"):
        return build_model(name, device="meta")


def mmdet_state(model: SOLOv2) -> dict[str, Tensor]:
    return {mmdet_name(name): tensor for name, tensor in model.state_dict().items()}


def scrambled(model: SOLOv2) -> SOLOv2:
    """Change statistics and offset branches from their initial values, so that a lost tensor shows in the outputs."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.ndim != 4 or "conv_offset" in name:
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


def assert_same_function(one: SOLOv2, other: SOLOv2) -> None:
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = one(images), other(images)
    for key in ("category_logits", "kernels"):
        assert all(torch.equal(a, b) for a, b in zip(first[key], second[key], strict=True))
    assert torch.equal(first["mask_features"], second["mask_features"])


# ---- names


@pytest.mark.parametrize("name", SIZES)
def test_sizes_match_the_reference(name: str) -> None:
    model = without_storage(name)
    assert (sum(parameter.numel() for parameter in model.parameters()), len(model.state_dict())) == SIZES[name]


@pytest.mark.parametrize(("family", "config"), CASES)
def test_every_published_name_is_converted(family: str, config: str) -> None:
    """The listed names and shapes convert to exactly our state dict; only batch counters may be missing."""
    stored = {name: torch.empty(shape, device="meta") for name, shape in KEYS[family][config].items()}
    converted, traits = convert_state_dict(stored)
    own = {name: tensor.shape for name, tensor in without_storage(f"{config}_fpn_3x").state_dict().items()}
    if family == "adelaidet":
        own = {name: shape for name, shape in own.items() if not name.endswith("num_batches_tracked")}
    assert {name: tensor.shape for name, tensor in converted.items()} == own
    assert traits["family"] == family and traits["modulated"]
    assert {id(tensor) for tensor in converted.values()} == {id(tensor) for tensor in stored.values()}


@pytest.mark.parametrize("config", [*MODELS, "solov2_r101"])
def test_to_mmdet_returns_mmdetections_names(config: str) -> None:
    stored = {name: tuple(shape) for name, shape in KEYS["mmdet"][config].items()}
    model = without_storage(f"{config}_fpn_3x")
    assert {name: tuple(tensor.shape) for name, tensor in to_mmdet(model.state_dict()).items()} == stored
    assert mmdet_shapes(model) == stored


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    """Ours -> mmdetection's file -> ours."""
    model = scrambled(tiny_model(DCN))
    torch.save({"state_dict": to_mmdet(model.state_dict())}, tmp_path / "mmdet.pth")
    back, _ = convert_state_dict(unwrap(load_file(tmp_path / "mmdet.pth")))
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_families_agree_on_every_tensor() -> None:
    """Renamed copies of one state dict become the same tensors under the same names."""
    state = mmdet_state(scrambled(tiny_model(DCN)))
    expected, _ = convert_state_dict(state)
    original, traits = convert_state_dict({original_name(name): tensor for name, tensor in state.items()})
    assert traits["family"] == "original" and (traits["channel_order"], traits["stride_in_1x1"]) == ("rgb", False)
    assert original.keys() == expected.keys() and all(original[name] is expected[name] for name in expected)
    state = mmdet_state(scrambled(tiny_model("bottlenecks")))
    expected, _ = convert_state_dict(state)
    adelaidet, traits = convert_state_dict({adelaidet_name(name): tensor for name, tensor in state.items()
                                            if not name.endswith("num_batches_tracked")})  # fmt: skip
    assert all(adelaidet[name] is expected[name] for name in adelaidet)
    assert expected.keys() - adelaidet.keys() == {name for name in expected if name.endswith("num_batches_tracked")}
    assert traits == {
        "family": "adelaidet",
        "stride_in_1x1": True,
        "channel_order": "bgr",
        "pixel_mean": [103.53, 116.28, 123.675],
        "pixel_std": [1.0, 1.0, 1.0],
        "modulated": True,
    }


def test_our_own_names_are_unchanged() -> None:
    state = build_model("quickstart").state_dict()
    converted, traits = convert_state_dict(state)
    assert traits["family"] == "solov2" and list(converted) == list(state)
    assert converted is not state


def test_old_names_of_offset_branches() -> None:
    """`conv2_offset` next to `conv2`, as in mmdetection 1.x and detectron2, also in the towers and the mask branch."""
    state = mmdet_state(scrambled(tiny_model(DCN)))
    expected, _ = convert_state_dict(state)
    old = {
        original_name(re.sub(r"\.(conv\d?)\.conv_offset\.", r".\1_offset.", name)): tensor
        for name, tensor in state.items()
    }
    assert "backbone.layer2.0.conv2_offset.weight" in old and "bbox_head.cate_convs.0.conv_offset.bias" in old
    assert "mask_feat_head.convs_all_levels.2.conv1.conv_offset.weight" in old
    converted, _ = convert_state_dict(old)
    assert converted.keys() == expected.keys() and all(converted[name] is expected[name] for name in expected)


def test_unknown_names_are_listed() -> None:
    state = mmdet_state(tiny_model()) | {"mask_head.extra.weight": torch.zeros(1), "rpn_head.conv.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"^2 .*mask_head.extra.weight, rpn_head.conv.bias"):
        convert_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"module.layer.weight": torch.zeros(1)}], ids=["nothing", "something else"])
def test_unknown_families_are_rejected(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=f"names are: {', '.join(state) or 'none'}"):
        convert_state_dict(state)


# ---- files


@pytest.mark.parametrize("family", ["mmdet", "original"])
@pytest.mark.parametrize("config", ["solov2_light_r18", "solov2_light_r50_dcn"])
def test_generated_files_reproduce_the_reference_outputs(family: str, config: str, tmp_path: Path) -> None:
    """File -> build_model -> the fixture's outputs in float64. One family's file is in torch's old format, not zip."""
    state = mmdet_weights(mmdet_shapes(without_storage(MODELS[config])), FORWARD[config]["overrides"])
    if family == "original":
        state = {original_name(name): tensor for name, tensor in state.items()}
    content = {"meta": {"epoch": 36}, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=family == "mmdet")
    model = build_model(MODELS[config], weights=tmp_path / "file.pth").double()
    entry = FORWARD[config]["input"]
    outputs, _ = run_network(model, network_input(entry["tag"], entry["shape"]).double())
    assert_outputs(config, outputs, 1e-8)


def test_r101_shares_its_first_stage_with_the_fixture_of_r101_dcn() -> None:
    """There is no fixture for R101 without DCN, but its layer1 and weight rule are those of R101-DCN."""
    entry = FORWARD["solov2_r101_dcn"]
    shapes = {name: tuple(shape) for name, shape in KEYS["mmdet"]["solov2_r101"].items()}
    first = {name: shape for name, shape in shapes.items() if name.startswith(("backbone.conv1", "backbone.bn1",
             "backbone.layer1."))}  # fmt: skip
    model = build_model("solov2_r101_fpn_3x")
    renamed = mmdet_weights(first, entry["overrides"])
    model.load_state_dict(renamed, strict=False)
    backbone = model.backbone.double()
    images = network_input(entry["input"]["tag"], entry["input"]["shape"]).double()
    with torch.no_grad():
        c2 = backbone.layer1(backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images)))))
    stored = entry["outputs"]["C2"]
    wanted = sampled_outputs("solov2_r101_dcn")["C2"]
    assert (c2.flatten()[:: stored["stride"]] - wanted).abs().max() <= 1e-8 * stored["std"]


def plain_msra_backbone(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """An independent ResNet-50 with detectron2's names: the stride is in the first 1x1 convolution of each stage."""

    def conv_norm(name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=padding)
        weight, bias, mean, var = (
            state[f"{name}.norm.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    start = "backbone.bottom_up"
    x = F.max_pool2d(conv_norm(f"{start}.stem.conv1", x, 2, 3).relu(), 3, 2, 1)
    outputs = []
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        for block in range(blocks):
            name, stride = f"{start}.res{stage}.{block}", 2 if stage > 2 and block == 0 else 1
            y = conv_norm(f"{name}.conv1", x, stride).relu()
            y = conv_norm(f"{name}.conv2", y, padding=1).relu()
            y = conv_norm(f"{name}.conv3", y)
            shortcut = conv_norm(f"{name}.shortcut", x, stride) if block == 0 else x
            x = (y + shortcut).relu()
        outputs.append(x)
    return outputs


def test_adelaidet_backbone_matches_detectron2(tmp_path: Path) -> None:
    """Stride position, BGR and std 1 survive loading, and then saving and loading."""
    state = mmdet_state(scrambled(tiny_model("bottlenecks")))
    theirs = {adelaidet_name(n): tensor for n, tensor in state.items() if not n.endswith("num_batches_tracked")}
    torch.save({"model": theirs, "iteration": 269999}, tmp_path / "SOLOv2_R50_3x.pth")
    model = build_model("solov2_r50_fpn_3x", weights=tmp_path / "SOLOv2_R50_3x.pth", **TINY)
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    images = model.normalize(pixels, torch.tensor([[64, 96]]))
    bgr = pixels.flip(1).float() - torch.tensor([103.53, 116.28, 123.675]).view(1, 3, 1, 1)
    assert torch.equal(images, bgr)
    with torch.no_grad():
        for own, plain in zip(model.backbone(images), plain_msra_backbone(theirs, bgr), strict=True):
            assert (own - plain).abs().max() <= 1e-5 * plain.std()
    convert_file(tmp_path / "SOLOv2_R50_3x.pth", tmp_path / "ours.pth")
    again = build_model("solov2_r50_fpn_3x", weights=tmp_path / "ours.pth", **TINY)
    assert torch.equal(again.normalize(pixels, torch.tensor([[64, 96]])), images)
    assert_same_function(model, again)


def test_dcn_v1_is_detected_from_the_offset_branches(tmp_path: Path) -> None:
    """The authors' light R50-DCN has 18 offset channels; the configuration says DCNv2, but the file decides."""
    model = scrambled(tiny_model("DCNv1"))
    state = {original_name(name): tensor for name, tensor in mmdet_state(model).items()}
    assert len(state["backbone.layer2.0.conv2.conv_offset.weight"]) == 18
    assert convert_state_dict(state)[1]["modulated"] is False
    torch.save({"state_dict": state}, tmp_path / "v1.pth")
    assert_same_function(model, build_model("solov2_light_r50_dcn_fpn_3x", weights=tmp_path / "v1.pth", **TINY))


def test_wrappers_are_removed() -> None:
    state = mmdet_state(tiny_model())
    averaged = {"ema_" + name.replace(".", "_"): tensor + 1 for name, tensor in state.items()}
    for content in (
        state,
        {"state_dict": state, "optimizer": {"state": {}}},
        {"model": state},
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "pytorch-lightning_version": "2"},
        {"state_dict": state | averaged},  # mmcv: the average is under the plain names
    ):
        converted, _ = convert_state_dict(unwrap(content))
        assert converted["head.category_predictor.bias"] is state["mask_head.conv_cls.bias"]
        assert len(converted) == len(state)


def test_pixel_statistics_in_a_file_become_traits() -> None:
    state = {adelaidet_name(name): tensor for name, tensor in mmdet_state(tiny_model("bottlenecks")).items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    extra = {
        "pixel_mean": torch.tensor([1.0, 2, 3]).view(3, 1, 1),
        "pixel_std": torch.tensor([4.0, 5, 6]).view(3, 1, 1),
    }
    converted, traits = convert_state_dict(state | extra)
    assert traits["pixel_mean"] == [1, 2, 3] and traits["pixel_std"] == [4, 5, 6]
    assert not converted.keys() & extra.keys()


def test_class_names_come_from_mmdetections_meta(tmp_path: Path) -> None:
    state = mmdet_state(tiny_model())
    for meta in ({"CLASSES": ("cat", "dog", "emu")}, {"dataset_meta": {"classes": ["cat", "dog", "emu"]}}):
        torch.save({"meta": meta, "state_dict": state}, tmp_path / "file.pth")
        assert build_model("solov2_light_r18_fpn_3x", weights=tmp_path / "file.pth", **TINY).class_names == [
            "cat",
            "dog",
            "emu",
        ]


class HistoryBuffer:
    """As stored by mmengine in every checkpoint."""

    def __init__(self) -> None:
        self._log_history, self._count_history = np.array([1.0, 2.0]), np.array([1, 1])
        self.last = np.float64(3)
        self._statistics_methods = {"mean": HistoryBuffer.mean}

    def mean(self) -> float:
        return float(self._log_history.mean())


def test_mmengines_history_is_loaded_inertly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "mmengine.logging.history_buffer"
    for thing in (HistoryBuffer, HistoryBuffer.mean):
        monkeypatch.setattr(thing, "__module__", name)
    with monkeypatch.context() as present:
        for part in ("mmengine", "mmengine.logging", name):
            present.setitem(sys.modules, part, types.ModuleType(part))
        present.setattr(sys.modules[name], "HistoryBuffer", HistoryBuffer, raising=False)
        hub = {"log_scalars": collections.OrderedDict(loss=HistoryBuffer())}
        torch.save({"message_hub": hub, "state_dict": mmdet_state(tiny_model())}, tmp_path / "epoch_12.pth")
    build_model("solov2_light_r18_fpn_3x", weights=tmp_path / "epoch_12.pth", **TINY)
    buffer = load_file(tmp_path / "epoch_12.pth")["message_hub"]["log_scalars"]["loss"]
    assert type(buffer).__name__ == "Inert" and not vars(buffer)


@pytest.mark.parametrize("family", ["mmdet", "original"])
def test_errors_list_what_does_not_fit(family: str, tmp_path: Path) -> None:
    rename = original_name if family == "original" else str
    state = {rename(name): tensor for name, tensor in mmdet_state(tiny_model()).items()}
    level = rename("mask_head.mask_feature_head.convs_all_levels.1.conv0.conv.weight")
    faults: dict[str, tuple[dict[str, Tensor], str]] = {
        "missing": ({n: t for n, t in state.items() if n != level}, r"1 missing \(mask_feature_head.levels.1.0.conv.w"),
        "unexpected": (
            state | {level.replace(".1.conv0.", ".3.conv2."): torch.zeros(1), "backbone.fc.bias": torch.zeros(1)},
            r"1 unexpected \(backbone.fc.bias\); 1 of another shape \(mask_feature_head.levels.3.2.conv.weight is",
        ),
        "unknown": (state | {"rpn_head.weight": torch.zeros(1)}, "1 names .*rpn_head.weight"),
    }
    for content, message in faults.values():
        torch.save({"state_dict": content}, tmp_path / "file.pth")
        with pytest.raises(InputError, match=message):
            build_model("solov2_light_r18_fpn_3x", weights=tmp_path / "file.pth", **TINY)


# ---- the command


def test_command_converts_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = scrambled(lively(tiny_model(DCN)))
    names = ["cat", "dog", "emu"]
    state = {original_name(name): tensor for name, tensor in mmdet_state(model).items()}
    torch.save({"meta": {"CLASSES": names}, "state_dict": state}, tmp_path / "theirs.pth")
    paths = [str(tmp_path / name) for name in ("theirs.pth", "ours.pth", "mmdet.pth")]
    assert main(paths[:2]) == 0
    report = capsys.readouterr().out
    assert "original" in report and "DCNv2" in report and f"{len(state)} tensors" in report
    changes: dict[str, Any] = {"deformable_stages": True, "deformable_tower_convs": 2, "deformable_mask_branch": True}
    ours = build_model("solov2_r50_fpn_1x", weights=paths[1], **TINY, **changes)
    assert_same_function(model, ours)
    assert ours.class_names == names
    assert main([*paths[1:], "--to", "mmdet"]) == 0
    written = load_file(paths[2])
    assert written["state_dict"].keys() == mmdet_state(model).keys() and written["meta"]["CLASSES"] == names
    assert main(paths[:2]) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*paths[:2], "--overwrite"]) == 0


def test_command_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    torch.save({"state_dict": mmdet_state(tiny_model())}, tmp_path / "good.pth")
    whole = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": build_model("quickstart").state_dict()}, tmp_path / "batch_norm.pth")
    for source, words, target, more in (
        ("missing.pth", "does not exist", "out.pth", ()),
        ("text.pth", "text.pth", "out.pth", ()),
        ("cut.pth", "truncated", "out.pth", ()),
        ("other.pth", "other.pth: ", "out.pth", ()),
        ("good.pth", "is not a folder", "text.pth/out.pth", ()),
        ("batch_norm.pth", "group norm", "out.pth", ("--to", "mmdet")),
    ):
        assert main([str(tmp_path / source), str(tmp_path / target), *more]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("error: ") and errors.count("\n") == 1 and words in errors, errors
    assert not (tmp_path / "out.pth").exists()


# ---- published files


def test_official_weights_are_those_of_the_named_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from the mirror, and then from the cache; without them, the error says what to do."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setenv(MIRROR, str(tmp_path))
    name = "solov2_light_r18_fpn_3x"
    torch.save({"state_dict": mmdet_state(scrambled(tiny_model()))}, tmp_path / "theirs.pth")
    digest = sha256_of(tmp_path / "theirs.pth")
    file = PublishedFile(name, "mmdet", ("http://127.0.0.1:9/theirs.pth",), 29.7, "Apache-2.0", digest)
    monkeypatch.setattr(published, "PUBLISHED_FILES", (file,))
    for weights in ("official", "official:mmdet"):  # the second time, from the cache
        assert_same_function(build_model(name, weights=weights, **TINY), scrambled(tiny_model()))
        (tmp_path / "theirs.pth").unlink(missing_ok=True)
    file.cached.unlink()
    with pytest.raises(InputError, match="127.0.0.1:9/theirs.pth .*refused") as error:
        build_model(name, weights="official")
    assert str(file.cached) in str(error.value)
    with pytest.raises(InputError, match="official:authors, only as official:mmdet"):
        build_model(name, weights="official:authors")
    with pytest.raises(InputError, match="quickstart.*solov2_light_r18_fpn_3x"):
        official_weights("quickstart")


def test_no_two_names_map_to_the_same_tensor() -> None:
    for prefixes in PREFIXES.values():
        assert len(set(prefixes.values())) == len(prefixes)


def test_unknown_target_families_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": mmdet_state(tiny_model())}, tmp_path / "in.pth")
    with pytest.raises(InputError, match="solov2 or mmdet, not for detectron2"):
        convert_file(tmp_path / "in.pth", tmp_path / "out.pth", to="detectron2")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_head.conv_cls.bias": torch.tensor(1.0)}, r"category layer has shape \[\]"),
        ({"mask_head.conv_cls.bias": torch.zeros(7)}, r"category layer has shape \[7\]"),
        ({"data_preprocessor.mean": torch.zeros(4)}, "data_preprocessor.mean has 4 numbers"),
        ({"data_preprocessor.std": torch.tensor([1.0, 0, 1])}, "model.pixel_std"),
        ({"mask_head.conv_cls.weight": torch.full((3, 32, 3, 3), torch.nan)}, "head.category_predictor.weight has 864"),
        (
            {"mask_head.conv_cls.bias": torch.zeros(3).long()},
            "1 of another kind .*head.category_predictor.bias is int64",
        ),
        ({"backbone.layer2.0.conv1.conv_offset.weight": torch.zeros(2)}, "1 unexpected"),
        ({7: torch.zeros(2)}, "1 names .* 7"),
    ],
)
def test_tensors_of_a_wrong_kind(tmp_path: Path, changes: dict[Any, Tensor], message: str) -> None:
    torch.save({"state_dict": {**mmdet_state(tiny_model()), **changes}}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=f"file.pth.*{message}"):
        build_model("solov2_light_r18_fpn_3x", weights=tmp_path / "file.pth", **TINY)
