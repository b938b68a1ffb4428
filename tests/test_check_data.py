"""Checking a dataset: planted faults are found and nothing else; statistics, repair and the command."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers.coco_files import CocoTree, annotation, rectangle
from PIL import Image

from solov2.commands.check_data import main
from solov2.config import Config, load_config, override_config
from solov2.data.annotations import category_id_shift, load_json
from solov2.data.coco import CocoInstances
from solov2.data_check.check import check_data
from solov2.data_check.findings import SEVERITIES, Instances
from solov2.data_check.quick import quick_check
from solov2.data_check.statistics import PUBLISHED_BORDERS, crowded_share, suggest, suggest_grids


def config_of(*settings: str) -> Config:
    return load_config("solov2_r50_fpn_1x", ["data.train_scales=[48]", "data.train_long_edge=64", *settings])


@pytest.fixture
def tree(tmp_path: Path) -> CocoTree:
    return CocoTree(tmp_path)


@pytest.fixture(scope="module")
def breaker(repo_root: Path) -> ModuleType:
    """tests/scripts/break_photos.py as a module."""
    spec = importlib.util.spec_from_file_location("break_photos", repo_root / "tests" / "scripts" / "break_photos.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(tree: CocoTree, *arguments: str) -> int:
    tree.file.write_text(json.dumps(tree.content))
    settings = ["--set", "data.train_scales=[48]", "--set", "data.train_long_edge=64", "--workers", "1"]
    return main([str(tree.file), "--images", str(tree.images), *settings, *arguments])


def findings_of(report: object) -> Counter:
    return Counter((finding.kind, finding.image_id, finding.annotation_id) for finding in report.findings)


def generated(folder: Path) -> tuple[Path, Path]:
    """28 images of 96 x 72 with three squares each, plus one too small to be broken, so that no image becomes empty."""
    (folder / "clean").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    for number in range(28):
        noise = np.random.RandomState(number).randint(0, 256, (72, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "clean" / f"{number}.jpg")
        content["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 96, "height": 72})
        for place in range(4):
            box = (2 + 31 * place, 5 + number, 27, 30) if place < 3 else (70, 62, 20, 9)
            content["annotations"].append(annotation(100 * number + place, number, 1, box))
    (folder / "clean.json").write_text(json.dumps(content))
    return folder / "clean.json", folder / "clean"


def assert_all_found(breaker: ModuleType, annotations: Path, images: Path, out: Path, config: Config) -> Counter:
    before = findings_of(check_data(load_json(annotations), images, config))
    planted = Counter(breaker.break_data(annotations, images, out))
    after = findings_of(check_data(load_json(out / "instances.json"), out / "images", config))
    assert after - before == planted
    dead = {image_id for kind, image_id, _ in planted if kind in ("file outside", "size")}
    assert {image_id for _, image_id, _ in before - after} <= dead
    return planted


def test_every_planted_fault_is_found_and_no_other(breaker: ModuleType, tmp_path: Path) -> None:
    config = config_of("data.train_scales=[72]", "data.train_long_edge=96")
    planted = assert_all_found(breaker, *generated(tmp_path), tmp_path / "out", config)
    kinds = {kind for kind, _, _ in planted}
    of_the_file = {"categories off by one", "boxes as corners", "many crowds", "no masks"}
    of_the_image = {"no cell", "no mask pixel", "small image", "animation"}
    assert set(SEVERITIES) - kinds == {*of_the_file, *of_the_image, "file name", "id 0"}


def test_planted_faults_in_photographs(breaker: ModuleType, tmp_path: Path, coco_photos: Path) -> None:
    config = config_of("data.train_scales=[96]", "data.train_long_edge=160")  # small, because only the findings matter
    annotations = coco_photos / "annotations" / "instances_val2017.json"
    assert_all_found(breaker, annotations, coco_photos / "val2017", tmp_path / "out", config)


def test_clean_data(tree: CocoTree, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert run(tree, "--json", str(tmp_path / "report.json")) == 0
    out = capsys.readouterr().out
    assert "0 errors, 0 warnings, 0 notes" in out and "3 images, 6 usable instances" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["findings"] == [] and report["counts"] == {"error": 0, "warning": 0, "note": 0}
    statistics = report["statistics"]
    assert statistics["instances_by_class"] == {"car": 3, "bus": 3}
    assert statistics["instances_per_level"] == [6, 0, 0, 0, 0] and statistics["suggestion"] is None
    assert statistics["unseen_instances"] == statistics["hidden_instances"] == []


def test_findings_are_printed_and_written(tree: CocoTree, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    tree.first["area"] = 0
    tree.content["annotations"][2]["area"] = -1
    (tree.images / "3.png").unlink()
    assert run(tree, "--show", "1", "--json", str(tmp_path / "report.json")) == 1
    out = capsys.readouterr().out
    assert "error: left out (2, --fix repairs them)\n    1.png, image 1, annotation 11: has an area of 0" in out
    assert "1 more" in out and "--show 2" in out and "3 errors, 0 warnings, 0 notes" in out
    found = json.loads((tmp_path / "report.json").read_text())["findings"]
    assert [(f["severity"], f["kind"], f["file"], f["image_id"], f["annotation_id"]) for f in found] == [
        ("error", "left out", "1.png", 1, 11),
        ("error", "left out", "2.png", 2, 21),
        ("error", "missing file", "3.png", 3, None),
    ]


def test_fix(tree: CocoTree, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    tree.first["segmentation"].append([1, 2, 3, 4])
    tree.content["annotations"][3]["bbox"] = [0, 0, 20, 30]
    (tree.images / "3.png").write_bytes(b"")
    out = tmp_path / "fixed.json"
    assert run(tree, "--fix", str(out)) == 1
    before = tree.file.read_bytes()
    changes = json.loads((tmp_path / "fixed.json.changes.json").read_text())
    assert [(change["section"], change["id"], change["action"]) for change in changes] == [
        ("images", 3, "removed"),
        ("annotations", 11, "changed"),
        ("annotations", 22, "changed"),
        ("annotations", 31, "removed"),
        ("annotations", 32, "removed"),
    ]
    fixed = json.loads(out.read_text())
    assert fixed["annotations"][3]["bbox"] == [36, 6, 20, 30] and len(fixed["annotations"][0]["segmentation"]) == 1
    assert len(CocoInstances(out, tree.images, training=True)) == 2
    assert main([str(out), "--images", str(tree.images), "--workers", "1"]) == 0
    assert tree.file.read_bytes() == before
    capsys.readouterr()
    for flag in ("--fix", "--json"):  # the input is never replaced
        assert run(tree, flag, str(tree.file), "--overwrite") == 2
        assert re.fullmatch(rf"error: {flag} .* would replace the input .*\n", capsys.readouterr().err)
    assert run(tree, "--fix", str(out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    out.unlink()
    assert run(tree, "--fix", str(out)) == 2  # the list of changes is still there
    assert run(tree, "--fix", str(out), "--overwrite") == 1 and json.loads(out.read_text()) == fixed


def test_fix_does_not_write_an_empty_file(tree: CocoTree, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tree.images / f"{number}.png").unlink()
    assert run(tree, "--fix", str(tmp_path / "fixed.json")) == 2
    assert not list(tmp_path.glob("fixed*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json", "--images", "."], "annotation file none.json does not exist"),
        (["{file}", "--images", "none"], "image folder none does not exist"),
        (["{file}", "--images", ".", "--config", "solov3"], "unknown model name 'solov3'"),
        (["{file}", "--images", ".", "--fix", "{file}/out.json"], "--fix "),
        (["{file}", "--images", ".", "--json", "{file}"], "--json "),
    ],
)
def test_mistakes(tree: CocoTree, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    tree.file.write_text(json.dumps(tree.content))
    assert main([argument.format(file=tree.file) for argument in arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_findings_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    annotations, images = generated(tmp_path)
    (images / "3.jpg").unlink()
    content, config = load_json(annotations), config_of()
    assert check_data(content, images, config, workers=2) == check_data(content, images, config)


def test_instances_without_a_cell(tree: CocoTree) -> None:
    tree.content["annotations"].append(annotation(13, 1, 1, (50, 40, 2, 2)))
    config = config_of("model.scale_ranges=[[5, 18], [5, 18], [5, 18], [5, 18], [5, 18]]")
    report = check_data(tree.content, tree.images, config)
    assert {(f.kind, f.annotation_id) for f in report.findings} == {("no cell", n) for n in (13, 21, 22)}
    assert report.statistics["unseen_instances"] == [13, 21, 22]
    # at 1/8 of the size, a mask of 2 x 2 falls between the pixels
    report = check_data(tree.content, tree.images, config_of("data.train_scales=[6]"))
    assert ("no cell", 13) in {(f.kind, f.annotation_id) for f in report.findings}
    # at half the size every other row is kept: a mask of one row disappears, though its box is large enough
    tree.content["annotations"][-1] = annotation(13, 1, 1, (4, 41, 40, 1))
    report = check_data(tree.content, tree.images, config_of("data.train_scales=[24]"))
    assert [(f.kind, f.annotation_id) for f in report.findings] == [("no cell", 13)]
    tree.content["annotations"][-1] = annotation(13, 1, 1, (50, 40, 2, 2))
    # with two training sizes, a cell at one of them is enough
    report = check_data(tree.content, tree.images, config_of("data.train_scales=[6, 96]", "data.train_long_edge=128"))
    assert report.findings == []


def test_masks_without_a_pixel_at_stride_4(tree: CocoTree) -> None:
    tree.content["annotations"].append(annotation(13, 1, 1, (4, 40, 20, 1)))
    report = check_data(tree.content, tree.images, config_of())
    assert [(f.kind, f.annotation_id) for f in report.findings] == [("no mask pixel", 13)]


def test_shared_cells(tree: CocoTree) -> None:
    tree.content["annotations"].append(annotation(13, 1, 2, (12, 10, 16, 12)))  # concentric with 11, which it hides
    report = check_data(tree.content, tree.images, config_of("model.grid_sizes=[4, 4, 4, 4, 4]"))
    assert report.findings == []
    assert report.statistics["shared_cells_by_image"].keys() == {"1"} and report.statistics["shared_cells"] >= 1
    assert report.statistics["hidden_instances"] == [11]


@pytest.mark.parametrize(
    ("used", "declared", "shift"),
    [
        (range(80), range(1, 81), 1),
        (range(1, 81), range(80), -1),
        ({0, 3}, range(1, 5), 1),
        ({0, 4}, range(1, 5), 0),  # the last declared id is used too, so 0 is something else
        (range(1, 81), range(1, 81), 0),
        ({0, 5}, {1, 5, 9}, 0),  # gaps: no shift makes all ids known
        ({7}, {1, 2}, 0),
        ((), {1}, 0),
    ],
)
def test_category_id_shift(used: range, declared: range, shift: int) -> None:
    assert category_id_shift(used, declared) == shift


@pytest.mark.parametrize("given", ["quickstart", "configs/quickstart.yaml", "a file"])
def test_suggested_config_can_be_saved_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture, given: str) -> None:
    """The printed block, saved to a file, is the configuration that was checked against with the suggested sizes."""
    annotations, images = generated(tmp_path)
    if given == "a file":
        (tmp_path / "a file").mkdir()
        given = str(tmp_path / "a file" / "base of mine: 1.yaml")
        Path(given).write_text("base: quickstart\ntrain: {epochs: 3}\nmodel: {center_sigma: 0.3}\n")
    words = [str(annotations), "--images", str(images), "--workers", "1", "--config", given]
    assert main([*words, "--json", str(tmp_path / "report.json")]) == 0
    _, block = capsys.readouterr().out.split("\n\n")
    assert block.startswith("# ") and ("\nbase: quickstart\n" in block) == (
        given in ("quickstart", "configs/quickstart.yaml")
    )
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    config, base = load_config(path), load_config(given)

    suggestion = json.loads((tmp_path / "report.json").read_text())["statistics"]["suggestion"]
    assert suggestion.keys() == {"model", "data"}
    overrides = {f"{name}.{key}": value for name in suggestion for key, value in suggestion[name].items()}
    assert config == replace(override_config(base, overrides), name="mine") != replace(base, name="mine")
    report = check_data(load_json(annotations), images, config)
    assert report.statistics["unseen_instances"] == []


@pytest.mark.parametrize(
    ("size", "short", "long"),
    [((1333, 2100), 1333, 2100), ((40, 40), 80, 64)],
    ids=["all large", "long edge too short"],
)
def test_suggestion_is_always_a_valid_configuration(size: tuple[int, int], short: int, long: int) -> None:
    """About a tenth of the instances are tiny, and the others fill their image."""
    config = config_of(f"data.train_scales=[{short}]", f"data.train_long_edge={long}")
    count, full = 100, (size[0] * size[1]) ** 0.5 * min(short / min(size), long / max(size))
    ones = np.ones(count)
    instances = Instances(
        image_size=np.tile(size, (count, 1)), ids=ones, labels=ones, cells=ones, hidden=0 * ones,
        scales=np.where(np.arange(count) < 12, 0.01, 1) * full, centers=np.full((count, 2), 0.5),
    )  # fmt: skip
    suggestion = suggest(instances, np.arange(count), config)
    values = {f"{name}.{key}": value for name in suggestion for key, value in suggestion[name].items()}
    model = override_config(config, values).model
    assert model.input_scale == (long, min(short, long)) and model.scale_ranges[-1][1] >= 2048


def test_suggestion_reproduces_the_published_grids() -> None:
    """Instances in the published proportions get the published grids; crowded ones get finer grids."""
    generator = np.random.RandomState(0)
    scales, centers = generator.uniform(1, 900, 400), generator.uniform(0, 1, (400, 2))
    ranges = [(1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)]
    grids = suggest_grids(scales, centers, np.arange(400), 800, PUBLISHED_BORDERS, ranges)
    assert grids == [40, 36, 24, 16, 12]
    crowd = np.zeros(400, dtype=np.int64)
    finer = suggest_grids(np.full(400, 20.0), centers, crowd, 800, PUBLISHED_BORDERS, ranges)
    assert finer[0] > 40
    assert crowded_share(np.full(2, 20.0), np.full((2, 2), 0.5), np.zeros(2, int), [40] * 5, ranges) == 1
    assert crowded_share(np.full(2, 20.0), np.full((2, 2), 0.5), np.arange(2), [40] * 5, ranges) == 0


def test_quick_check(tree: CocoTree, monkeypatch: pytest.MonkeyPatch) -> None:
    def messages(*settings: str) -> list[str]:
        tree.file.write_text(json.dumps(tree.content))
        dataset = CocoInstances(tree.file, tree.images, training=True)
        with monkeypatch.context() as patch:  # the file must not be read again
            patch.setattr(json, "loads", lambda *_: pytest.fail("the file was parsed again"))
            return quick_check(dataset, config_of(*settings))

    assert messages() == []
    [unseen] = messages("model.scale_ranges=[[1, 25], [1, 25], [1, 25], [1, 25], [1, 25]]")
    assert unseen.startswith("1 of 6 instances (16.7%) ") and "model.scale_ranges" in unseen
    tree.content["categories"].append({"id": 9, "name": "van"})
    [unused] = messages()
    assert unused.startswith("1 of 3 classes ") and unused.endswith(": van")
    tree.content["categories"].pop()
    for entry in tree.content["annotations"]:
        entry["category_id"] -= 1
    [shifted] = messages()
    assert "off by one" in shifted and "0 to 1 " in shifted and "1 to 2 " in shifted and "add 1 " in shifted


def test_quick_check_agrees_with_the_assigner(tree: CocoTree) -> None:
    """The assigner also compares the box area with the ranges, for every mask that has a pixel left."""
    generator = np.random.RandomState(0)
    for number in range(100, 140):
        x, y = generator.uniform(0, 50), generator.uniform(0, 36)
        width, height = generator.uniform(2, 60 - x), generator.uniform(2, 46 - y)
        entry = annotation(number, 1, 1, (x, y, width, height))
        tree.content["annotations"].append({**entry, "segmentation": rectangle(x, y, width, height)})
    tree.file.write_text(json.dumps(tree.content))
    config = config_of(
        "model.scale_ranges=[[3, 8], [12, 14], [12, 14], [12, 14], [20, 30]]", "data.train_scales=[48, 30]"
    )
    report = check_data(tree.content, tree.images, config)
    unseen = len([finding for finding in report.findings if finding.kind == "no cell"])
    assert 0 < unseen < 40
    dataset = CocoInstances(tree.file, tree.images, training=True)
    [message] = quick_check(dataset, config)
    assert message.startswith(f"{unseen} of 46 instances")
