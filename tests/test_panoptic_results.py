"""Results in COCO's panoptic format: what is written is what the reader reads, under names that do not collide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from solov2.data.panoptic_file import open_annotations
from solov2.data.panoptic_results import PanopticWriter
from solov2.errors import InputError
from solov2.ops.label_map import label_map
from solov2.ops.masks import encode_rle
from solov2.ops.merge import merge_segments
from tests.helpers.panoptic_files import PanopticTree

THINGS, STUFF = [4, 9], [2, 11, 20]  # category ids of the labels


def a_result() -> dict[str, Any]:
    """A car, a bus and three kinds of stuff."""
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[0, 4:20, 3:30], masks[1, 10:40, 20:50] = True, True
    instances = {"scores": torch.tensor([0.9, 0.7]), "labels": torch.tensor([0, 1]), "masks": encode_rle(masks)}
    semantic = label_map(torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0)), (48, 64), (48, 64))
    return merge_segments(instances, semantic, 3, score_threshold=0.3, overlap_threshold=0.5, stuff_area_limit=4)


def writer_to(folder: Path, tree: Path, things: list[int | None] | None = None) -> PanopticWriter:
    file = PanopticTree(tree).file
    return PanopticWriter(folder, open_annotations(file).categories, THINGS if things is None else things, STUFF)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    result, writer = a_result(), writer_to(tmp_path / "out", tmp_path)
    assert writer.add(1, "a/x.jpg", result) == tmp_path / "out" / "panoptic" / "a" / "x.png"
    writer.add("two", "b/x.jpg", {"panoptic_map": torch.zeros(5, 6, dtype=torch.int32), "segments": []})
    writer.close()
    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert [x["file_name"] for x in content["annotations"]] == ["a/x.png", "b/x.png"]
    infos = content["annotations"][0]["segments_info"]
    assert [x["category_id"] for x in infos] == [4, 9, 2, 11, 20]
    assert [x["isthing"] for x in infos] == [1, 1, 0, 0, 0] and all(x["iscrowd"] == 0 for x in infos)
    assert [x.get("score") for x in infos] == [pytest.approx(0.9), pytest.approx(0.7), None, None, None]
    assert infos[0]["bbox"] == [3, 4, 27, 16] and infos[0]["area"] == 27 * 16
    assert not list(tmp_path.rglob("*.tmp"))
    for entry, name in zip((content["images"], content["annotations"]), ("id", "image_id")):
        entry[1][name] = 2  # ids of one kind, as the reader wants them
    (tmp_path / "out" / "panoptic.json").write_text(json.dumps(content))
    read = open_annotations(tmp_path / "out" / "panoptic.json")
    assert (read.read_map(1) == result["panoptic_map"].numpy()).all() and not read.read_map(2).any()
    assert [(s.id, s.area) for s in read[1].segments] == [(s["id"], s["area"]) for s in result["segments"]]


def test_classes_without_a_category_become_void(tmp_path: Path) -> None:
    result, writer = a_result(), writer_to(tmp_path / "out", tmp_path, [4, None])
    writer.add(1, "x.jpg", result)
    writer.close()
    read = open_annotations(tmp_path / "out" / "panoptic.json")
    assert [s.category_id for s in read[1].segments] == [4, 2, 11, 20]
    ids = result["panoptic_map"].numpy()
    assert (read.read_map(1) == np.where(ids == 2, 0, ids)).all() and (ids == 2).any()


@pytest.mark.parametrize("name", ["/x.jpg", "../x.jpg", "a/X.png"])
def test_names_that_collide_or_leave_the_folder(tmp_path: Path, name: str) -> None:
    writer = writer_to(tmp_path / "out", tmp_path)
    writer.add(1, "a/x.jpg", a_result())
    with pytest.raises(InputError, match=name):
        writer.add(2, name, a_result())
    assert list(writer.entries) == [1]
