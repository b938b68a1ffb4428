"""`iscrowd` 1 on single objects, as annotation tools write it: stated at the start, a setting, and a repair."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from helpers.coco_files import CocoTree, annotation

from solov2.commands.check_data import main
from solov2.config import load_config
from solov2.data.build import oracle_dataset, training_dataset, validation_dataset
from solov2.data.coco import CocoInstances


@pytest.fixture
def tree(tmp_path: Path) -> CocoTree:
    """Four of five annotations have been drawn with a brush."""
    tree = CocoTree(tmp_path)
    del tree.content["annotations"][-1]
    for entry in tree.content["annotations"][1:]:
        entry["iscrowd"] = 1
    tree.file.write_text(json.dumps(tree.content))
    return tree


def opened(tree: CocoTree, caplog: pytest.LogCaptureFixture, **settings: object) -> list[tuple[int, str]]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "solov2"):
        CocoInstances(tree.file, tree.images, **{"training": True, **settings})
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_the_share_is_stated(tree: CocoTree, caplog: pytest.LogCaptureFixture) -> None:
    for training in (True, False):
        [(level, text)] = opened(tree, caplog, training=training)
        assert level == logging.WARNING and f"{tree.file}: 4 of 5 annotations (80.0%)" in text
        assert "data.crowd=instance" in text and "--fix" in text
    assert opened(tree, caplog, crowd="instance") == []


def test_few_crowds_are_no_warning(tree: CocoTree, caplog: pytest.LogCaptureFixture) -> None:
    entries = [annotation(number, 1, 1, (4, 4, 20, 16)) for number in range(100, 109)]
    tree.file.write_text(json.dumps(tree.content | {"annotations": [*entries, tree.content["annotations"][1]]}))
    [(level, text)] = opened(tree, caplog)
    assert level == logging.INFO and "1 of 10 annotations (10.0%)" in text and "data.crowd" not in text


def test_the_setting_takes_crowds_as_instances(tree: CocoTree) -> None:
    places = {f"data.{split}_{kind}": str(path) for split in ("train", "val")
              for kind, path in (("annotations", tree.file), ("images", tree.images))}  # fmt: skip
    for crowd, images, instances, crowds in (("ignore", 1, 1, 4), ("instance", 3, 5, 0)):
        config = load_config("solov2_r50_fpn_1x", {**places, "data.crowd": crowd})
        training = training_dataset(config)
        assert (len(training), len(training.instance_table()[0])) == (images, instances)
        assert len(oracle_dataset(config, "val").instance_table()[0]) == instances
        for dataset in (training, validation_dataset(config)):  # what evaluation compares with
            assert sum(entry["iscrowd"] for entry in dataset.coco.dataset["annotations"]) == crowds


def test_check_data_warns_and_repairs_on_request(tree: CocoTree, capsys: pytest.CaptureFixture) -> None:
    fixed, words = tree.file.with_name("fixed.json"), [str(tree.file), "--images", str(tree.images), "--workers", "1"]
    assert main([*words, "--fix", str(fixed)]) == 0
    out = capsys.readouterr().out
    assert "warning: many crowds (1)\n    4 of 5 annotations (80.0%)" in out and "note: crowd (4)" in out
    assert json.loads(fixed.read_text()) == tree.content  # not changed without being asked
    assert main([*words, "--set", "data.crowd=instance", "--fix", str(fixed), "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert "crowd (" not in out and "3 images, 5 usable instances" in out and "4 changes" in out
    assert [entry["iscrowd"] for entry in json.loads(fixed.read_text())["annotations"]] == [0] * 5
    changes = json.loads(fixed.with_name("fixed.json.changes.json").read_text())
    assert [(change["id"], change["action"]) for change in changes] == [(n, "changed") for n in (12, 21, 22, 31)]
