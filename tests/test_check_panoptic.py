"""check-data on panoptic files: each planted fault is found and no other; statistics, repair and the command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_folder
from helpers.panoptic_files import HEIGHT, WIDTH, PanopticTree, paint, segment
from PIL import Image

from solov2.commands.check_data import main
from solov2.config import load_config
from solov2.data.panoptic import CocoPanoptic
from solov2.data_check.check import Report
from solov2.data_check.findings import PANOPTIC_SEVERITIES, SEVERITIES
from solov2.data_check.panoptic import check_panoptic_data, clear_crowds
from solov2.ops.panoptic import rgb_from_ids

SIZES = ["data.train_scales=[48]", "data.train_long_edge=64"]


@pytest.fixture
def tree(tmp_path: Path) -> PanopticTree:
    """Without the crowd, so that nothing is to be reported."""
    tree = PanopticTree(tmp_path)
    tree.infos()[1]["iscrowd"] = 0
    tree.write()
    return tree


def check(tree: PanopticTree) -> Report:
    config = load_config("solov2_r50_fpn_1x", SIZES)
    return check_panoptic_data(tree.content, tree.images, tree.segments, config)


def found(report: Report) -> Counter:
    return Counter((finding.kind, finding.image_id, finding.segment_id) for finding in report.findings)


def run(tree: PanopticTree, *words: str) -> int:
    tree.write()
    sizes = [word for size in SIZES for word in ("--set", size)]
    return main([str(tree.file), "--images", str(tree.images), "--workers", "1", *sizes, *words])


def repaint(tree: PanopticTree, change: Callable[[np.ndarray], Any]) -> None:
    ids = paint(tree.infos())
    change(ids)
    tree.save("1.png", ids)


def exchange_red_and_blue(tree: PanopticTree) -> None:
    pixels = rgb_from_ids(paint(tree.infos()))[..., ::-1]
    Image.fromarray(np.ascontiguousarray(pixels)).save(tree.segments / "1.png")


def empty(tree: PanopticTree) -> None:
    tree.infos(2)[:] = []
    tree.save("3.png", np.zeros((HEIGHT, WIDTH), np.int32))


CAR, BUS, ROAD, SKY = 70001, 300, 2**24 - 1, 7  # segments of image 1
FAULTS: dict[str, tuple[Callable[[PanopticTree], Any], list[tuple]]] = {
    "nothing": (lambda t: None, []),
    "isthing": (lambda t: t.content["categories"][4].pop("isthing"), [("isthing", None, None)]),
    "mixed ids": (lambda t: t.content["images"].append({**t.content["images"][0], "id": "b", "file_name": "x.jpg"}),
                  [("mixed ids", "b", None)]),
    "image twice": (lambda t: t.content["annotations"].append(dict(t.first)), [("image twice", 1, None)]),
    "no segments": (lambda t: t.content["annotations"][2].pop("segments_info"),
                    [("no segments", 3, None), ("no annotation", 3, None)]),
    "segment id": (lambda t: t.infos().append({"id": 0}), [("segment id", 1, 0)]),
    "segment id twice": (lambda t: t.infos().append(dict(t.infos()[0])), [("segment id twice", 1, CAR)]),
    "unknown category": (lambda t: t.infos()[0].update(category_id=5),
                         [("unknown category", 1, CAR), ("unused category", None, None)]),
    "crowd": (lambda t: t.infos()[1].update(iscrowd=1), [("crowd", 1, BUS)]),
    "crowd of stuff": (lambda t: t.infos()[3].update(iscrowd=1), [("crowd of stuff", 1, SKY)]),
    "area differs": (lambda t: t.infos()[0].update(area=241), [("area differs", 1, CAR)]),
    "box differs": (lambda t: t.infos()[0].update(bbox=[4, 4, 20, 13]), [("box differs", 1, CAR)]),
    "area": (lambda t: t.infos()[0].pop("area"), [("area", 1, CAR)]),
    "box": (lambda t: t.infos()[0].update(bbox=[4, 4, None, 12]), [("box", 1, CAR)]),
    "iscrowd": (lambda t: t.infos()[0].update(iscrowd=3), [("iscrowd", 1, CAR)]),
    "left out": (lambda t: t.infos()[0].update(area=0), [("area differs", 1, CAR), ("left out", 1, CAR)]),
    "empty mask": (lambda t: t.infos().append(segment(9, 4, (0, 0, 1, 1))), [("empty mask", 1, 9)]),
    "unlisted id": (lambda t: repaint(t, lambda ids: ids[:2].fill(99)), [("unlisted id", 1, None)]),
    "red and blue": (exchange_red_and_blue,
                     [("red and blue", 1, None), ("mostly void", 1, None),
                      *[("empty mask", 1, number) for number in (CAR, BUS, SKY)]]),
    "a missing PNG": (lambda t: (t.segments / "1.png").unlink(), [("unusable PNG", 1, None)]),
    "a gray PNG": (lambda t: Image.new("L", (WIDTH, HEIGHT)).save(t.segments / "1.png"), [("unusable PNG", 1, None)]),
    "a missing image": (lambda t: (t.images / "1.jpg").unlink(), [("missing file", 1, None)]),
    "mostly void": (lambda t: (t.infos(1).__setitem__(0, segment(CAR, 11, (0, 30, 64, 18))),
                               t.save("2.png", paint(t.infos(1)))), [("mostly void", 2, None)]),
    "all void": (lambda t: t.save("3.png", np.zeros((HEIGHT, WIDTH), np.int32)),
                 [("all void", 3, None), ("empty mask", 3, 5)]),
    "no segment": (empty, [("mostly void", 3, None), ("no segment", 3, None)]),
    "no annotation": (lambda t: t.content["annotations"].pop(2), [("no annotation", 3, None)]),
    "one PNG of two images": (lambda t: t.content["annotations"].__setitem__(2, {**t.first, "image_id": 3}),
                              [("file twice", 3, None)]),
    "classes": (lambda t: [category.update(isthing=1) for category in t.content["categories"]],
                [("classes", None, None)]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_no_other(tree: PanopticTree, fault: str) -> None:
    # Image 3 is not mostly void, unless that is what is planted.
    tree.infos(2)[0] = segment(5, 9, (0, 0, 64, 40))
    tree.save("3.png", paint(tree.infos(2)))
    change, expected = FAULTS[fault]
    change(tree)
    assert found(check(tree)) == Counter(expected)


def test_every_kind_has_a_case() -> None:
    planted = {kind for _, findings in FAULTS.values() for kind, *_ in findings}
    assert planted >= set(PANOPTIC_SEVERITIES) and not set(PANOPTIC_SEVERITIES) & set(SEVERITIES)


def test_statistics(tree: PanopticTree) -> None:
    statistics = check(tree).statistics
    assert statistics["images"] == 3 and statistics["instances"] == 3
    assert statistics["instances_by_class"] == {"car": 1, "bus": 2}
    panoptic, pixels = statistics["panoptic"], 3 * HEIGHT * WIDTH
    covered = 20 * 12 + 10 * 8 + 64 * 24 + 64 * 38 + 900
    assert panoptic["void_share"] == pytest.approx(1 - covered / pixels) and panoptic["mostly_void"] == 1
    assert panoptic["images_without_things"] == 1 and panoptic["images_without_stuff"] == 1
    assert panoptic["stuff"]["grass"] == {"segments": 1, "images": 1, "share": pytest.approx(64 * 38 / pixels)}
    assert panoptic["things"]["bus"]["segments"] == 2 and [*panoptic["stuff"]] == ["road", "grass", "sky"]
    assert json.loads(json.dumps(statistics)) == statistics


def test_repair(tree: PanopticTree, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = json.loads(tree.file.read_text())
    tree.infos()[0].update(area=3, bbox=[0, 0, 1, 1])
    del tree.infos()[1]["area"]
    tree.infos(1)[0]["bbox"] = "none"
    fixed, report = tmp_path / "fixed.json", tmp_path / "report.json"
    assert run(tree, "--fix", str(fixed), "--json", str(report)) == 1
    assert json.loads(fixed.read_text()) == whole and json.loads(tree.file.read_text()) == tree.content
    changes = json.loads((tmp_path / "fixed.json.changes.json").read_text())
    assert [(c["id"], c["segment"], c["kind"]) for c in changes] == [
        (1, 0, "area"), (1, 0, "box"), (1, 1, "area"), (2, 0, "box"),
    ]  # fmt: skip
    findings = json.loads(report.read_text())["findings"]
    assert {f["fix"] for f in findings if f["kind"] in ("area", "box", "area differs", "box differs")} == {"repairs"}
    out = capsys.readouterr().out
    assert "segment 70001" in out and str(tree.segments) in out
    repaired = CocoPanoptic(fixed, tree.images, segments=tree.segments, training=True)
    assert repaired[0]["boxes"].tolist() == [[4, 4, 24, 16], [30, 4, 40, 12]]
    tree.content = json.loads(fixed.read_text())
    assert run(tree) == 0


def test_crowds_as_instances(tree: PanopticTree, tmp_path: Path) -> None:
    """With data.crowd=instance, as training reads the file; --fix writes one that needs no setting."""
    whole = json.loads(tree.file.read_text())
    for place in (1, 3):  # a thing and stuff
        tree.infos()[place]["iscrowd"] = 1
    fixed, file = tmp_path / "fixed.json", tmp_path / "report.json"
    assert run(tree, "--set", "data.crowd=instance", "--fix", str(fixed), "--json", str(file)) == 0
    report = json.loads(file.read_text())
    assert not {"crowd", "crowd of stuff"} & {finding["kind"] for finding in report["findings"]}
    expected = CocoPanoptic(tree.file, tree.images, training=True, crowd="instance")
    assert report["statistics"]["instances"] == len(expected.instance_table()[0]) == 3
    assert report["statistics"]["panoptic"]["crowds"] == 0
    assert json.loads(fixed.read_text()) == whole
    changes = json.loads((tmp_path / "fixed.json.changes.json").read_text())
    assert [(c["id"], c["segment"], c["kind"]) for c in changes] == [(1, 1, "crowd"), (1, 3, "crowd")]


def test_crowds_of_malformed_entries() -> None:
    broken = [None, {}, {"segments_info": None}, {"segments_info": [None, {"iscrowd": 2}]}]
    cleared, changes = clear_crowds({"annotations": [*broken, {"segments_info": [{"iscrowd": 1}]}]})
    assert cleared["annotations"] == [*broken, {"segments_info": [{"iscrowd": 0}]}]
    assert [(c["index"], c["id"], c["segment"]) for c in changes] == [(4, None, 0)]


def test_command(tree: PanopticTree, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tree, "--json", "-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["statistics"]["panoptic"]["crowds"] == 0 and "grass 1" in err and "void" in err
    png = tree.segments / "1.png"
    before = png.read_bytes()
    assert run(tree, "--json", str(png), "--overwrite") == 2 and png.read_bytes() == before
    moved = tree.segments.rename(tmp_path / "elsewhere")
    assert run(tree) == 2 and str(tree.segments) in capsys.readouterr().err
    assert run(tree, "--segments", str(moved)) == 0


def test_several_processes_find_the_same(tree: PanopticTree) -> None:
    for number in range(4, 14):
        tree.content["images"].append({**tree.content["images"][2], "id": number})
        tree.content["annotations"].append({**tree.content["annotations"][2], "image_id": number})
    config = load_config("solov2_r50_fpn_1x", SIZES)
    reports = [
        check_panoptic_data(tree.content, tree.images, tree.segments, config, workers=workers) for workers in (1, 2)
    ]
    assert reports[0].findings == reports[1].findings and reports[0].statistics == reports[1].statistics


def test_photographs_have_no_errors() -> None:
    root = shared_folder("coco_panoptic_photos")
    content = json.loads((root / "annotations" / "panoptic_val2017.json").read_text())
    config = load_config("solov2_r50_fpn_1x", [])
    report = check_panoptic_data(content, root / "val2017", root / "annotations" / "panoptic_val2017", config)
    kinds = Counter(finding.kind for finding in report.findings)
    assert kinds == {"unused category": 52, "crowd": 2, "mostly void": 1} and not report.changes
    assert report.statistics["instances"] == 217 and report.statistics["panoptic"]["images_without_stuff"] == 3
