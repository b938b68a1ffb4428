"""solov2 import: what it prints and writes, its refusals, and the photographs by way of three formats."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pycocotools.mask as coco_mask
import pytest
from helpers.format_files import HEIGHT, WIDTH, save_images, write

from solov2.commands.check_data import main as check_main
from solov2.commands.import_data import FORMATS, main
from solov2.commands.main import command_module
from solov2.data.annotations import read_annotations
from solov2.formats import coco, labelme, masks, yolo
from solov2.formats.annotated import AnnotatedImage, Losses, compressed
from solov2.formats.recognize import READERS, recognize

LINE = "0 0.5 0.25 0.75 0.25 0.75 0.5 0.5 0.5"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A YOLO dataset of 10 training and 2 validation images."""
    root = tmp_path / "my data"
    for split, number in (("train", 10), ("val", 2)):
        for i in range(number):
            save_images(root, f"images/{split}/{i}.png")
            write(root / f"labels/{split}/{i}.txt", f"{LINE}\n0 0.5 0.5 0.1 0.1\n")
    write(root / "data.yaml", 'train: images/train\nval: images/val\nnames: [car, "b\\u001bus"]\n')
    return root


def test_the_commands_formats() -> None:
    assert set(FORMATS) == set(READERS) and command_module("import").main is main


def test_a_split_of_the_source(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "mine.json"
    assert main([str(folder), "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out and "b\\x1bus" in out
    assert "12 boxes without a mask, left out (first: labels/train/0.txt, line 2)" in out
    train, val = (read_annotations(folder / f"mine_{split}.json") for split in ("train", "val"))
    assert (len(train["images"]), len(val["annotations"])) == (10, 2) and not output.exists()
    assert val["annotations"][0]["bbox"] == [30, 10, 15, 10] and val["annotations"][0]["area"] == 150
    [command] = [line for line in out.splitlines() if line.startswith("to train: ")]
    words = shlex.split(command.removeprefix("to train: solov2 train "))
    args = command_module("train").build_parser("solov2 train").parse_args(words)
    assert Path(args.val_annotations) == folder / "mine_val.json" and Path(args.val_images) == folder
    assert check_main([args.train_annotations, "--images", args.train_images, "--workers", "1"]) == 0


def test_another_split_and_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--output", str(folder / "a.json"), "--val-split", "0.25"]) == 0
    found = [json.loads((folder / f"a_{split}.json").read_text()) for split in ("train", "val")]
    assert len(found[0]["images"]) + len(found[1]["images"]) == 12 and found[1]["images"]
    assert main([str(folder), "--output", str(folder / "b.json"), "--val-split", "0"]) == 0
    assert len(json.loads((folder / "b.json").read_text())["images"]) == 12
    out = capsys.readouterr().out
    assert "--evaluate-every 0" in out


def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    write(folder.parent / "mine_val.json", "{}")
    for words, part in (
        (["--output", str(folder / "mine.txt")], ".json"),
        (["--output", str(folder.parent / "mine.json")], "already exists"),
        (["--output", str(folder / "a.json"), "--val-split", "1"], "below 1"),
        (["--output", str(folder / "a.json"), "--format", "via"], "via"),
        (["--output", str(folder / "a.json"), "--format", "labelme"], "no mask"),
        (["--output", str(folder / "a.json"), "--images", str(folder / "nowhere")], "nowhere"),
        (["--output", str(folder / "data.yaml" / "a.json")], "data.yaml"),
    ):
        assert main([str(folder), *words]) == 2
        error = capsys.readouterr().err
        assert part in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    assert main([str(folder / "nowhere"), "--output", str(folder / "a.json")]) == 2
    assert main([str(folder), "--output", str(folder.parent / "mine.json"), "--overwrite"]) == 0


def test_an_input_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_images(tmp_path, "a.png")
    square = [[10, 8, 30, 8, 30, 24]]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": square}],
        "categories": [{"id": 1, "name": "car"}],
    }
    path = write(tmp_path / "a.json", content)
    for source in (path, tmp_path):
        assert main([str(source), "--output", str(path), "--overwrite"]) == 2
        assert "would replace the input" in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


@pytest.mark.parametrize("content", ["[]", "{}", "hello", "PK\x03\x04", '{"type": "FeatureCollection"}', "<a/>"])
def test_unknown_files(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.json", content)
    assert main([str(path), "--output", str(tmp_path / "b.json")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1 and not (tmp_path / "b.json").exists()


def test_an_unknown_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "x/thesis.tex", "")
    assert main([str(tmp_path / "x"), "--output", str(tmp_path / "b.json")]) == 2
    assert "--format" in capsys.readouterr().err


def test_photographs_by_way_of_three_formats(
    coco_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same counts and masks: labelme's all, YOLO's without crowds, the PNGs' as far as they are visible."""
    pictures = coco_photos / "val2017"
    source = coco.read(coco_photos / "annotations/instances_val2017.json", pictures)
    images = [image for number, image in enumerate(source.images) if number % 6 == 0]
    names, out = source.class_names, tmp_path / "out"
    assert sum(x.is_crowd for image in images for x in image.instances) and len(images) == 10
    labelme.write(images, pictures, out / "labelme")
    yolo.write(images, names, out / "yolo")
    masks.write(images, names, out / "masks")
    for name in ("labelme", "yolo", "masks"):
        assert recognize(out / name) == name
        words = [str(out / name), "--images", str(pictures), "--output", str(tmp_path / f"{name}.json")]
        assert main(words) == 0
    for name in ("labelme", "yolo"):
        content = json.loads((tmp_path / f"{name}.json").read_text())
        classes = {category["id"]: category["name"] for category in content["categories"]}
        by_file: dict[str, list] = {entry["file_name"]: [] for entry in content["images"]}
        files = {entry["id"]: entry["file_name"] for entry in content["images"]}
        for annotation in content["annotations"]:
            by_file[files[annotation["image_id"]]].append(annotation)
        common = union = 0
        for image in images:
            expected = [x for x in image.instances if name == "labelme" or not x.is_crowd]
            assert [x.class_name for x in expected] == [classes[x["category_id"]] for x in by_file[image.file_name]]
            for one, other in zip(expected, by_file[image.file_name]):
                assert one.is_crowd == other["iscrowd"]
                rles = [compressed(x, (image.height, image.width)) for x in (one.segmentation, other["segmentation"])]
                common += coco_mask.area(coco_mask.merge(rles, intersect=True))
                union += coco_mask.area(coco_mask.merge(rles))
        assert common / union >= 0.999
    found = {image.file_name: image for image in coco.read(tmp_path / "masks.json", pictures).images}
    assert len(found) == 10
    assert all(visible(image, names) == visible(found[image.file_name], names) for image in images)


def visible(image: AnnotatedImage, names: list[str]) -> set[tuple[int, str]]:
    """(class, negative for a crowd; run lengths) of what is visible of each instance."""
    plane = masks.numbers_of(image, names, Losses())
    found = masks._instances(plane, Path())
    return {((1 if number % 1000 else -1) * (number // 1000), rle["counts"]) for number, rle, _ in found}
