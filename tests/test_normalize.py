"""check-data --fix repairs what the data determines, and says "removes" where it does not."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.coco_files import HEIGHT, WIDTH, CocoTree, rectangle
from PIL import Image

from solov2.commands.check_data import main
from solov2.config import load_config
from solov2.data.annotations import load_json
from solov2.data.coco import CocoInstances
from solov2.data_check.check import check_data
from solov2.data_check.normalize import ImageFiles, as_integer, as_number

CONFIG = load_config("solov2_r50_fpn_1x", ["data.train_scales=[48]", "data.train_long_edge=64"])
[FIRST] = rectangle(10, 8, 20, 16)  # the polygon of the first annotation
RLE = {
    "size": [HEIGHT, WIDTH],
    "counts": [10 * HEIGHT + 8, *([16, HEIGHT - 16] * 19), 16, HEIGHT * WIDTH - 29 * HEIGHT - 24],
}


@pytest.fixture
def tree(tmp_path: Path) -> CocoTree:
    return CocoTree(tmp_path)


def each(convert: Callable[[int], object]) -> Callable[[CocoTree], None]:
    """Every id and every reference, converted."""

    def change(tree: CocoTree) -> None:
        for entries in tree.content.values():
            for entry in entries:
                entry.update({key: convert(entry[key]) for key in ("id", "image_id", "category_id") if key in entry})

    return change


def image(**values: object) -> Callable[[CocoTree], None]:
    return lambda tree: tree.image.update(values)


def first(**values: object) -> Callable[[CocoTree], None]:
    return lambda tree: tree.first.update(values)


def segmentation(value: object, meant: object = None) -> Callable[[CocoTree], object]:
    """The first annotation's segmentation in another notation; `meant` is it in COCO's."""

    def change(tree: CocoTree) -> dict:
        tree.first["segmentation"] = value
        return {"segmentation": [FIRST] if meant is None else meant}

    return change


# name: a change that leaves the meaning; it may return what the first annotation becomes
DETERMINED: dict[str, Callable[[CocoTree], dict | None]] = {
    "ids as text": each(str),
    "ids as text with a fraction": each("{}.0".format),
    "ids 1.0": each(float),
    "image ids as names": lambda tree: [
        entry.update({key: f"img {entry[key]}"})
        for section, key in (("images", "id"), ("annotations", "image_id"))
        for entry in tree.content[section]
    ].clear(),
    "ids of 100 digits": lambda tree: [
        entry.update({key: 10**100 + entry[key]})
        for section, key in (("categories", "id"), ("annotations", "category_id"))
        for entry in tree.content[section]
    ].clear(),
    "references as text": lambda tree: tree.first.update(image_id="1", category_id="1"),
    "width missing": lambda tree: tree.image.pop("width") and None,
    "width and height missing": lambda tree: [tree.image.pop(key) for key in ("width", "height")].clear(),
    "size null": image(width=None, height=None),
    "size 0": image(width=0, height=0),
    "size as text": image(width=str(WIDTH), height=str(HEIGHT)),
    "absolute path": lambda tree: tree.image.update(file_name=str(tree.images / "1.png")),
    "path of another machine": image(file_name="/home/me/data/images/1.png"),
    "path of Windows": image(file_name="C:\\Users\\me\\images\\1.png"),
    "doubled folder": image(file_name="images/1.png"),
    "Windows separator": image(file_name="images\\1.png"),
    "leaves the folder and comes back": image(file_name="../images/1.png"),
    "URL": image(file_name="https://example.org/data/images/1.png?download=1"),
    "upper case": image(file_name="1.PNG"),
    "polygon of text": segmentation([list(map(str, FIRST))]),
    "polygon not nested": segmentation(FIRST),
    "polygon of points": segmentation([[FIRST[i : i + 2] for i in (0, 2, 4, 6)]]),
    "points": segmentation([FIRST[i : i + 2] for i in (0, 2, 4, 6)]),
    "RLE in a list": segmentation([RLE], RLE),
    "RLE of text": segmentation({key: list(map(str, value)) for key, value in RLE.items()}, RLE),
    "RLE of fractions": segmentation({**RLE, "counts": list(map(float, RLE["counts"]))}, RLE),
    "box as text": first(bbox=["10", "8", "20", "16"]),
    "area as text": first(area="320"),
    "iscrowd null": first(iscrowd=None),
    "iscrowd as text": first(iscrowd="0"),
    "iscrowd false as text": first(iscrowd="False"),
}


@pytest.mark.parametrize("name", DETERMINED)
def test_what_the_data_determines_is_repaired(tree: CocoTree, name: str) -> None:
    meant = copy.deepcopy(tree.content)
    changed = DETERMINED[name](tree)
    meant["annotations"][0] |= changed or {}
    report = check_data(json.loads(json.dumps(tree.content)), tree.images, CONFIG)
    assert report.repaired == meant
    assert {finding.fix for finding in report.findings if finding.severity == "error"} == {"repairs"}
    assert {change["action"] for change in report.changes} == {"changed"}
    assert report.statistics["instances"] == 6  # checked as if it were repaired
    tree.file.write_text(json.dumps(report.repaired))
    assert len(CocoInstances(tree.file, tree.images, training=True)) == 3


def test_names_in_another_unicode_form(tree: CocoTree) -> None:
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    for stored, written in (names, names[::-1]):
        (tree.images / "1.png").rename(tree.images / stored)
        tree.image["file_name"] = written
        assert check_data(tree.content, tree.images, CONFIG).repaired["images"][0]["file_name"] == stored
        (tree.images / stored).rename(tree.images / "1.png")


def test_file_names_of_lvis(tree: CocoTree) -> None:
    """LVIS has no file_name; it draws its images from several folders, named in the URL."""
    for entry in tree.content["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/images/{entry.pop('file_name')}"
    for folder, prefix in ((tree.images, ""), (tree.images.parent, "images/")):
        report = check_data(tree.content, folder, CONFIG)
        assert [x["file_name"] for x in report.repaired["images"]] == [f"{prefix}{n}.png" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda tree: tree.image.pop("id"), "no id"),  # nothing refers to it
        (image(file_name=None), "file name"),
        (image(file_name="../1.png"), "file outside"),
        (image(file_name="9.png"), "missing file"),
        (image(file_name="https://example.org/1.png"), "missing file"),  # the name alone says too little
        (image(width=32, height=None), "size"),  # contradicts the file
        (first(category_id="car"), "category id"),
        (first(category_id=True), "category id"),
        (first(image_id=None), "unknown image"),
        (first(segmentation=[]), "segmentation"),
        (first(segmentation=[[10, 8, 30, "x", 30, 24]]), "segmentation"),
        (first(segmentation={**RLE, "size": [WIDTH, HEIGHT]}), "segmentation"),
    ],
)
def test_what_it_does_not_determine_is_removed(
    tree: CocoTree, capsys: pytest.CaptureFixture, change: Callable[[CocoTree], object], kind: str
) -> None:
    change(tree)
    tree.file.write_text(json.dumps(tree.content))
    words = ["--images", str(tree.images), "--workers", "1", "--json", str(tree.file.with_name("report.json"))]
    assert main([str(tree.file), *words, "--fix", str(tree.file.with_name("fixed.json"))]) == 1
    assert f"error: {kind} (1, --fix removes it)" in capsys.readouterr().out
    assert json.loads(tree.file.with_name("report.json").read_text())["findings"][0]["fix"] == "removes"
    fixed = load_json(tree.file.with_name("fixed.json"))
    assert len(fixed["images"]) + len(fixed["annotations"]) in (8, 6)  # of 9: an annotation, or an image and its two


def test_repairs_and_removals_are_counted_apart(tree: CocoTree, capsys: pytest.CaptureFixture) -> None:
    tree.image["file_name"] = "images\\1.png"
    tree.content["images"][1]["file_name"] = "images\\9.png"
    tree.file.write_text(json.dumps(tree.content))
    assert main([str(tree.file), "--images", str(tree.images), "--workers", "1"]) == 1
    assert "error: missing file (2, --fix repairs 1 and removes 1)" in capsys.readouterr().out


def test_an_id_that_is_taken_is_not_given_twice(tree: CocoTree) -> None:
    """Image "1" beside image 1: each keeps its own annotations."""
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tree.images / "4.png")
    tree.content["images"].append({**tree.image, "id": "1", "file_name": "4.png"})
    tree.content["annotations"].append({**tree.first, "id": "11", "image_id": "1"})
    repaired = check_data(tree.content, tree.images, CONFIG).repaired
    assert repaired["images"][3]["id"] == 4 and repaired["annotations"][6]["image_id"] == 4
    assert repaired["annotations"][6]["id"] == 33 and repaired["annotations"][:6] == tree.content["annotations"][:6]


def test_two_texts_of_one_number_stay_two_ids(tree: CocoTree) -> None:
    for entry, number in zip(tree.content["images"], ("1", "01", "1.0"), strict=True):
        for annotation in tree.content["annotations"]:
            annotation["image_id"] = number if annotation["image_id"] == entry["id"] else annotation["image_id"]
        entry["id"] = number
    repaired = check_data(tree.content, tree.images, CONFIG).repaired
    assert [entry["id"] for entry in repaired["images"]] == [1, 2, 3]
    assert [entry["image_id"] for entry in repaired["annotations"]] == [1, 1, 2, 2, 3, 3]


def test_names_never_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").touch()
    files = ImageFiles(tmp_path / "images")
    for name in (
        "../secret.png",
        "images/../../secret.png",
        "..\\secret.png",
        str(tmp_path / "secret.png"),
        "\0",
        "\ud800",
    ):
        assert files.find(name) is None


@pytest.mark.parametrize(
    ("value", "number", "integer"),
    [
        ("7", 7, 7), (" 7 ", 7, 7), ("7.0", 7.0, 7), (7.0, 7.0, 7), ("-3", -3, -3), ("1e3", 1000.0, 1000),
        ("0.5", 0.5, None), ("9" * 300, int("9" * 300), None), ("9" * 5000, None, None), ("1e999", None, None),
        ("٣", None, None), ("1_000", None, None), ("", None, None), ("x", None, None), (True, None, None),
        (None, None, None), ([1], None, None), (float("nan"), None, None), ("nan", None, None), ("0x10", None, None),
    ],
)  # fmt: skip
def test_numbers(value: object, number: float | None, integer: int | None) -> None:
    assert as_number(value) == number and type(as_number(value)) is type(number)
    assert as_integer(value) == integer


def test_an_annotation_is_repaired_with_the_id_of_its_image(tree: CocoTree) -> None:
    """The image's id is text and the annotations' are numbers: only the image changes, but they find it again."""
    tree.content["images"][0]["id"] = "1"
    report = check_data(copy.deepcopy(tree.content), tree.images, load_config("quickstart"))
    fixes = {finding.fix for finding in report.findings if finding.kind == "unknown image"}
    assert fixes == {"repairs"}
