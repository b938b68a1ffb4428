"""Missing and unusable data is refused before training, with a sentence that says what to do."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.coco_files import CocoTree

from solov2.commands.evaluate import main as evaluate_main
from solov2.commands.train import main as train_main
from solov2.config import load_config
from solov2.data.build import locate_data, require_data, worker_count
from solov2.data.shapes import generate_shapes
from solov2.errors import InputError
from solov2.training import validation
from solov2.training.dry_run import missing_data


@pytest.fixture
def tree(tmp_path: Path) -> CocoTree:
    tree = CocoTree(tmp_path)
    tree.file.write_text(json.dumps(tree.content))
    return tree


def words(tree: CocoTree, **places: Path) -> list[str]:
    given = {"train_annotations": tree.file, "train_images": tree.images} | places
    named = [word for key, path in given.items() for word in (f"--{key.replace('_', '-')}", str(path))]
    return [*named, "--output", str(tree.file.parent / "run")]


def mistake(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """The error of a training run that ends before it writes anything."""
    assert train_main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and not Path(arguments[-1]).exists()
    return error


def test_training_annotations_alone(
    tree: CocoTree, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree.file.parent)
    error = mistake(capsys, words(tree))
    assert "no validation data" in error and "cocodataset.org" not in error
    assert all(word in error for word in ("--val-annotations", "--val-images", "--evaluate-every 0"))
    error = mistake(capsys, words(tree, train_images=Path("none")))
    assert "none does not exist; name it with --train-images" in error
    error = mistake(capsys, ["--train-annotations", str(tree.file), "--output", str(tree.file.parent / "run")])
    assert "data/coco/train2017 does not exist; name it with --train-images" in error


def test_images_of_a_coco_folder(tree: CocoTree, capsys: pytest.CaptureFixture) -> None:
    annotations = tree.file.parent / "annotations" / "instances_train2017.json"
    annotations.parent.mkdir()
    tree.file.rename(annotations)
    error = mistake(capsys, ["--data", str(tree.file.parent), "--output", str(tree.file.parent / "run")])
    assert "train2017 does not exist; put the images there, or name their folder with --train-images" in error


def test_data_folder_is_missing_or_a_file(tree: CocoTree, capsys: pytest.CaptureFixture) -> None:
    error = mistake(capsys, ["--data", "/nowhere/coco", "--output", str(tree.file.parent / "run")])
    assert "there is no folder /nowhere/coco" in error
    error = mistake(capsys, ["--data", str(tree.file), "--output", str(tree.file.parent / "run")])
    assert f"{tree.file} is a file" in error and "--train-annotations" in error


@pytest.mark.parametrize("left", ["nothing", "crowds", "another category"])
def test_validation_without_annotations_is_refused_before_training(
    tree: CocoTree, capsys: pytest.CaptureFixture, left: str
) -> None:
    changes = {"crowds": {"iscrowd": 1}, "another category": {"category_id": 9}}
    tree.content["annotations"] = [a | changes[left] for a in tree.content["annotations"] if left in changes]
    validation = tree.file.with_name("val.json")
    validation.write_text(json.dumps(tree.content))
    error = mistake(capsys, words(tree, val_annotations=validation, val_images=tree.images))
    assert f"{validation} has no annotations to evaluate against" in error and "--evaluate-every 0" in error


def test_missing_validation_images_are_named_before_training(tree: CocoTree, capsys: pytest.CaptureFixture) -> None:
    empty = tree.file.with_name("empty")
    empty.mkdir()
    error = mistake(capsys, words(tree, val_annotations=tree.file, val_images=empty))
    assert f"3 of 3 images of {tree.file} are not in {empty}, such as 1.png" in error and "--val-images" in error


def test_image_folder_is_a_file(tree: CocoTree, capsys: pytest.CaptureFixture) -> None:
    error = mistake(capsys, [*words(tree, train_images=tree.file)[:-2], "--evaluate-every", "0", *words(tree)[-2:]])
    assert f"image folder {tree.file} is a file" in error


def test_no_picture(tree: CocoTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "format_table", lambda summary: "")
    monkeypatch.setattr(validation, "draw_predictions", lambda *args, **named: pytest.fail("a picture was drawn"))
    config, lines = load_config("quickstart", {"train.picture_images": 0}), []
    run = SimpleNamespace(config=config, folder=tree.file.parent, logger=SimpleNamespace(print=lines.append))
    validation.show_summary(run, None, {"segm": {"AP": 0.5}, "bbox": {"AP": 0.25}})
    assert lines[-1] == "mask AP 50.0  box AP 25.0" and not (tree.file.parent / "predictions.png").exists()


def test_eval_does_not_fill_a_mistyped_folder_with_shapes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate_main(["quickstart", "--oracle", "--data-root", str(tmp_path / "typo")]) == 2
    assert f"there is no folder {tmp_path / 'typo'}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_shapes_do_not_ask_to_remove_other_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "train2017").mkdir()
    error = mistake(capsys, ["quickstart", "--data", str(tmp_path), "--output", str(tmp_path / "run")])
    assert "data.shapes=false" in error and "remove" not in error


@pytest.mark.parametrize("shapes", [False, True])
def test_dry_run_names_the_whole_path(tmp_path: Path, shapes: bool) -> None:
    """A folder's name may contain a full stop and a space."""
    config = locate_data(load_config("quickstart", {"data.shapes": shapes}), tmp_path / "vol. 2" / "coco")
    text = missing_data(config, ("train",))
    assert f"{tmp_path}/vol. 2/coco/annotations/instances_train2017.json does not exist" in text
    assert ("generates the shapes" in text) == shapes
    with pytest.raises(InputError, match="vol. 2"):
        require_data(replace(config, data=replace(config.data, shapes=False)), splits=["train"])


@pytest.mark.parametrize(
    ("workers", "cores", "processes", "count"),
    [("auto", 16, 1, 8), ("auto", 16, 4, 4), ("auto", 2, 1, 2), ("auto", 2, 8, 1), (0, 16, 1, 0), (12, 2, 1, 12)],
)
def test_automatic_workers(monkeypatch, workers, cores, processes, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
    monkeypatch.setattr("solov2.distributed.local_world_size", lambda: processes)
    assert worker_count(workers) == count


@pytest.mark.parametrize("found", [True, False])
def test_named_data_is_evaluated_and_none_is_generated(
    found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quickstart generates its own data, but not where other data is named."""
    monkeypatch.chdir(tmp_path)
    generate_shapes("mine", train_images=1, val_images=2, size=96, seed=0)
    annotations = "mine/annotations/instances_val2017.json" if found else "mine/annotations/other.json"
    words = ["quickstart", "--oracle", "--val-annotations", annotations, "--val-images", "mine/val2017"]
    assert evaluate_main([*words, "--device", "cpu", "--workers", "0"]) == (0 if found else 2)
    assert not Path("data").exists()
