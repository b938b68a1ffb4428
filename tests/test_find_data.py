"""Data in other layouts and formats: found, written beside the run folder, trained on, resumed; COCO's untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from solov2.commands import train as command
from solov2.config import list_models, load_config
from solov2.data.build import locate_data
from solov2.data.shapes import generate_shapes
from solov2.errors import InputError
from solov2.formats import labelme, yolo
from solov2.formats.annotated import Reading
from solov2.formats.recognize import read
from solov2.proposal.find import FoundData, class_names, find_data, folder_to_search
from solov2.training.job import prepare_job
from tests.helpers.tiny_runs import SETTINGS


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    generate_shapes(root, train_images=10, val_images=3, size=64, seed=0)
    return root


def reading_of(shapes: Path, split: str = "train2017") -> Reading:
    return read(shapes / f"annotations/instances_{split}.json", shapes / split)


def link_images(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)


def coco_copy(shapes: Path, folder: Path, split: str, name: str, images: str) -> None:
    link_images(shapes / split, folder / images)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes((shapes / f"annotations/instances_{split}.json").read_bytes())


def labelme_folder(shapes: Path, folder: Path) -> Path:
    reading = reading_of(shapes)
    labelme.write(reading.images, reading.root, folder)
    link_images(shapes / "train2017", folder)
    return folder


def yolo_folder(shapes: Path, folder: Path) -> Path:
    reading = reading_of(shapes)
    link_images(shapes / "train2017", folder / "images")
    yolo.write(reading.images, reading.class_names, folder)
    return folder


def via_folder(shapes: Path, folder: Path) -> Path:
    content = json.loads((shapes / "annotations/instances_train2017.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    files = {entry["id"]: {"filename": entry["file_name"], "regions": []} for entry in content["images"]}
    for entry in content["annotations"]:
        shape = {"name": "rect", **dict(zip(("x", "y", "width", "height"), entry["bbox"]))}
        region = {"shape_attributes": shape, "region_attributes": {"class": names[entry["category_id"]]}}
        files[entry["image_id"]]["regions"].append(region)
    link_images(shapes / "train2017", folder / "images")
    (folder / "export").mkdir()
    (folder / "export" / "via.json").write_text(json.dumps({entry["filename"]: entry for entry in files.values()}))
    return folder


def found_in(folder: Path) -> FoundData:
    found = find_data(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "train, val, train_images, val_images",
    [
        ("train.json", "val.json", "images", "images"),
        ("annotations/instances_train.json", "annotations/instances_valid.json", "images/train", "images/val"),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", "train", "valid"),
    ],
)
def test_coco_under_other_names_stays_where_it_is(
    shapes: Path, tmp_path: Path, train: str, val: str, train_images: str, val_images: str
) -> None:
    if train_images == val_images:  # the names of both splits are the same
        coco_copy(shapes, tmp_path, "train2017", train, train_images)
        (tmp_path / val).write_bytes((tmp_path / train).read_bytes())
    else:
        coco_copy(shapes, tmp_path, "train2017", train, train_images)
        coco_copy(shapes, tmp_path, "val2017", val, val_images)
    found = found_in(tmp_path)
    assert found.files == {"train": tmp_path / train, "val": tmp_path / val}
    assert found.images == {"train": tmp_path / train_images, "val": tmp_path / val_images}


def test_one_file_is_split(shapes: Path, tmp_path: Path) -> None:
    coco_copy(shapes, tmp_path, "train2017", "all.json", "photos/deep")
    found = found_in(tmp_path)
    numbers = {part: len(content["images"]) for part, content in found.contents.items()}
    assert numbers == {"train": 8, "val": 2} and not found.files
    names = [{entry["file_name"] for entry in content["images"]} for content in found.contents.values()]
    assert not names[0] & names[1]
    assert all((found.images["train"] / name).is_file() for name in names[0])
    assert found.contents == found_in(tmp_path).contents


def test_without_boxes_and_areas_a_file_is_read(shapes: Path, tmp_path: Path) -> None:
    coco_copy(shapes, tmp_path, "train2017", "train.json", "images")
    content = json.loads((tmp_path / "train.json").read_text())
    for entry in content["annotations"]:
        del entry["bbox"], entry["area"]
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(json.dumps(content))
    found = found_in(tmp_path)
    assert not found.files and all(entry["bbox"] for entry in found.contents["val"]["annotations"])


@pytest.mark.parametrize("make", [labelme_folder, yolo_folder, via_folder])
def test_other_formats_are_read(shapes: Path, tmp_path: Path, make) -> None:
    found = found_in(make(shapes, tmp_path / "mine"))
    names = [{entry["file_name"] for entry in content["images"]} for content in found.contents.values()]
    assert len(names[0] | names[1]) == 10 and not names[0] & names[1] and 1 <= len(names[1]) <= 3
    assert set(class_names(found)) == set(reading_of(shapes).class_names)


def test_ambiguous_and_unknown_folders(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert find_data(tmp_path / "empty") is None
    coco_copy(shapes, tmp_path / "two", "train2017", "first.json", "images")
    (tmp_path / "two/second.json").write_bytes((tmp_path / "two/first.json").read_bytes())
    with pytest.raises(InputError, match=r"first\.json, second\.json.*--train-annotations"):
        find_data(tmp_path / "two")
    coco_copy(shapes, tmp_path / "val", "val2017", "val.json", "images")
    assert find_data(tmp_path / "val") is None  # nothing to train on


@pytest.mark.parametrize("name", list_models())
def test_every_recipe_on_the_layout_of_coco_is_as_it_was(shapes: Path, tmp_path: Path, name: str) -> None:
    config = load_config(name)
    assert folder_to_search(locate_data(config, shapes), shapes) is None
    job = prepare_job(name, data=shapes, output=tmp_path / "run", propose=True)
    assert job.config == locate_data(config, shapes) and job.data_folder is None and not job.files


def test_named_files_are_never_searched(shapes: Path, tmp_path: Path) -> None:
    folder = labelme_folder(shapes, tmp_path / "mine")
    config = load_config("solov2_r50_fpn_1x")
    assert folder_to_search(locate_data(config, folder), folder) == folder
    for data in ({"root": folder, "train_images": folder}, None, tmp_path / "none"):
        assert folder_to_search(locate_data(config, data), data) is None
    named = load_config("solov2_r50_fpn_1x", ["data.train_annotations=mine.json"])
    assert folder_to_search(locate_data(named, folder), folder) is None
    panoptic = load_config("solov2_panoptic_r50_fpn_1x")
    assert folder_to_search(locate_data(panoptic, folder), folder) is None


def words(folder: Path, output: Path, *more: str) -> list[str]:
    kept = [text for text in SETTINGS if not text.startswith(("train.warmup_steps", "train.log_every"))]
    settings = [word for text in (*kept, "data.shapes=false") for word in ("--set", text)]
    return ["quickstart", *settings, "--data", str(folder), "--output", str(output), "--device", "cpu", *more]


@pytest.mark.parametrize("make", [labelme_folder, yolo_folder])
def test_one_command_trains_evaluates_and_resumes(
    shapes: Path, tmp_path: Path, capfd: pytest.CaptureFixture, make
) -> None:
    folder, run = make(shapes, tmp_path / "mine"), tmp_path / "run"
    assert command.main(words(folder, run, "--epochs", "2", "--dry-run")) == 0
    assert not run.exists() and not (tmp_path / "run.data").exists()
    assert "train.warmup_steps" in capfd.readouterr().out

    assert command.main(words(folder, run, "--epochs", "2")) == 0
    assert (run / "best.pth").is_file()
    used = yaml.safe_load((run / "config.yaml").read_text())
    assert used["data"]["train_annotations"] == str(tmp_path / "run.data/train.json")
    assert used["train"]["epochs"] == 2 and used["train"]["warmup_steps"] == 0 and used["train"]["evaluate_every"] == 1
    again = load_config(tmp_path / "run.data/proposal.yaml")
    same = again.to_dict()
    for section in ("data", "train"):
        assert same[section] == used[section]
    assert again.name == "quickstart"

    before = (tmp_path / "run.data/train.json").stat().st_mtime_ns
    (run / "last.pth").unlink()
    for path in sorted(run.glob("step_*.pth"))[1:]:
        path.unlink()
    assert command.main(words(folder, run, "--epochs", "2", "--resume")) == 0
    assert (run / "last.pth").is_file() and (tmp_path / "run.data/train.json").stat().st_mtime_ns == before


def test_without_a_proposal_the_recipe_stays(shapes: Path, tmp_path: Path) -> None:
    folder = labelme_folder(shapes, tmp_path / "mine")
    job = prepare_job("solov2_r50_fpn_1x", data=folder, output=tmp_path / "run")
    recipe = load_config("solov2_r50_fpn_1x")
    assert job.config.train == recipe.train and job.config.model == recipe.model
    assert sorted(job.files) == ["train.json", "val.json"]


def test_a_folder_with_other_things_is_refused_before_anything_is_written(shapes: Path, tmp_path: Path) -> None:
    folder = labelme_folder(shapes, tmp_path / "mine")
    (tmp_path / "run.data").mkdir()
    (tmp_path / "run.data/thesis.tex").write_text("mine")
    assert command.main(words(folder, tmp_path / "run")) == 2
    assert not (tmp_path / "run").exists() and [p.name for p in (tmp_path / "run.data").iterdir()] == ["thesis.tex"]
