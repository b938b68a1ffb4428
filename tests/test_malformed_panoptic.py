"""Malformed panoptic files: each stops training and `panoptic-quality` with one sentence that names file and entry."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.coco_files import png_header
from helpers.panoptic_files import HEIGHT, WIDTH, PanopticTree, paint
from helpers.panoptic_pngs import convert, damage, deepen, exchange_red_and_blue, interlace, replace_by, save_as, turn
from PIL import Image

from solov2.commands.main import main
from solov2.config import Config, load_config
from solov2.data.panoptic import CocoPanoptic
from solov2.data.panoptic_annotations import find_panoptic_problems
from solov2.data_check.panoptic import check_panoptic_data
from solov2.errors import InputError, printable
from solov2.ops.panoptic import rgb_from_ids

Change = Callable[[PanopticTree], object]
NAN, HUGE = float("nan"), 2**70


def set_category(**values: object) -> Change:
    return lambda tree: tree.content["categories"][0].update(values)


def set_image(**values: object) -> Change:
    return lambda tree: tree.content["images"][1].update(values)


def set_annotation(**values: object) -> Change:
    return lambda tree: tree.first.update(values)


def set_segment(**values: object) -> Change:
    return lambda tree: tree.infos()[0].update(values)


def append(section: str, entry: object) -> Change:
    return lambda tree: tree.content[section].append(entry)


def all_categories(**values: object) -> Change:
    return lambda tree: [category.update(values) for category in tree.content["categories"]]


CAR = "segment 70001 of image 1 of .*"  # the first segment
# name: (change, what the sentence must name besides the file, kind of the problem)
ENTRIES: dict[str, tuple[Change, str, str]] = {
    "no isthing": (lambda t: t.content["categories"][0].pop("isthing"), "category 9 .*no isthing", "isthing"),
    "isthing 2": (set_category(isthing=2), "category 9 .*isthing 2", "isthing"),
    "isthing text": (set_category(isthing="1"), "category 9 .*isthing '1'", "isthing"),
    "isthing null": (set_category(isthing=None), "category 9 .*isthing None", "isthing"),
    "isthing a list": (set_category(isthing=[1]), r"category 9 .*isthing \[1\]", "isthing"),
    "category id twice": (set_category(id=20), "category id 20 ", "id twice"),
    "category id text": (set_category(id="9"), "category .*'9'", "no id"),
    "category id true": (set_category(id=True), "category .*True", "no id"),
    "category id of 71 bits": (set_category(id=HUGE), f"category .*{HUGE}", "no id"),
    "category a number": (append("categories", 3), "category .* 3", "no id"),
    "category without name": (lambda t: t.content["categories"][0].pop("name"), "category 9 ", "category name"),
    "category name a list": (set_category(name=["bus"]), "category 9 ", "category name"),
    "image id twice": (set_image(id=1), "image id 1 ", "id twice"),
    "image id a list": (set_image(id=[2]), r"image.*\[2\]", "no id"),
    "image id a fraction": (set_image(id=2.5), "image.*2.5", "no id"),
    "image id true": (set_image(id=True), "image.*True", "no id"),
    "image id empty": (set_image(id=""), "image.*''", "no id"),
    "image id of 71 bits": (set_image(id=HUGE), f"image.*{HUGE}", "no id"),
    "image null": (append("images", None), "image.*None", "no id"),
    "mixed image ids": (set_image(id="b"), "1 and 'b'", "mixed ids"),
    "image without size": (lambda t: t.content["images"][1].pop("width"), "image 2 .*width", "size"),
    "image width NaN": (set_image(width=NAN), "image 2 .*width", "size"),
    "image larger than the limit": (set_image(width=10**6, height=10**6), "image 2 .*max_image_pixels", "size"),
    "image outside": (set_image(file_name="../2.jpg"), r"image 2 .*\.\./2.jpg", "file outside"),
    "annotation of an unknown image": (set_annotation(image_id=8), "image 8 ", "unknown image"),
    "annotation of an image as text": (set_annotation(image_id="1"), "image '1'", "unknown image"),
    "annotation without image_id": (lambda t: t.first.pop("image_id"), "annotation .*1.png", "unknown image"),
    "annotation a number": (append("annotations", 3), "annotation .* 3", "unknown image"),
    "annotation a list": (append("annotations", [3]), r"annotation .*\[3\]", "unknown image"),
    "two annotations of one image": (set_annotation(image_id=2), "image 2 ", "image twice"),
    "no file_name": (lambda t: t.first.pop("file_name"), "image 1 .*file_name", "file name"),
    "file_name a number": (set_annotation(file_name=1), "image 1 .*file_name", "file name"),
    "PNG outside": (set_annotation(file_name="../1.png"), r"image 1 .*\.\./1.png", "file outside"),
    "PNG outside by a detour": (set_annotation(file_name="a/../../1.png"), "image 1 .*a/../../1.png", "file outside"),
    "PNG absolute": (set_annotation(file_name="/1.png"), "image 1 .*/1.png", "file outside"),
    "no segments_info": (lambda t: t.first.pop("segments_info"), "image 1 .*segments_info", "no segments"),
    "segments_info an object": (set_annotation(segments_info={"id": 7}), "image 1 .*segments_info", "no segments"),
    "segment id 0": (set_segment(id=0), "image 1 .*'id': 0", "segment id"),
    "segment id negative": (set_segment(id=-4), "image 1 .*-4", "segment id"),
    "segment id of 25 bits": (set_segment(id=2**24), f"image 1 .*{2**24}", "segment id"),
    "segment id of 71 bits": (set_segment(id=HUGE), f"image 1 .*{HUGE}", "segment id"),
    "segment id a fraction": (set_segment(id=1.5), "image 1 .*1.5", "segment id"),
    "segment id true": (set_segment(id=True), "image 1 .*True", "segment id"),
    "segment id text": (set_segment(id="7"), "image 1 .*'7'", "segment id"),
    "segment id missing": (lambda t: t.infos()[0].pop("id"), "image 1 .*'category_id': 4", "segment id"),
    "segment a list": (lambda t: t.infos().append([7]), r"image 1 .*\[7\]", "segment id"),
    "segment id twice": (set_segment(id=300), "image 1 .* 300", "segment id twice"),
    "unknown category": (set_segment(category_id=3), CAR + " 3", "unknown category"),
    "category_id text": (set_segment(category_id="4"), CAR + "category_id", "category id"),
    "category_id missing": (lambda t: t.infos()[0].pop("category_id"), CAR + "category_id", "category id"),
    "iscrowd 2": (set_segment(iscrowd=2), CAR + "iscrowd 2", "iscrowd"),
    "iscrowd null": (set_segment(iscrowd=None), CAR + "iscrowd None", "iscrowd"),
    "iscrowd NaN": (set_segment(iscrowd=NAN), CAR + "iscrowd nan", "iscrowd"),
    "bbox missing": (lambda t: t.infos()[0].pop("bbox"), CAR + "bbox", "box"),
    "bbox of text": (set_segment(bbox=[1, 2, "3", 4]), CAR + "bbox", "box"),
    "bbox in a list": (set_segment(bbox=[[1, 2, 3, 4]]), CAR + "bbox", "box"),
    "bbox NaN": (set_segment(bbox=[1, 2, NAN, 4]), CAR + "bbox", "box"),
    "area missing": (lambda t: t.infos()[0].pop("area"), CAR + "area", "area"),
    "area text": (set_segment(area="12"), CAR + "area", "area"),
    "area true": (set_segment(area=True), CAR + "area", "area"),
    "area NaN": (set_segment(area=NAN), CAR + "area", "area"),
    "area of 400 digits": (set_segment(area=10**400), CAR + "area", "area"),
}  # fmt: skip
UNTRAINABLE: dict[str, tuple[Change, str]] = {  # but valid
    "no things": (all_categories(isthing=0), "isthing 1"),
    "no stuff": (all_categories(isthing=1), "isthing 0"),
    "255 kinds of stuff": (
        lambda t: t.content["categories"].extend({"id": n, "name": "x", "isthing": 0} for n in range(100, 352)),
        "255.*254",
    ),
    "no annotation": (lambda t: t.content.update(annotations=[]), "no usable image"),
}
BOX = {"id": 1, "image_id": 1, "category_id": 4, "bbox": [0, 0, 4, 4], "area": 16, "segmentation": [[0, 0, 4, 0, 4, 4]]}
FILES: dict[str, tuple[object, str]] = {  # name: (content, JSON unless bytes; what the sentence must name)
    "instances": ({"images": [], "categories": [], "annotations": [BOX]}, "instances file.*panoptic_"),
    "annotations of lists": ({"images": [], "categories": [], "annotations": [[]]}, "segments_info"),
    "results": ([{"image_id": 1, "score": 0.5}], "results"),
    "captions": ({"annotations": [{"id": 1, "image_id": 1, "caption": "a bus"}]}, "captions"),
    "labelme": ({"shapes": [], "imagePath": "a"}, "labelme"),
    "annotations an object": ({"images": [], "annotations": {"1": []}, "categories": []}, "`annotations`"),
    "annotations null": ({"images": [], "annotations": None, "categories": []}, "`annotations`"),
    "null": (None, "COCO's panoptic format"),
    "empty": (b"", "not valid JSON"),
    "cut": (b'{"images": [', "not valid JSON"),
    "Latin-1": ('{"images": [{"id": "ä"}]}'.encode("latin-1"), "not valid JSON"),
    "zero bytes": (bytes(64), "not valid JSON"),
    "compressed": (gzip.compress(b"{}"), "gzip"),
    "XML": (b"<annotation/>", "XML"),
    "nested 100,000 deep": (b"[" * 100_000, "nested"),
}


@pytest.fixture
def tree(tmp_path: Path) -> PanopticTree:
    """Valid, with found.json and found/ as its predictions."""
    tree = PanopticTree(tmp_path)
    shutil.copytree(tree.segments, tmp_path / "found")
    shutil.copy(tree.file, tmp_path / "found.json")
    return tree


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("solov2_r50_fpn_1x", ["data.train_scales=[48]", "data.train_long_edge=64"])


def load(tree: PanopticTree) -> list[dict]:
    return list(CocoPanoptic(tree.file, tree.images, training=True))


def refused(tree: PanopticTree, named: str, path: Path) -> str:
    """Why training stops."""
    with pytest.raises(InputError, match=named) as caught:
        load(tree)
    assert str(path) in str(caught.value)
    return str(caught.value)


def refused_by_command(tree: PanopticTree, capsys: pytest.CaptureFixture) -> str:
    """Why the comparison with the predictions stops."""
    assert main(["panoptic-quality", str(tree.file), str(tree.file.with_name("found.json"))]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


def test_the_tree_is_valid(tree: PanopticTree) -> None:
    assert len(load(tree)) == 3 and not list(find_panoptic_problems(tree.content))
    assert main(["panoptic-quality", str(tree.file), str(tree.file.with_name("found.json"))]) == 0


@pytest.mark.parametrize("fault", ENTRIES)
def test_entries(tree: PanopticTree, fault: str, capsys: pytest.CaptureFixture) -> None:
    change, named, kind = ENTRIES[fault]
    change(tree)
    tree.write()
    message = refused(tree, named, tree.file)
    assert "\n" not in message and refused_by_command(tree, capsys) == message
    assert kind in {problem.kind for problem in find_panoptic_problems(tree.content)}


def test_the_last_of_equal_keys_counts(tree: PanopticTree, capsys: pytest.CaptureFixture) -> None:
    tree.file.write_text(tree.file.read_text().replace('"id": 70001,', '"id": 70001, "id": 300,', 1))
    assert refused(tree, "image 1 .* 300", tree.file) == refused_by_command(tree, capsys)


@pytest.mark.parametrize("fault", UNTRAINABLE)
def test_what_cannot_be_trained_on(tree: PanopticTree, fault: str) -> None:
    change, named = UNTRAINABLE[fault]
    change(tree)
    tree.write()
    refused(tree, named, tree.file)


@pytest.mark.parametrize("name", FILES)
def test_other_files(tree: PanopticTree, name: str, capsys: pytest.CaptureFixture) -> None:
    content, named = FILES[name]
    tree.file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert refused(tree, named, tree.file) == refused_by_command(tree, capsys)


def test_missing_files_and_folders(tree: PanopticTree, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(tree.segments)
    message = refused(tree, str(tmp_path.parent / "panoptic"), tree.segments)  # both places
    assert refused_by_command(tree, capsys) == message
    tree.segments.write_text("a file")
    assert refused(tree, "is a folder", tree.segments) == refused_by_command(tree, capsys)
    tree.file.unlink()
    assert refused(tree, "does not exist", tree.file) == refused_by_command(tree, capsys)
    tree.file.mkdir()
    assert refused(tree, "is a folder", tree.file) == refused_by_command(tree, capsys)


PNGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "does not exist"),
    "a folder": (lambda png: (png.unlink(), png.mkdir()), "folder.*PNG"),
    "a link to nothing": (lambda png: (png.unlink(), png.symlink_to(png.parent / "none")), "link to .*none"),
    "empty": (replace_by(b""), "empty"),
    "HTML": (replace_by(b"<html>404</html>"), "HTML"),
    "a pointer": (replace_by(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "truncated": (lambda png: png.write_bytes(png.read_bytes()[:-60]), "truncated"),
    "damaged": (damage, "damaged"),
    "without pixels": (replace_by(png_header(WIDTH, HEIGHT)), "cannot be read"),
    "a JPEG": (save_as(format="JPEG"), "JPEG .*compression"),
    "a BMP": (save_as(format="BMP"), "BMP"),
    "a WebP without loss": (save_as(format="WEBP", lossless=True), "WEBP"),
    "gray": (convert("L"), "format L"),
    "gray with alpha": (convert("LA"), "format LA"),
    "black and white": (convert("1"), "format 1"),
    "a palette": (convert("P"), "format P"),
    "alpha": (convert("RGBA"), "format RGBA"),
    "gray, 16 bits": (lambda png: Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(png), "16 bits"),
    "RGB, 16 bits": (deepen, "16 bits"),
    "another size": (lambda png: Image.open(png).resize((WIDTH, 40)).save(png), f"{WIDTH} x 40.*{WIDTH} x {HEIGHT}"),
    "turned": (turn, f"{HEIGHT} x {WIDTH}.*{WIDTH} x {HEIGHT}"),
    "too large": (replace_by(png_header(70_000, 70_000)), "max_image_pixels"),
    "red and blue exchanged": (exchange_red_and_blue, "red and blue"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PNGS)
def test_pngs(tree: PanopticTree, fault: str, config: Config, capsys: pytest.CaptureFixture) -> None:
    change, named = PNGS[fault]
    png = tree.segments / "1.png"
    change(png)
    message = refused(tree, named, png)
    assert message.endswith(f"(segments of image 1 in {tree.file})") and "\n" not in message
    assert refused_by_command(tree, capsys) == message
    found = check_panoptic_data(tree.content, tree.images, tree.segments, config).findings
    kind = "red and blue" if change is exchange_red_and_blue else "unusable PNG"
    assert [x.image_id for x in found if x.kind == kind and re.search(named, x.message)] == [1]


@pytest.mark.parametrize("name", ["1\0.png", "\ud800.png", "a\nb\x1b[2J.png", "x" * 5000, "1.PNG", "."])
def test_names_of_pngs(tree: PanopticTree, name: str, capsys: pytest.CaptureFixture) -> None:
    tree.first["file_name"] = name
    tree.write()
    assert refused_by_command(tree, capsys) == printable(refused(tree, "segments of image 1 in ", tree.file))


UNUSUAL: dict[str, Change] = {
    "UTF-16": lambda t: t.file.write_bytes(json.dumps(t.content).encode("utf-16")),
    "byte order mark": lambda t: t.file.write_bytes(json.dumps(t.content).encode("utf-8-sig")),
    "interlaced": lambda t: interlace(t.segments / "1.png"),
    "a transparent color": lambda t: save_as(transparency=(1, 2, 3))(t.segments / "1.png"),
    "a second frame": lambda t: save_as(save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))])(
        t.segments / "1.png"
    ),
    "a link out of the folder": lambda t: (t.segments / "1.png").symlink_to(
        (t.segments / "1.png").rename(t.images / "1.png")
    ),
    "a name of control characters": lambda t: (set_category(name="bus\x1b[2J")(t), t.write()),
    "isthing true": lambda t: (set_category(isthing=True)(t), t.write()),
    "an area of 71 bits": lambda t: (set_segment(area=HUGE)(t), t.write()),
    "a negative corner": lambda t: (set_segment(bbox=[-4, -4, 20, 12])(t), t.write()),
    "an enormous box": lambda t: (set_segment(bbox=[1e300, HUGE, 1e300, HUGE])(t), t.write()),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_but_valid(tree: PanopticTree, name: str) -> None:
    expected = load(tree)[0]
    UNUSUAL[name](tree)
    found = load(tree)[0]
    assert (found["semantic"] == expected["semantic"]).all() and (found["masks"] == expected["masks"]).all()
    assert len(found["boxes"]) == 1
    assert main(["panoptic-quality", str(tree.file), str(tree.file.with_name("found.json"))]) == 0


def set_found(image: int = 0, **values: object) -> Change:
    """Change a prediction."""

    def change(tree: PanopticTree) -> None:
        content = json.loads(tree.file.with_name("found.json").read_text())
        content["annotations"][image].update(values)
        tree.file.with_name("found.json").write_text(json.dumps(content))

    return change


def draw_found(change: Callable[[np.ndarray], object]) -> Change:
    """Change the map predicted for image 1."""

    def draw(tree: PanopticTree) -> None:
        ids = paint(tree.infos())
        change(ids)
        Image.fromarray(rgb_from_ids(ids)).save(tree.file.with_name("found") / "1.png")

    return draw


def of_png(change: Callable[[Path], object]) -> Change:
    return lambda tree: change(tree.file.with_name("found") / "1.png")


PREDICTIONS: dict[str, tuple[Change, str]] = {
    "image twice": (set_found(image_id=2), "image 2 .*found.json "),
    "image missing": (set_found(image_id=8), "found.json .*1 image .*such as image 1"),
    "image id as text": (set_found(image_id="1"), "found.json .*image '1'.*image 1;"),
    "image id null": (set_found(image_id=None), "found.json .*None"),
    "no annotations": (lambda t: t.file.with_name("found.json").write_text("{}"), "found.json .*`annotations`"),
    "no segments_info": (set_found(segments_info=None), "image 1 of .*found.json "),
    "segment id 0": (set_found(segments_info=[{"id": 0, "category_id": 4}]), "image 1 of .*found.json .* 0"),
    "segment id twice": (set_found(segments_info=[{"id": 5, "category_id": 4}] * 2), "image 1 of .*found.json .* 5"),
    "unknown category": (
        set_found(segments_info=[{"id": 5, "category_id": 3}]), "segment 5 of image 1 of .*found.json .* 3.*truth",
    ),
    "no category": (set_found(segments_info=[{"id": 5}]), "segment 5 of image 1 of .*found.json .*category_id"),
    "PNG outside": (set_found(file_name="../1.png"), r"image 1 of .*found.json .*\.\./1.png"),
    "unlisted id": (draw_found(lambda ids: ids[:2].fill(99)), "image 1: .*found/1.png .*segment 99"),
    "segment without pixels": (draw_found(lambda ids: np.putmask(ids, ids == 300, 0)),
                               "image 1: .*segment 300.*found/1.png"),
    "red and blue exchanged": (of_png(exchange_red_and_blue), "found/1.png .*red and blue .*image 1 in .*found.json"),
    "PNG missing": (of_png(Path.unlink), "found/1.png .*image 1 in .*found.json"),
    "a JPEG": (of_png(save_as(format="JPEG")), "found/1.png .*JPEG.*image 1 in .*found.json"),
    "no folder": (lambda t: shutil.rmtree(t.file.with_name("found")), "found.json .*found"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PREDICTIONS)
def test_predictions(tree: PanopticTree, fault: str, capsys: pytest.CaptureFixture) -> None:
    change, named = PREDICTIONS[fault]
    change(tree)
    assert re.search(named, refused_by_command(tree, capsys))


def test_there_are_enough_cases() -> None:
    assert sum(map(len, (ENTRIES, UNTRAINABLE, FILES, PNGS, PREDICTIONS))) >= 60
