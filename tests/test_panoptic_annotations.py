"""Reading panoptic files: what is read, and where the PNGs are looked for; test_malformed_panoptic has the faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import shared_folder
from helpers.panoptic_files import HEIGHT, WIDTH, PanopticTree, paint
from PIL import Image

from solov2.data.annotations import load_json
from solov2.data.panoptic_annotations import (
    Category,
    classes_fault,
    find_panoptic_problems,
)
from solov2.data.panoptic_file import (
    looks_swapped,
    open_annotations,
    open_predictions,
    read_segment_map,
    segments_folder,
)
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


def test_all_faults_are_reported_together(tree: PanopticTree) -> None:
    tree.infos()[0]["iscrowd"] = 5
    tree.infos()[2]["id"] = 0
    tree.infos(2)[0]["category_id"] = 1
    problems = list(find_panoptic_problems(tree.content))
    assert [(p.kind, p.index, p.segment) for p in problems] == [
        ("iscrowd", 0, 0), ("segment id", 0, 2), ("unknown category", 2, 0),
    ]  # fmt: skip


def test_instance_models_refuse_panoptic_files(tree: PanopticTree) -> None:
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


def test_exchanged_colors_are_recognized(tree: PanopticTree) -> None:
    known = [entry["id"] for entry in tree.infos()]
    tree.save("1.png", paint(tree.infos()))
    swapped = tree.read("1.png")[..., ::-1]
    Image.fromarray(np.ascontiguousarray(swapped)).save(tree.segments / "1.png")
    found = measure_segments(read_segment_map(tree.segments / "1.png", (HEIGHT, WIDTH))).ids.tolist()
    assert looks_swapped(set(found) - set(known), known)
    assert not looks_swapped([], known) and not looks_swapped([1, 2, 3], known)
    assert (rgb_from_ids(paint(tree.infos()))[..., ::-1] == swapped).all()


def test_predictions_need_little(tree: PanopticTree, tmp_path: Path) -> None:
    truth = open_annotations(tree.file)
    folder = shutil.copytree(tree.segments, tmp_path / "found")
    annotations = [
        {"image_id": n, "file_name": f"{n}.png", "segments_info": [{"id": 5, "category_id": 4}]} for n in (3, 1, 2, 77)
    ]

    (tmp_path / "found.json").write_text(json.dumps({"annotations": annotations}))
    found = open_predictions(tmp_path / "found.json", truth)
    assert found.folder == folder and set(found.image_ids) == {1, 2, 3}
    assert found[3].segments == [(5, 4, False, 0, (0, 0, 0, 0))]


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
