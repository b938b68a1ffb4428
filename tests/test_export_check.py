"""An exported file beside its model: what counts as equal, and what each runtime finds."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import lively, save_content, tiny_model
from helpers.tiny_runs import tiny_config
from PIL import Image
from torch import Tensor

from solov2.build import construct
from solov2.commands import export as command
from solov2.export.check import Comparison, compare, load_image, match_instances, model_results
from solov2.export.files import file_metadata, save_program
from solov2.export.graph import ExportedSOLOv2, export_program
from solov2.export.runtimes import find_runtimes, open_file
from solov2.models.solov2 import SOLOv2
from solov2.ops.masks import encode_rle

SIZE = (64, 96)
NAMES = ["cat", "dog", "owl", "cow"]
Outputs = dict[str, Tensor]


def tiny(**more: int) -> SOLOv2:
    torch.manual_seed(0)
    changes = (f"model.{key}={value}" for key, value in more.items())
    stuff = [f"stuff {i}" for i in range(more.get("num_stuff", 0))]
    return lively(construct(tiny_config("model.max_instances=20", *changes).model, NAMES, stuff)).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of smooth pictures, wide, high and small."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number, size in enumerate([(130, 90), (60, 100), (40, 44), (96, 64)]):
        noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    config = tiny_config("model.max_instances=20").to_dict()
    save_content(path, {"model": tiny().state_dict(), "config": config, "class_names": NAMES})
    return path


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return export_program(tiny(), SIZE)


def result(*instances: tuple[float, int, slice]) -> dict[str, Any]:
    """A result of instances (score, label, columns of the mask in an image of 4 x 40 pixels)."""
    masks = torch.zeros(len(instances), 4, 40, dtype=torch.bool)
    for mask, (_, _, columns) in zip(masks, instances):
        mask[:, columns] = True
    scores, labels = (torch.tensor([instance[i] for instance in instances]) for i in (0, 1))
    return {"scores": scores, "labels": labels, "masks": encode_rle(masks)}


LEFT, RIGHT, NOTHING = slice(0, 20), slice(20, 40), slice(0, 0)


def test_instances_are_paired_by_label_and_mask() -> None:
    wanted = result((0.9, 1, LEFT), (0.8, 1, RIGHT), (0.7, 2, RIGHT), (0.6, 0, NOTHING), (0.5, 3, LEFT))
    found = result((0.9, 1, RIGHT), (0.8, 1, slice(0, 19)), (0.7, 0, RIGHT), (0.6, 0, NOTHING))
    assert match_instances(wanted, found) == [(0, 1, pytest.approx(0.95)), (1, 0, 1.0), (3, 3, 1.0)]
    equal = result((0.9, 1, LEFT), (0.8, 1, LEFT))
    assert match_instances(equal, equal) == [(0, 0, 1.0), (1, 1, 1.0)]
    assert match_instances(wanted, result()) == match_instances(result(), wanted) == []


@pytest.mark.parametrize(
    ("found", "within"),
    [
        (((0.9, 1, LEFT), (0.3, 2, RIGHT)), True),
        (((0.9009, 1, LEFT), (0.3, 2, RIGHT)), True),
        (((0.902, 1, LEFT), (0.3, 2, RIGHT)), False),
        (((0.9, 1, slice(0, 19)), (0.3, 2, RIGHT)), False),
        (((0.9, 1, LEFT), (0.3, 1, RIGHT)), False),
        (((0.9, 1, LEFT),), False),
        (((0.9, 1, LEFT), (0.3, 2, RIGHT), (0.2, 2, LEFT)), False),
        (((0.9, 1, LEFT), (0.3, 2, RIGHT), (0.1005, 2, LEFT)), True),  # at the threshold of 0.1, as good as none
    ],
)
def test_what_is_within_the_tolerance(found: tuple, within: bool) -> None:
    comparison = Comparison("a runtime")
    comparison.add(result((0.9, 1, LEFT), (0.3, 2, RIGHT)), result(*found), lowest_score=0.1)
    assert comparison.within_tolerance == within
    assert (comparison.instances, comparison.found) == (2, len(found))


def test_the_background_does_not_count_as_equal() -> None:
    """A mask of 80 pixels of 160, of which the file has 76 and no other: 95 % are equal."""
    comparison = Comparison("a runtime")
    comparison.add(result((0.9, 1, LEFT)), result((0.9, 1, slice(0, 19))), lowest_score=0.1)
    assert comparison.equal_pixels == pytest.approx(0.95) and not comparison.within_tolerance


def test_images_fit_into_the_input_of_a_file(images: Path) -> None:
    model = tiny()
    for size in ((64, 64), (32, 96)):
        for path in sorted(images.iterdir()):
            batch = load_image(path, size, model.input_scale)
            [inner], [original] = batch["sizes"].tolist(), batch["original_sizes"].tolist()
            assert batch["pixels"].shape == (1, 3, *size) and tuple(original) == Image.open(path).size[::-1]
            assert max(inner) == 64 or inner[0] == size[0]
            assert not batch["pixels"][:, :, inner[0] :].any() and not batch["pixels"][..., inner[1] :].any()
            if size == (64, 64):
                wanted = model.load_batch(path)
                height, width = wanted["pixels"].shape[2:]
                assert (
                    torch.equal(batch["pixels"][..., :height, :width], wanted["pixels"])
                    and [inner] == wanted["sizes"].tolist()
                )


@pytest.mark.parametrize("num_stuff", [0, 3])
def test_differences_of_a_file_are_found(images: Path, num_stuff: int) -> None:
    """The exported module stands for a file, once as it is, then with each of its outputs changed."""
    model = tiny(num_stuff=num_stuff)
    module = ExportedSOLOv2(model).eval()

    def compared(change: Callable[[Outputs], Outputs]) -> Comparison:
        def run(pixels: Tensor, sizes: Tensor) -> Outputs:
            with torch.no_grad():
                return change(dict(module(pixels, sizes)))

        return compare(run, "a runtime", model, sorted(images.iterdir())[:1], SIZE)

    same = compared(lambda outputs: outputs)
    assert same.within_tolerance and same.instances == same.found == same.matched == same.in_order >= 10
    assert len(same.seconds) == 1 and ("stuff" in str(same)) == bool(num_stuff)
    assert not compared(lambda outputs: outputs | {"scores": outputs["scores"] * 0.9}).within_tolerance
    assert not compared(lambda outputs: outputs | {"labels": 3 - outputs["labels"]}).within_tolerance
    assert not compared(lambda outputs: outputs | {"masks": outputs["masks"].roll(1, 3)}).within_tolerance
    assert not compared(lambda outputs: outputs | {"scores": outputs["scores"].fill_(0)}).within_tolerance
    if num_stuff:
        assert not compared(lambda outputs: outputs | {"semantic": -outputs["semantic"]}).within_tolerance


def words(checkpoint: Path, output: Path, *more: str) -> list[str]:
    return ["--weights", str(checkpoint), "--size", "64", "96", "--output", str(output), *more]


def test_the_command_compares_and_fails(
    checkpoint: Path,
    program: torch.export.ExportedProgram,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Made on the CPU, whatever the machine has; a file that differs gives exit code 1 in float32 only."""
    devices: list[str] = []
    monkeypatch.setattr("solov2.compute.select_device", lambda name: devices.append(name) or torch.device("cpu"))
    image = str(images / "0.png")
    assert command.main(words(checkpoint, tmp_path / "tiny.pt2", "--check", image)) == 0
    assert devices == ["cpu"]
    line = capsys.readouterr().out.splitlines()[1]
    assert re.match(r"torch: (\d+) of \1 instances found", line)
    loaded = torch.export.load(tmp_path / "tiny.pt2")
    devices = [node.kwargs["device"].type for node in loaded.graph.nodes if "device" in node.kwargs]
    devices += [value.device.type for value in (*loaded.state_dict.values(), *loaded.constants.values())]
    assert set(devices) == {"cpu"}

    monkeypatch.setattr("solov2.export.check.SCORE_TOLERANCE", -1.0)  # no file is good enough
    monkeypatch.setattr("solov2.export.graph.export_program", lambda *arguments, **options: program)
    for precision, code in (("float32", 1), ("bf16", 0)):
        more = ["--precision", precision, "--overwrite", "--check", image]
        assert command.main(words(checkpoint, tmp_path / "tiny.pt2", *more)) == code
    assert "in torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("a.pt2", ["--precision", "fp16"], "a.pt2: .*fp16"),
        ("a.pt2", ["--precision", "int8", "--calibrate", "."], "a.pt2: .*int8"),
        ("a.onnx", ["--precision", "bf16"], "a.onnx: .*bf16"),
        ("a.onnx", ["--precision", "int8"], "--calibrate"),
        ("a.onnx", ["--calibrate", "."], "--calibrate"),
        ("a.pt2", ["--check", "nowhere.jpg"], "nowhere.jpg"),
        ("a.pt2", ["--check", __file__], "test_export_check.py"),
        ("a.pt2", ["--raw", "--check", "."], "--raw"),
    ],
)
def test_mistakes_are_told_before_any_work(
    output: str, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    assert command.main(words(tmp_path / "not_read.pth", tmp_path / output, *more)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_a_check_without_a_runtime(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(words(checkpoint, tmp_path / "tiny.onnx", "--check", str(images))) == 2
    assert "solov2[export]" in capsys.readouterr().err


@pytest.fixture(scope="module")
def batches(images: Path) -> list[Outputs]:
    return [load_image(path, SIZE, tiny().input_scale) for path in sorted(images.iterdir())]


def test_bf16_keeps_float32_from_the_masks_on(batches: list[Outputs], tmp_path: Path) -> None:
    model, batch = tiny(), batches[0]
    save_program(export_program(model, SIZE, dtype=torch.bfloat16), tmp_path / "bf16.pt2", file_metadata(model))
    found = open_file(tmp_path / "bf16.pt2", "torch")(batch["pixels"], batch["sizes"])
    assert {values.dtype for values in found.values()} == {torch.float32, torch.int64}
    wanted = model_results(model, batch)
    assert 0 < (found["scores"][0, :3] - wanted["scores"][:3]).abs().max() < 0.05


@pytest.mark.parametrize("precision", ["float32", "int8", pytest.param("fp16", marks=pytest.mark.slow)])
def test_onnx_in_every_runtime(
    precision: str, program: torch.export.ExportedProgram, images: Path, batches: list[Outputs], tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, path = tiny(), tmp_path / "tiny.onnx"
    if precision == "fp16":
        program = export_program(model, SIZE, dtype=torch.float16)
    save_program(program, path, file_metadata(model), batches if precision == "int8" else None)
    runtimes = find_runtimes(path)
    assert runtimes[0] == "ONNX Runtime"
    for runtime in runtimes:
        comparison = compare(open_file(path, runtime), runtime, model, sorted(images.iterdir())[:2], SIZE)
        assert (comparison.within_tolerance or precision != "float32") and comparison.instances >= 20
        # The masks of a random network are those of noise, which low precision changes most.
        assert comparison.matched >= (1.0 if precision == "float32" else 0.2) * comparison.instances
        assert comparison.score_difference < 0.05
    if precision == "int8":
        quantized_weights(path)


def quantized_weights(path: Path) -> None:
    """Weights of backbone, FPN and head are int8 in the file, all others float32."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(path).graph
    types = {constant.name: constant.data_type for constant in graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    found: dict[int, set[str]] = {onnx.TensorProto.INT8: set(), onnx.TensorProto.FLOAT: set()}
    for node in graph.node:
        if node.op_type == "Conv":
            scopes = next(entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes"))
            found[types[sources.get(node.input[1], node.input[1])]] |= set(re.findall(r"'model\.(\w+)'", scopes))
    assert found[onnx.TensorProto.INT8] == {"backbone", "fpn", "head"}
    assert found[onnx.TensorProto.FLOAT] == {"mask_feature_head"}


@pytest.mark.slow
def test_deformable_convolutions(images: Path, tmp_path: Path) -> None:
    """ONNX Runtime has them; a runtime that lacks the operator is named in a sentence."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, path = lively(tiny_model("deformable everywhere", input_scale=(64, 64))).eval(), tmp_path / "tiny.onnx"
    save_program(export_program(model, SIZE), path, file_metadata(model))
    comparison = compare(open_file(path, "ONNX Runtime"), "ONNX Runtime", model, sorted(images.iterdir()), SIZE)
    assert comparison.within_tolerance and comparison.matched
    if "openvino" in sys.modules or "OpenVINO" in find_runtimes(path):
        with pytest.raises(ValueError, match="OpenVINO cannot run .*: it has no operator DeformConv"):
            open_file(path, "OpenVINO")


def test_metadata_of_a_file() -> None:
    assert file_metadata(tiny()) == {
        "class_names": '["cat", "dog", "owl", "cow"]', "input_scale": "[64, 64]", "mask_threshold": "0.5",
    }  # fmt: skip
    assert file_metadata(tiny(num_stuff=2))["stuff_names"] == '["stuff 0", "stuff 1"]'
