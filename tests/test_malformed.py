"""Malformed annotation files and images, each with its expected outcome of loading, checking and repairing.

Loading works, warns that something is left out, or stops with one sentence that names the file and the id; checking
finds exactly what was planted; the repaired file loads and has nothing repairable left.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.coco_files import HEIGHT, WIDTH, CocoTree, annotation, png_header, rectangle
from PIL import Image

from solov2.commands.check_data import main
from solov2.config import Config, load_config
from solov2.data.annotations import load_json
from solov2.data.coco import CocoInstances
from solov2.data_check.check import check_data
from solov2.data_check.findings import REPAIRABLE
from solov2.errors import InputError

SETTINGS = ("data.train_scales=[48]", "data.train_long_edge=64")


def load_everything(file: Path, images: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Open a tree for training and read all samples; returns the warnings logged."""
    caplog.clear()
    dataset = CocoInstances(file, images, training=True)
    for sample in dataset:
        assert sample["masks"].shape == (len(sample["labels"]), *sample["image"].shape[1:])
    return [record.getMessage() for record in caplog.records]


def set_first(**values) -> Callable[[CocoTree], None]:
    return lambda tree: tree.first.update(values)


def without(*keys: str) -> Callable[[CocoTree], None]:
    return lambda tree: [tree.first.pop(key) for key in keys]


def set_image(**values) -> Callable[[CocoTree], None]:
    return lambda tree: tree.image.update(values)


def append(section: str, entry: object) -> Callable[[CocoTree], None]:
    return lambda tree: tree.content[section].append(entry)


def rle(counts: object, size: object = (HEIGHT, WIDTH)) -> Callable[[CocoTree], None]:
    return set_first(segmentation={"size": list(size) if isinstance(size, tuple) else size, "counts": counts})


def noise(channels: int = 3) -> np.ndarray:
    shape = (HEIGHT, WIDTH, channels) if channels > 1 else (HEIGHT, WIDTH)
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def stored_as(name: str, pixels: np.ndarray, mode: str | None = None, **options) -> Callable[[CocoTree], None]:
    def change(tree: CocoTree) -> None:
        tree.save(name, pixels, mode, **options)
        tree.rename(name)

    return change


def cut(name: str, share: float) -> Callable[[CocoTree], None]:
    def change(tree: CocoTree) -> None:
        tree.save(name, noise())
        whole = (tree.images / name).read_bytes()
        tree.write(name, whole[: int(share * len(whole))])
        tree.rename(name)

    return change


def file_of(name: str, content: bytes) -> Callable[[CocoTree], None]:
    def change(tree: CocoTree) -> None:
        tree.write(name, content)
        tree.rename(name)

    return change


def turned(width: int, height: int) -> Callable[[CocoTree], None]:
    """A file with an EXIF rotation whose stored pixels are of the given size."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored_as("turned.png", np.zeros((height, width, 3), dtype=np.uint8), exif=exif)


def shift_categories(by: int) -> Callable[[CocoTree], None]:
    def change(tree: CocoTree) -> None:
        for entry in tree.content["annotations"]:
            entry["category_id"] += by

    return change


def a_crowd(segmentation: object) -> Callable[[CocoTree], None]:
    return append("annotations", {**annotation(13, 1, 1, (10, 30, 8, 8)), "iscrowd": 1, "segmentation": segmentation})


def twice(tree: CocoTree) -> None:
    tree.content["images"].append({**tree.image, "id": 4, "file_name": "./1.png"})
    tree.content["annotations"].append(annotation(41, 4, 1, (20, 26, 12, 12)))


def as_corners(tree: CocoTree) -> None:
    for entry in tree.content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]


UNCOMPRESSED = [10 * HEIGHT + 8, *([16, HEIGHT - 16] * 19), 16, HEIGHT * WIDTH - 29 * HEIGHT - 24]
CROWD = {
    "size": [HEIGHT, WIDTH],
    "counts": [10 * HEIGHT + 30, *([8, HEIGHT - 8] * 7), 8, HEIGHT * WIDTH - 17 * HEIGHT - 38],
}
FINE, LEFT_OUT = None, "first is annotation 11"
MANY = "warning: have iscrowd 1"
[RECTANGLE] = rectangle(10, 8, 20, 16)
# name: (change to the tree, outcome of loading: None, "warning: ..." or the error, kinds of findings)
CASES: dict[str, tuple[Callable[[CocoTree], object], str | None, set[str]]] = {
    "clean": (lambda tree: None, FINE, set()),
    # segmentations
    "polygon of 4 numbers": (set_first(segmentation=[[1, 2, 3, 4]]), "annotation 11 .*three points", {"segmentation"}),
    "polygon of one point": (set_first(segmentation=[[1, 2]]), "annotation 11 .*three points", {"segmentation"}),
    "empty polygon": (set_first(segmentation=[[]]), "annotation 11 .*three points", {"segmentation"}),
    "no polygon": (set_first(segmentation=[]), "annotation 11 .*list of polygons", {"segmentation"}),
    "segmentation missing": (without("segmentation"), "annotation 11 .*list of polygons", {"segmentation"}),
    "segmentation null": (set_first(segmentation=None), "annotation 11 .*list of polygons", {"segmentation"}),
    "segmentation text": (set_first(segmentation="1,2,3"), "annotation 11 .*list of polygons", {"segmentation"}),
    "polygon null": (set_first(segmentation=[None]), "annotation 11 .*list of numbers", {"segmentation"}),
    "polygon of text": (
        set_first(segmentation=[list(map(str, RECTANGLE))]), "annotation 11 .*list of numbers", {"segmentation"},
    ),
    "polygon of points": (
        set_first(segmentation=[[RECTANGLE[:2], RECTANGLE[2:4], RECTANGLE[4:6], RECTANGLE[6:]]]),
        "annotation 11 .*list of numbers", {"segmentation"},
    ),
    "polygon not nested": (set_first(segmentation=RECTANGLE), "annotation 11 .*list of numbers", {"segmentation"}),
    "polygon of numbers and text": (
        set_first(segmentation=[[1, 2, 9, 2, 9, "x"]]), "annotation 11 .*list of numbers", {"segmentation"},
    ),
    "odd polygon": (set_first(segmentation=[[1, 2, 9, 2, 9, 9, 5]]), "annotation 11 .* even ", {"segmentation"}),
    "NaN in polygon": (
        set_first(segmentation=[[1, 2, 9, 2, 9, float("nan")]]), "annotation 11 .*finite", {"segmentation"},
    ),
    "infinite polygon": (
        set_first(segmentation=[[1, 2, float("inf"), 2, 9, 9]]), "annotation 11 .*finite", {"segmentation"},
    ),
    "polygon far away": (
        set_first(segmentation=[[1, 2, 1e9, 2, 9, 9]]), r"annotation 11 .*1e\+09", {"segmentation"},
    ),
    "polygon beyond integers": (
        set_first(segmentation=[[1, 2, -1e300, 2, 9, 9]]), r"annotation 11 .*1e\+300", {"segmentation"},
    ),
    "short polygon beside a proper one": (
        lambda tree: tree.first["segmentation"].append([1, 2, 3, 4]),
        "warning: fewer than three points, which are ignored; the first is annotation 11", {"short polygon"},
    ),
    "polygon outside the image": (set_first(segmentation=rectangle(100, 100, 9, 9)), FINE, {"empty mask"}),
    "polygon without area": (set_first(segmentation=[[5, 5, 5, 5, 5, 5]]), FINE, {"empty mask"}),
    "uncompressed RLE": (rle(UNCOMPRESSED), FINE, {"uncompressed RLE"}),
    "crowd RLE": (a_crowd(CROWD), MANY, {"crowd", "many crowds"}),
    "broken crowd": (a_crowd([[1, 2]]), MANY, {"crowd", "many crowds", "segmentation"}),
    "RLE of another size": (rle([100], (10, 10)), "annotation 11 .*size", {"segmentation"}),
    "RLE with sides swapped": (rle([HEIGHT * WIDTH], (WIDTH, HEIGHT)), "annotation 11 .*size", {"segmentation"}),
    "RLE too short": (rle([5, 6]), "annotation 11 .*add up", {"segmentation"}),
    "RLE with a negative run": (rle([HEIGHT * WIDTH + 5, -5]), "annotation 11 .*add up", {"segmentation"}),
    "RLE of fractions": (rle([10.5, HEIGHT * WIDTH - 10.5]), "annotation 11 .*run lengths", {"segmentation"}),
    "RLE of text": (rle(list(map(str, UNCOMPRESSED))), "annotation 11 .*run lengths",
                    {"segmentation", "uncompressed RLE"}),
    "RLE of other text": (rle(["x", "y"]), "annotation 11 .*run lengths", {"segmentation"}),
    "RLE of a huge integer": (rle([10**400]), "annotation 11 .*run lengths", {"segmentation"}),
    "RLE without counts": (rle(None), "annotation 11 .*no counts", {"segmentation"}),
    "RLE without runs": (rle([]), "annotation 11 .*add up", {"segmentation"}),
    "RLE with a number as size": (rle([5], 5), "annotation 11 .*size", {"segmentation"}),
    "RLE without size": (rle([5], None), "annotation 11 .*size", {"segmentation"}),
    "compressed RLE, garbage": (rle("~~~"), "annotation 11 .*run lengths", {"segmentation"}),
    "compressed RLE, not ASCII": (rle("ÄÖ"), "annotation 11 .*run lengths", {"segmentation"}),
    "compressed RLE, cut": (rle("PP"), "annotation 11 .*run lengths", {"segmentation"}),
    # areas and boxes
    "area 0": (set_first(area=0), f"warning: {LEFT_OUT} with an area of 0", {"left out"}),
    "area negative": (set_first(area=-5.0), f"warning: {LEFT_OUT} with an area of 0", {"left out"}),
    "area missing": (without("area"), "annotation 11 .*no area", {"area"}),
    "area NaN": (set_first(area=float("nan")), "annotation 11 .*no area", {"area"}),
    "area text": (set_first(area="320"), "annotation 11 .*no area", {"area"}),
    "area true": (set_first(area=True), "annotation 11 .*no area", {"area"}),
    "area of something else": (set_first(area=2000), FINE, {"area differs"}),
    "box missing": (without("bbox"), "annotation 11 .*no bbox", {"box"}),
    "box of 3 numbers": (set_first(bbox=[1, 2, 3]), "annotation 11 .*no bbox", {"box"}),
    "box text": (set_first(bbox=["10", "8", "20", "16"]), "annotation 11 .*no bbox", {"box"}),
    "box of 1e30": (set_first(bbox=[1e30, 8, 20, 16]), f"warning: {LEFT_OUT} with a box outside",
                    {"left out", "box beyond image"}),
    "boxes as corners": (as_corners, FINE, {"boxes as corners", "box differs", "box beyond image"}),
    "box NaN": (set_first(bbox=[1, 2, 3, float("nan")]), "annotation 11 .*no bbox", {"box"}),
    "box of a huge integer": (set_first(bbox=[1, 2, 3, 10**400]), "annotation 11 .*no bbox", {"box"}),
    "box without width": (
        set_first(bbox=[10, 8, 0, 16]), f"warning: {LEFT_OUT} with a box less", {"left out", "box differs"},
    ),
    "box with negative width": (
        set_first(bbox=[30, 8, -20, 16]), f"warning: {LEFT_OUT} with a box less", {"left out", "box differs"},
    ),
    "box outside the image": (
        set_first(bbox=[70, 8, 20, 16]), f"warning: {LEFT_OUT} with a box outside", {"left out", "box beyond image"},
    ),
    "box beyond the image": (set_first(bbox=[10, 8, 90, 16]), FINE, {"box beyond image"}),
    "box two pixels beyond the image": (
        set_first(bbox=[45, 8, 21, 16], segmentation=rectangle(45, 8, 19, 16), area=304), FINE, {"box beyond image"},
    ),
    "box of 1e308": (set_first(bbox=[-1e308, -1e308, 1.5e308, 1.5e308]), FINE, {"box beyond image"}),
    "box as corners": (set_first(bbox=[10, 8, 30, 24]), FINE, {"box differs"}),
    "box shares": (
        set_first(bbox=[0.2, 0.2, 0.3, 0.3]), f"warning: {LEFT_OUT} with a box less", {"left out", "box differs"},
    ),
    # ids
    "category unknown": (
        set_first(category_id=7), "warning: not in `categories` and are left out; the first is annotation 11",
        {"unknown category"},
    ),
    "category null": (set_first(category_id=None), "annotation 11 .*category_id", {"category id"}),
    "category text": (set_first(category_id="1"), "annotation 11 .*category_id", {"category id"}),
    "category true": (set_first(category_id=True), "annotation 11 .*category_id", {"category id"}),
    "categories from 0": (
        shift_categories(-1), "warning: not in `categories`", {"categories off by one", "unknown category"},
    ),
    "categories from 2": (
        shift_categories(1), "warning: not in `categories`", {"categories off by one", "unknown category"},
    ),
    "category without name": (
        append("categories", {"id": 3}), "category 3 .*no name", {"category name"},
    ),
    "category name a number": (append("categories", {"id": 3, "name": 3}), "category 3 .*no name",
                               {"category name", "unused category"}),
    "category name null": (append("categories", {"id": 3, "name": None}), "category 3 .*no name", {"category name"}),
    "category without id": (append("categories", {"name": "van"}), "category without an integer id", {"no id"}),
    "category id twice": (append("categories", {"id": 2, "name": "bus"}), "category id 2 twice", {"id twice"}),
    "category name twice": (
        append("categories", {"id": 3, "name": "bus"}), FINE, {"category name twice", "unused category"},
    ),
    "category never used": (append("categories", {"id": 5, "name": "van"}), FINE, {"unused category"}),
    "annotation of no image": (set_first(image_id=99), "annotation 11 .*image 99", {"unknown image"}),
    "image_id null": (set_first(image_id=None), "annotation 11 .*image None", {"unknown image"}),
    "image_id text": (set_first(image_id="1"), "annotation 11 .*image '1'", {"unknown image"}),
    "image_id a list": (set_first(image_id=[1]), "annotation 11 .*image", {"unknown image"}),
    "annotation id twice": (set_first(id=12), "annotation id 12 twice", {"id twice"}),
    "annotation id 0": (set_first(id=0), FINE, {"id 0"}),
    "annotation id of 100 digits": (set_first(id=10**100), "annotation without an integer id", {"no id"}),
    "annotation id of 62 bits": (set_first(id=2**62), FINE, set()),
    "image id of 100 digits": (set_image(id=10**100), "image without an integer id",
                               {"no id", "unknown image", "no instance"}),
    "annotation without id": (without("id"), "annotation without an integer id", {"no id"}),
    "annotation id a fraction": (set_first(id=1.5), "annotation without an integer id", {"no id"}),
    "annotation a number": (append("annotations", 5), "annotation without an integer id", {"no id"}),
    "annotation null": (append("annotations", None), "annotation without an integer id", {"no id"}),
    "iscrowd text": (set_first(iscrowd="0"), "annotation 11 .*iscrowd", {"iscrowd"}),
    "iscrowd 2": (set_first(iscrowd=2), "annotation 11 .*iscrowd", {"iscrowd", "crowd", "many crowds"}),
    "iscrowd true": (set_first(iscrowd=True), MANY, {"crowd", "many crowds"}),
    "iscrowd false": (set_first(iscrowd=False), FINE, set()),
    "iscrowd null": (set_first(iscrowd=None), "annotation 11 .*iscrowd", {"iscrowd"}),
    "iscrowd missing": (without("iscrowd"), FINE, set()),
    "annotation twice": (append("annotations", annotation(13, 1, 1, (10, 8, 20, 16))), FINE, {"annotation twice"}),
    "nearly the same": (
        append("annotations", annotation(23, 2, 1, (4, 4, 30, 29))), FINE, {"near duplicate"},
    ),
    "same mask of another class": (append("annotations", annotation(13, 1, 2, (10, 8, 20, 16))), FINE, set()),
    # entries of images
    "image id twice": (append("images", {"id": 2, "file_name": "9.png", "width": 4, "height": 4}), "image id 2 twice",
                       {"id twice"}),
    "image without id": (append("images", {"file_name": "9.png"}), "image without an integer id", {"no id"}),
    "image a list": (append("images", [1]), "image without an integer id", {"no id"}),
    "file listed twice": (twice, FINE, {"file twice"}),
    "image without instance": (
        append("images", {"id": 4, "file_name": "1.png", "width": WIDTH, "height": HEIGHT}), FINE,
        {"file twice", "no instance"},
    ),
    "file_name missing": (lambda tree: tree.image.pop("file_name"), "image 1 .*file_name", {"file name"}),
    "file_name null": (set_image(file_name=None), "image 1 .*file_name", {"file name"}),
    "file_name leaves the folder": (set_image(file_name="../../x.jpg"), "image 1 .*outside", {"file outside"}),
    "file_name leaves in the middle": (set_image(file_name="a/../../x.jpg"), "image 1 .*outside", {"file outside"}),
    "file_name absolute": (set_image(file_name="/etc/passwd"), "image 1 .*outside", {"file outside"}),
    "file_name of Windows": (
        set_image(file_name="images\\1.png"), r"image 1 .*images\\1\.png with Windows's separator", {"missing file"},
    ),
    "file_name of Windows, missing": (
        set_image(file_name="images\\9.png"), r"image 1 .*images\\9\.png with Windows's separator", {"missing file"},
    ),
    "file_name with a backslash": (stored_as("a\\b.png", noise()), FINE, set()),
    "file_name with a dot": (set_image(file_name="./1.png"), FINE, set()),
    "file_name with a doubled folder": (set_image(file_name="images/1.png"), "1.png", {"missing file"}),
    "file_name of LVIS": (
        lambda tree: tree.image.update(file_name=None, coco_url="http://cocodataset.org/images/1.png"),
        "image 1 .*coco_url, as in LVIS", {"file name"},
    ),
    "file_name with a zero byte": (set_image(file_name="1\0.png"), "1.*png", {"missing file"}),
    "file_name with half a character": (set_image(file_name="\ud800.png"), "png", {"missing file"}),
    "file_name too long": (set_image(file_name="x" * 5000), "xxx.* (cannot be read|does not exist)", {"missing file"}),
    "width 0": (set_image(width=0), "image 1 .*width and height", {"size"}),
    "width text": (set_image(width="64"), "image 1 .*width and height", {"size"}),
    "width a fraction": (set_image(width=64.5), "image 1 .*width and height", {"size"}),
    "width missing": (lambda tree: tree.image.pop("width"), "image 1 .*width and height", {"size"}),
    "width enormous": (set_image(width=10**12), "image 1 .*more than", {"size"}),
    # files
    "file missing": (lambda tree: (tree.images / "1.png").unlink(), "1.png does not exist", {"missing file"}),
    "file a folder": (lambda tree: ((tree.images / "d").mkdir(), tree.rename("d")), "/d (is|do)", {"missing file"}),
    "file of another size": (stored_as("b.png", np.zeros((40, 50, 3), np.uint8)), "b.png is 50 x 40", {"wrong size"}),
    "truncated PNG": (cut("cut.png", 0.5), "cut.png cannot be read", {"unreadable file"}),
    "truncated JPEG": (cut("cut.jpg", 0.6), "cut.jpg cannot be read", {"unreadable file"}),
    "empty file": (file_of("e.jpg", b""), "e.jpg cannot be read", {"unreadable file"}),
    "text as image": (file_of("t.jpg", b"<html>404</html>"), "t.jpg cannot be read", {"unreadable file"}),
    "PostScript as image": (
        file_of("p.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n"),
        "p.jpg .*EPS", {"unreadable file"},
    ),
    "decompression bomb": (file_of("x.png", png_header(50_000, 50_000)), "x.png.* pixels", {"unreadable file"}),
    "smaller bomb": (file_of("x.png", png_header(14_000, 14_000)), "x.png.* pixels", {"unreadable file"}),
    "header only": (file_of("x.png", png_header(WIDTH, HEIGHT)), "x.png cannot be read", {"unreadable file"}),
    "gray": (stored_as("g.png", noise(1)), FINE, {"gray"}),
    "gray with alpha": (stored_as("la.png", noise(2), "LA"), FINE, {"gray", "alpha"}),
    "alpha": (stored_as("a.png", noise(4), "RGBA"), FINE, {"alpha"}),
    "CMYK": (stored_as("c.jpg", noise(4), "CMYK"), FINE, {"CMYK"}),
    "16 bit": (stored_as("d.png", noise(1).astype(np.uint16) * 256), FINE, {"16 bit"}),
    "floats": (stored_as("f.tif", noise(1).astype(np.float32)), "f.tif: pixel format F", {"unreadable file"}),
    "EXIF rotation": (turned(WIDTH, HEIGHT), FINE, {"EXIF rotation"}),
    "EXIF rotation, sides swapped": (
        turned(HEIGHT, WIDTH), "turned.png is 48 x 64.*EXIF rotation is not applied", {"wrong size", "EXIF rotation"},
    ),
    "image below the minimum edge": (
        lambda tree: (stored_as("s.png", np.zeros((28, 64, 3), np.uint8))(tree), tree.image.update(height=28),
                      tree.content["annotations"].pop(1)), FINE, {"small image"},
    ),
}  # fmt: skip
NOT_COCO = {
    "nested 150 deep": b'{"info": ' + b"[" * 150 + b"]" * 150 + b', "images": [], "annotations": [], "categories": []}',
    "nested 900 deep": b'{"images": [], "annotations": [{"segmentation": '
    + b"[" * 900
    + b"]" * 900
    + b'}], "categories": []}',
    "a key nested deeply": b'{"images": [{"id": '
    + b'{"a":' * 600
    + b"1"
    + b"}" * 600
    + b'}], "annotations": [], "categories": []}',
    "empty": b"",
    "cut": b'{"images": [',
    "not text": b"\xff\xfe\xfa",
    "a list": b"[1, 2]",
    "a number": b"5",
    "no categories": b'{"images": [], "annotations": []}',
    "sections are not lists": b'{"images": {}, "annotations": [], "categories": []}',
    "nested 100,000 deep": b"[" * 100_000,
    "compressed": gzip.compress(b"{}"),
    "in Latin-1": '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "Käfer"}]}'.encode("latin-1"),
    "a number of 5,000 digits": b'{"images": [' + b"9" * 5000 + b'], "annotations": [], "categories": []}',
}


@pytest.fixture
def tree(tmp_path: Path) -> CocoTree:
    return CocoTree(tmp_path)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("solov2_r50_fpn_1x", SETTINGS)


@pytest.mark.parametrize("name", CASES)
def test_malformed(tree: CocoTree, config: Config, name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, outcome, kinds = CASES[name]
    change(tree)
    tree.file.write_text(json.dumps(tree.content))
    before = tree.file.read_bytes()

    if outcome is None or outcome.startswith("warning: "):
        warned = load_everything(tree.file, tree.images, caplog)
        assert len(warned) == (outcome is not None), warned
        if outcome is not None:
            assert outcome.removeprefix("warning: ") in warned[0] and str(tree.file) in warned[0]
    else:
        with pytest.raises(InputError, match=outcome) as caught:
            load_everything(tree.file, tree.images, caplog)
        assert "instances.json" in str(caught.value) and "\n" not in str(caught.value)

    report = check_data(load_json(tree.file), tree.images, config)
    assert {finding.kind for finding in report.findings} == kinds, [finding.sentence() for finding in report.findings]
    assert bool(report.changes) == bool(kinds & REPAIRABLE)
    assert all(bool(finding.fix) == (finding.kind in REPAIRABLE) for finding in report.findings)

    repaired = report.repaired
    tree.file.with_name("repaired.json").write_text(json.dumps(repaired))
    warned = load_everything(tree.file.with_name("repaired.json"), tree.images, caplog)
    assert len(warned) <= ("many crowds" in kinds), warned
    again = check_data(repaired, tree.images, config)
    assert not {finding.kind for finding in again.findings} & REPAIRABLE
    assert tree.file.read_bytes() == before


@pytest.mark.parametrize("name", NOT_COCO)
def test_other_files(tree: CocoTree, name: str, capsys: pytest.CaptureFixture) -> None:
    tree.file.write_bytes(NOT_COCO[name])
    with pytest.raises(InputError, match="annotation file .*instances.json"):
        CocoInstances(tree.file, tree.images, training=True)
    assert main([str(tree.file), "--images", str(tree.images)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: annotation file") and captured.err.count("\n") == 1


def test_there_are_enough_cases() -> None:
    assert len(CASES) + len(NOT_COCO) >= 60
