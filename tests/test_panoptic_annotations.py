"""Reading panoptic files: every malformed entry and every unusable PNG is refused in one sentence that names it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_folder
from helpers.coco_files import png_header
from helpers.panoptic_files import HEIGHT, WIDTH, PanopticTree, paint
from PIL import Image

from solov2.data.annotations import load_json
from solov2.data.panoptic_annotations import (
    Category,
    classes_fault,
    find_panoptic_problems,
    load_panoptic_json,
)
from solov2.data.panoptic_file import looks_swapped, open_annotations, open_predictions, segments_folder
from solov2.errors import InputError
from solov2.ops.panoptic import measure_segments, rgb_from_ids


@pytest.fixture
def tree(tmp_path: Path) -> PanopticTree:
    return PanopticTree(tmp_path)


def test_what_is_read(tree: PanopticTree) -> None:
    found = open_annotations(tree.write())
    assert found.image_ids == [1, 2, 3] and 2 in found and 4 not in found
    assert found.categories[:2] == [(9, "bus", True), (2, "road", False)]
    record, png, segments = found[1]
    assert record == (1, "1.jpg", HEIGHT, WIDTH) and png == "1.png"
    assert segments[1] == (300, 9, True, 80, (30, 4, 10, 8))
    ids = found.read_map(1)
    assert ids.dtype == np.int32 and (ids == paint(tree.infos())).all()


def test_cityscapes(tree: PanopticTree) -> None:
    """Ids of images are text, and names of PNGs differ from those of the images; iscrowd may be missing."""
    for number, image, annotation in zip((1, 2, 3), tree.content["images"], tree.content["annotations"]):
        image["id"] = annotation["image_id"] = f"aachen_{number}"
        image["file_name"] = f"aachen/{number}_leftImg8bit.jpg"
        annotation["file_name"] = f"aachen_{number}_gtFine.png"
        (tree.segments / f"{number}.png").rename(tree.segments / annotation["file_name"])
    del tree.infos()[0]["iscrowd"]
    found = open_annotations(tree.write())
    assert found.image_ids == ["aachen_1", "aachen_2", "aachen_3"]
    assert (found.read_map("aachen_1") == paint(tree.infos())).all()
    assert not found["aachen_1"].segments[0].is_crowd
    assert not any(s.is_crowd for s in open_annotations(tree.file, crowd="instance")["aachen_1"].segments)


def categories(tree: PanopticTree) -> dict:
    return tree.content["categories"][0]


def image(tree: PanopticTree) -> dict:
    return tree.content["images"][1]


# name of the fault: how to make it, what the message must name, the kind
FAULTS: dict[str, tuple[Callable[[PanopticTree], object], str, str]] = {
    "no isthing": (lambda t: categories(t).pop("isthing"), "category 9 ", "isthing"),
    "isthing 2": (lambda t: categories(t).update(isthing=2), "category 9 .* 2", "isthing"),
    "isthing as text": (lambda t: categories(t).update(isthing="1"), "category 9 ", "isthing"),
    "category id twice": (lambda t: categories(t).update(id=20), "category id 20 ", "id twice"),
    "category id as text": (lambda t: categories(t).update(id="9"), "category", "no id"),
    "category without a name": (lambda t: categories(t).pop("name"), "category 9 ", "category name"),
    "image id twice": (lambda t: image(t).update(id=1), "image id 1 ", "id twice"),
    "image id as a list": (lambda t: image(t).update(id=[2]), r"image.*\[2\]", "no id"),
    "image id as a fraction": (lambda t: image(t).update(id=2.5), "image.*2.5", "no id"),
    "image id as a truth value": (lambda t: image(t).update(id=True), "image.*True", "no id"),
    "image id empty": (lambda t: image(t).update(id=""), "image", "no id"),
    "mixed image ids": (lambda t: image(t).update(id="b"), "1 and 'b'", "mixed ids"),
    "image without a size": (lambda t: image(t).pop("width"), "image 2 ", "size"),
    "image larger than the limit": (lambda t: image(t).update(width=10**6, height=10**6), "image 2 ", "size"),
    "image outside": (lambda t: image(t).update(file_name="../2.jpg"), "image 2 .*\\.\\./2.jpg", "file outside"),
    "an annotation of an unknown image": (lambda t: t.first.update(image_id=8), "image 8 ", "unknown image"),
    "an annotation without image_id": (lambda t: t.first.pop("image_id"), "annotation", "unknown image"),
    "an annotation that is a number": (lambda t: t.content["annotations"].append(3), "annotation.* 3", "unknown image"),
    "two annotations of one image": (lambda t: t.first.update(image_id=2), "image 2 ", "image twice"),
    "no file_name": (lambda t: t.first.pop("file_name"), "image 1 ", "file name"),
    "a PNG outside": (lambda t: t.first.update(file_name="../1.png"), r"image 1 .*\.\./1.png", "file outside"),
    "a PNG with an absolute path": (lambda t: t.first.update(file_name="/1.png"), "image 1 .*/1.png", "file outside"),
    "no segments_info": (lambda t: t.first.pop("segments_info"), "image 1 ", "no segments"),
    "segment id 0": (lambda t: t.infos()[0].update(id=0), "image 1 .* 0", "segment id"),
    "negative segment id": (lambda t: t.infos()[0].update(id=-4), "image 1 .*-4", "segment id"),
    "segment id of 25 bits": (lambda t: t.infos()[0].update(id=2**24), f"image 1 .*{2**24}", "segment id"),
    "segment id as a fraction": (lambda t: t.infos()[0].update(id=1.5), "image 1 .*1.5", "segment id"),
    "a segment that is a number": (lambda t: t.infos().append(3), "image 1 ", "segment id"),
    "segment id twice": (lambda t: t.infos()[0].update(id=300), "image 1 .* 300", "segment id twice"),
    "unknown category": (
        lambda t: t.infos()[0].update(category_id=3), "segment 70001 of image 1 .* 3", "unknown category"
    ),
    "category as text": (lambda t: t.infos()[0].update(category_id="4"), "segment 70001 of image 1 ", "category id"),
    "iscrowd 2": (lambda t: t.infos()[0].update(iscrowd=2), "segment 70001 of image 1 .* 2", "iscrowd"),
    "no bbox": (lambda t: t.infos()[0].pop("bbox"), "segment 70001 of image 1 ", "box"),
    "a bbox of text": (lambda t: t.infos()[0].update(bbox=[1, 2, "3", 4]), "segment 70001 of image 1 ", "box"),
    "no area": (lambda t: t.infos()[0].pop("area"), "segment 70001 of image 1 ", "area"),
    "area as text": (lambda t: t.infos()[0].update(area="12"), "segment 70001 of image 1 ", "area"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_stops_loading(tree: PanopticTree, fault: str) -> None:
    change, named, kind = FAULTS[fault]
    assert not list(find_panoptic_problems(tree.content))
    change(tree)
    with pytest.raises(InputError, match=named) as caught:
        open_annotations(tree.write())
    assert str(tree.file) in str(caught.value) and "\n" not in str(caught.value)
    assert kind in {problem.kind for problem in find_panoptic_problems(tree.content)}


def test_all_faults_are_reported_together(tree: PanopticTree) -> None:
    tree.infos()[0]["iscrowd"] = 5
    tree.infos()[2]["id"] = 0
    tree.infos(2)[0]["category_id"] = 1
    problems = list(find_panoptic_problems(tree.content))
    assert [(p.kind, p.index, p.segment) for p in problems] == [
        ("iscrowd", 0, 0), ("segment id", 0, 2), ("unknown category", 2, 0),
    ]  # fmt: skip


def test_other_files_are_named(tree: PanopticTree, tmp_path: Path) -> None:
    def refuse(content: object, *words: str) -> None:
        tree.file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=re.escape(str(tree.file))) as caught:
            load_panoptic_json(tree.file)
        assert all(word in str(caught.value) for word in words), caught.value

    box = {
        "id": 1,
        "image_id": 1,
        "category_id": 4,
        "bbox": [0, 0, 4, 4],
        "area": 16,
        "segmentation": [[0, 0, 4, 0, 4, 4]],
    }
    refuse({**tree.content, "annotations": [box]}, "instances file", "segments_info")
    refuse([{"image_id": 1, "score": 0.5}], "results")
    refuse({"images": [], "annotations": []}, "categories")
    refuse({"shapes": [], "imagePath": "a"}, "labelme")
    refuse(7, "images")
    with pytest.raises(InputError, match="does not exist"):
        load_panoptic_json(tmp_path / "none.json")
    tree.write()
    with pytest.raises(InputError, match="panoptic annotation file .*num_stuff"):
        load_json(tree.file)


def test_both_kinds_of_classes_are_needed() -> None:
    things, stuff = [Category(1, "a", True)], [Category(number, "b", False) for number in range(2, 257)]
    assert classes_fault(things + stuff[:254]) is None
    assert "things" in classes_fault(stuff) and "instance" in classes_fault(things)
    assert "255" in classes_fault(things + stuff)


def test_a_crowd_of_stuff_is_a_warning(tree: PanopticTree, caplog: pytest.LogCaptureFixture) -> None:
    open_annotations(tree.file)
    assert not caplog.records
    tree.infos()[3]["iscrowd"] = 1
    open_annotations(tree.write())
    assert "segment 7 of image 1" in caplog.text


def test_the_folder_of_the_pngs(tree: PanopticTree, tmp_path: Path) -> None:
    assert segments_folder(tree.file) == tree.segments
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    moved = shutil.move(tree.file, annotations / "panoptic.json")
    assert segments_folder(moved) == tree.segments  # one level up
    (annotations / "panoptic").mkdir()
    assert segments_folder(moved) == annotations / "panoptic"
    assert segments_folder(moved, tree.segments) == tree.segments
    with pytest.raises(InputError, match=str(tmp_path / "nowhere")):
        segments_folder(moved, tmp_path / "nowhere")
    lonely = annotations / "other.json"
    with pytest.raises(InputError) as caught:
        segments_folder(lonely)
    assert str(annotations / "other") in str(caught.value) and str(tmp_path / "other") in str(caught.value)


PNGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-60]), "truncated"),
    "without pixels": (lambda path: path.write_bytes(png_header(WIDTH, HEIGHT)), "cannot be read"),
    "a JPEG": (lambda path: Image.open(path).save(path, format="JPEG"), "JPEG"),
    "a BMP": (lambda path: Image.open(path).save(path, format="BMP"), "BMP"),
    "gray": (lambda path: Image.open(path).convert("L").save(path), "format L"),
    "a palette": (lambda path: Image.open(path).convert("P").save(path), "format P"),
    "alpha": (lambda path: Image.open(path).convert("RGBA").save(path), "format RGBA"),
    "16 bits": (lambda path: Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(path), "16 bits"),
    "another size": (lambda path: Image.open(path).resize((WIDTH, 40)).save(path), f"{WIDTH} x 40.*{WIDTH} x {HEIGHT}"),
    "too large": (lambda path: path.write_bytes(png_header(70000, 70000)), "max_image_pixels"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PNGS)
def test_unusable_pngs(tree: PanopticTree, fault: str) -> None:
    change, named = PNGS[fault]
    change(tree.segments / "1.png")
    found = open_annotations(tree.file)
    with pytest.raises(InputError, match=named) as caught:
        found.read_map(1)
    message = str(caught.value)
    assert str(tree.segments / "1.png") in message and "image 1 in" in message and str(tree.file) in message
    found.read_map(2)


def test_exchanged_colors_are_recognized(tree: PanopticTree) -> None:
    known = [entry["id"] for entry in tree.infos()]
    tree.save("1.png", paint(tree.infos()))
    swapped = tree.read("1.png")[..., ::-1]
    Image.fromarray(np.ascontiguousarray(swapped)).save(tree.segments / "1.png")
    found = measure_segments(open_annotations(tree.file).read_map(1)).ids.tolist()
    assert looks_swapped(set(found) - set(known), known)
    assert not looks_swapped([], known) and not looks_swapped([1, 2, 3], known)
    assert (rgb_from_ids(paint(tree.infos()))[..., ::-1] == swapped).all()


def test_predictions_need_little_and_are_checked(tree: PanopticTree, tmp_path: Path) -> None:
    truth = open_annotations(tree.file)
    folder = shutil.copytree(tree.segments, tmp_path / "found")
    annotations = [
        {"image_id": n, "file_name": f"{n}.png", "segments_info": [{"id": 5, "category_id": 4}]} for n in (3, 1, 2, 77)
    ]

    def load(**changes: object) -> object:
        content = {"annotations": [{**annotations[0], **changes}, *annotations[1:]]}
        (tmp_path / "found.json").write_text(json.dumps(content))
        return open_predictions(tmp_path / "found.json", truth)

    found = load()
    assert (
        found.folder == folder
        and set(found.image_ids) == {1, 2, 3}
        and found[3].segments == [(5, 4, False, 0, (0, 0, 0, 0))]
    )
    for changes, named in (
        ({"image_id": 1}, "image 1"), ({"image_id": 78}, "1 image .* 3"), ({"image_id": "3"}, "1 image .* 3"),
        ({"segments_info": [{"id": 5, "category_id": 3}]}, "segment 5 of image 3 .*3.*ground truth"),
        ({"segments_info": [{"id": 0, "category_id": 4}]}, "image 3 .* 0"),
        ({"segments_info": [{"id": 5, "category_id": 4}] * 2}, "image 3 .* 5"),
        ({"segments_info": {}}, "image 3"), ({"file_name": "../a.png"}, "image 3 .*a.png"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=named) as caught:
            load(**changes)
        assert str(tmp_path / "found.json") in str(caught.value)


def test_photographs() -> None:
    root = shared_folder("coco_panoptic_photos")
    found = open_annotations(root / "annotations" / "panoptic_val2017.json")
    assert len(found.image_ids) == 30 and len(found.categories) == 133
    total = 0
    for image_id in found.image_ids:
        segments = found[image_id].segments
        table = measure_segments(found.read_map(image_id))
        stated = sorted((s.id, s.area, *s.box) for s in segments)
        x1, y1, x2, y2 = table.boxes.T
        measured = np.stack((table.ids, table.areas, x1, y1, x2 - x1, y2 - y1), axis=1)
        assert [list(row) for row in stated] == measured.tolist()
        total += len(segments)
    assert total == 324
