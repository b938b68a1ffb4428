"""The exported graph finds the same instances as the model, and its file suffices to run it."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import torch.nn.functional as F
from helpers.parity import POSTPROCESS_CASES, postprocess_settings, raw_outputs
from helpers.tiny_models import VARIANTS, lively, save_content, tiny_model
from helpers.tiny_runs import tiny_config
from torch import Tensor
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_leaves

from solov2.build import build_model, construct
from solov2.commands.export import main
from solov2.export import graph
from solov2.export.graph import ExportedSOLOv2, export_program, select_instances
from solov2.models.postprocess import flatten_raw, postprocess

SIZE = (64, 96)
NAMES, STUFF = ["cat", "dog", "owl", "cow"], ["road", "grass", "sky"]


def final_masks(soft: Tensor, size: tuple[int, int], original_size: tuple[int, int], threshold: float) -> Tensor:
    """What the README tells users to do with the masks [K, h, w] of an exported file: bool [K, H, W]."""
    height, width = size
    soft = F.interpolate(soft[None], scale_factor=4, mode="bilinear")[..., :height, :width]
    return F.interpolate(soft, size=original_size, mode="bilinear")[0] > threshold


@pytest.mark.parametrize(
    "name",
    ["normal", "batch_of_three", "area_filter", "linear_kernel", "over_100_survive", "crop_up", "nothing_passes"],
)
def test_instances_equal_those_of_postprocess(name: str) -> None:
    """Cases of the reference, in float64 so that ties and thresholds come out the same."""
    case = POSTPROCESS_CASES[name]
    settings, raw = postprocess_settings(case), raw_outputs(case["tag"], case["params"], torch.float64)
    sizes, originals = ([tuple(meta[key]) for meta in case["metas"]] for key in ("img_shape", "ori_shape"))
    scores, _, _ = flatten_raw(raw, settings)
    num_cells = max(20, int((scores.amax(2) > settings.category_threshold).sum(1).max()))
    fixed = select_instances(raw, settings, num_cells=num_cells)
    wanted = postprocess(raw, sizes, originals, settings)
    assert fixed["scores"].shape == fixed["labels"].shape == (len(wanted), settings.max_instances)
    for i, result in enumerate(wanted):
        count = len(result["scores"])
        assert torch.allclose(fixed["scores"][i, :count], result["scores"], atol=1e-9)
        assert not fixed["scores"][i, count:].any()
        found = list(zip(fixed["labels"][i, :count].tolist(), fixed["scores"][i], fixed["masks"][i]))
        for label, score, mask in zip(result["labels"].tolist(), result["scores"], result["masks"]):
            # Instances of equal scores may come in any order.
            alike = torch.stack([m for own, s, m in found if own == label and abs(s - score) <= 1e-9])
            masks = final_masks(alike, sizes[i], originals[i], settings.mask_threshold)
            assert (masks ^ mask).flatten(1).sum(1).min() <= 1


@pytest.mark.parametrize("raw", [False, True])
def test_a_program_runs_on_any_device(raw: bool) -> None:
    """torch moves it, constants included; "meta" stands for a device that this machine need not have."""
    program = export_program(construct(tiny_config().model, NAMES), SIZE, raw=raw)
    moved = move_to_device_pass(program, "meta").module()
    found = moved(torch.zeros(3, 3, *SIZE, dtype=torch.uint8, device="meta"), torch.zeros(3, 2).long().to("meta"))
    assert {leaf.device.type for leaf in tree_leaves(found)} == {"meta"}


def test_fewer_cells_keep_the_best_ones() -> None:
    """Without the cells of the lowest category scores, the best instances stay the same."""
    case = POSTPROCESS_CASES["normal"]
    settings, raw = postprocess_settings(case), raw_outputs(case["tag"], case["params"], torch.float64)
    everything, fewer = (select_instances(raw, settings, num_cells=count) for count in (1000, 200))
    assert torch.allclose(everything["scores"][0, 0], fewer["scores"][0, 0])
    assert (select_instances(raw, settings, num_cells=3)["scores"] > 0).sum() < (fewer["scores"] > 0).sum()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a tiny network that finds something."""
    torch.manual_seed(0)
    config = tiny_config("model.max_instances=20")
    model = lively(construct(config.model, NAMES))
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    save_content(path, {"model": model.state_dict(), "config": config.to_dict(), "class_names": NAMES})
    return path


def arguments(checkpoint: Path, output: Path, *more: str) -> list[str]:
    size = [str(side) for side in SIZE]
    return ["--weights", str(checkpoint), "--size", *size, "--output", str(output), "--device", "cpu", *more]


def test_a_file_runs_without_the_library(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written by the command, read by torch alone: batches of other sizes, images smaller than the padded size."""
    path = tmp_path / "tiny.pt2"
    assert main(arguments(checkpoint, path)) == 0
    assert "pixels uint8 [B, 3, 64, 96]" in capsys.readouterr().out and [*tmp_path.iterdir()] == [path]

    extra = {"class_names.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra["class_names.json"]) == NAMES
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if "stuff_names" in name]  # which only panoptic files have
    model, module = build_model(weights=checkpoint), program.module()
    for sizes in ([(64, 96)], [(64, 96), (50, 70), (33, 96)]):
        pixels = torch.randint(0, 256, (len(sizes), 3, *SIZE), dtype=torch.uint8)
        with torch.no_grad():
            found = module(pixels, torch.tensor(sizes))
            wanted = model.postprocess(model(model.normalize(pixels, torch.tensor(sizes))), sizes, sizes)
        assert found["masks"].shape == (len(sizes), 20, 16, 24)
        for i, result in enumerate(wanted):
            count = len(result["scores"])
            assert 0 < count <= 20 and (found["scores"][i] > 0).sum() == count
            assert torch.allclose(found["scores"][i, :count], result["scores"], atol=1e-4)
            masks = final_masks(found["masks"][i, :3], sizes[i], sizes[i], 0.5)
            assert torch.equal(found["labels"][i, :3], result["labels"][:3])
            assert (masks ^ result["masks"][:3]).sum() <= 3


@pytest.fixture(scope="module")
def panoptic_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a panoptic network."""
    torch.manual_seed(0)
    config = tiny_config("model.max_instances=20", "model.num_stuff=3", "model.semantic_channels=32")
    model = lively(construct(config.model, NAMES, STUFF))
    path = tmp_path_factory.mktemp("weights") / "panoptic.pth"
    content = {"model": model.state_dict(), "config": config.to_dict(), "class_names": NAMES}
    save_content(path, content | {"stuff_names": STUFF, "stuff_category_ids": [5, 6, 7]})
    return path


@pytest.mark.parametrize("raw", [False, True])
def test_a_panoptic_file_has_semantic_logits(
    panoptic_checkpoint: Path, raw: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, extra = tmp_path / "tiny.pt2", {"class_names.json": "", "stuff_names.json": ""}
    assert main(arguments(panoptic_checkpoint, path, *(["--raw"] if raw else []))) == 0
    assert ("semantic logits" in capsys.readouterr().out) != raw
    module = torch.export.load(path, extra_files=extra).module()
    assert [json.loads(extra[f"{name}.json"]) for name in ("class_names", "stuff_names")] == [NAMES, STUFF]
    model, sizes = build_model(weights=panoptic_checkpoint), torch.tensor([(64, 96), (50, 70), (33, 96)])
    pixels = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8)
    with torch.no_grad():
        found, wanted = module(pixels, sizes), model(model.normalize(pixels, sizes))
    outputs = [*wanted] if raw else ["scores", "labels", "masks", "semantic"]
    logits = found["semantic_logits" if raw else "semantic"]
    assert [*found] == outputs and logits.shape == (3, 4, 16, 24) and logits.dtype == torch.float32
    assert torch.allclose(logits, wanted["semantic_logits"], atol=1e-5) and logits.std() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--size", "60", "96"], "size 60 x 96: .* multiples of 32"),
        (["--output", "model.pth"], r"model\.pth: .*\.pt2 .*\.onnx"),
        (["--output", f"{__file__}/model.pt2"], f"--output {__file__}/model.pt2: {__file__} "),
        (["--weights", "nowhere.pth"], r"nowhere\.pth"),
        (["--max-instances", "-1"], "--max-instances: .*0.*-1"),
        (["--set", "model.max_candidates=0"], r"model\.max_candidates"),
        (["--cells", "0"], "--cells: .*1.* 0"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    assert main(arguments(checkpoint, tmp_path / "tiny.pt2", *changes)) == 2
    captured = capsys.readouterr()
    assert re.match(f"error: .*{message}", captured.err) and captured.err.count("\n") == 1
    assert not captured.out and not [*tmp_path.iterdir()]


def test_an_existing_file_is_kept_unless_overwrite_succeeds(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.pt2"
    path.write_text("old")
    assert main(arguments(checkpoint, path)) == 2
    assert "already exists" in capsys.readouterr().err and path.read_text() == "old"

    def full(program: object, file: BinaryIO, **options: object) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(graph, "export_program", lambda *arguments, **options: None)
    monkeypatch.setattr(torch.export, "save", full)
    assert main(arguments(checkpoint, path, "--overwrite")) == 2
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_onnx_without_its_packages(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(arguments(checkpoint, tmp_path / "tiny.onnx")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ONNX ") and error.endswith("pip install 'solov2[export]'\n")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_onnx(checkpoint: Path, tmp_path: Path) -> None:
    """ONNX Runtime finds the same instances, with another batch size than the traced one."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(arguments(checkpoint, tmp_path / "tiny.onnx")) == 0
    session = onnxruntime.InferenceSession(tmp_path / "tiny.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == NAMES
    pixels, sizes = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8), torch.tensor([SIZE, (50, 70), (33, 96)])
    outputs = session.run(["scores", "labels", "masks"], {"pixels": pixels.numpy(), "sizes": sizes.numpy()})
    with torch.no_grad():
        wanted = ExportedSOLOv2(build_model(weights=checkpoint))(pixels, sizes)
    for name, found in zip(("scores", "labels", "masks"), outputs, strict=True):
        assert torch.allclose(torch.from_numpy(found), wanted[name], atol=1e-3), name


@pytest.mark.slow
def test_onnx_of_a_panoptic_model(panoptic_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(arguments(panoptic_checkpoint, tmp_path / "tiny.onnx")) == 0
    session = onnxruntime.InferenceSession(tmp_path / "tiny.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert [json.loads(metadata[key]) for key in ("class_names", "stuff_names")] == [NAMES, STUFF]
    pixels, sizes = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8), torch.tensor([SIZE, (50, 70), (33, 96)])
    [found] = session.run(["semantic"], {"pixels": pixels.numpy(), "sizes": sizes.numpy()})
    with torch.no_grad():
        wanted = ExportedSOLOv2(build_model(weights=panoptic_checkpoint))(pixels, sizes)["semantic"]
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_network(variant: str, raw: bool) -> None:
    model = lively(tiny_model(variant))
    program, module = export_program(model, SIZE, raw=raw), ExportedSOLOv2(model, raw=raw)
    pixels, sizes = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8), torch.tensor([(50, 70)])
    with torch.no_grad():
        wanted, found = module(pixels, sizes), program.module()(pixels, sizes)
    assert found.keys() == wanted.keys()
    for one, other in zip(tree_leaves(wanted), tree_leaves(found), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-4)
