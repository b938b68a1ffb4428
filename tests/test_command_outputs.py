"""Files of the commands: no input is destroyed, files come before text, and a failed write loses nothing else."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.coco_files import CocoTree

from solov2.commands import check_data, evaluate
from solov2.commands.main import main
from solov2.training.logger import RunLogger

NAME = "car\x1b[2J\nerror: \u202e\u732b"
SHOWN = r"car\x1b[2J\nerror: \u202e" + "\u732b"


@pytest.fixture
def tree(tmp_path: Path) -> CocoTree:
    tree = CocoTree(tmp_path)
    tree.content["categories"][0]["name"] = NAME
    tree.file.write_text(json.dumps(tree.content))
    return tree


def eval_words(tree: CocoTree, *more: str) -> list[str]:
    data = ["--val-annotations", str(tree.file), "--val-images", str(tree.images)]
    small = ["--set", "data.shapes=false", "--set", "model.input_scale=[64,64]", "--workers", "0", "--device", "cpu"]
    return ["eval", "quickstart", "--oracle", *data, *small, *more]


def check_words(tree: CocoTree, *more: str) -> list[str]:
    return ["check-data", str(tree.file), "--images", str(tree.images), "--workers", "1", *more]


@pytest.mark.parametrize("words", [eval_words, check_words])
def test_annotations_and_images_are_not_replaced(words: Any, tree: CocoTree, capsys: pytest.CaptureFixture) -> None:
    image = tree.images / "1.png"
    linked = tree.file.with_name("linked.json")
    os.link(tree.file, linked)
    before = [path.read_bytes() for path in (tree.file, image)]
    for path in (tree.file, image, linked):
        assert main(words(tree, "--json", str(path), "--overwrite")) == 2
        out, err = capsys.readouterr()
        assert out == "" and f"error: --json {path} would replace the input" in err
    assert [path.read_bytes() for path in (tree.file, image)] == before


@pytest.mark.parametrize(("module", "words"), [(evaluate, eval_words), (check_data, check_words)])
def test_what_a_full_disk_leaves(
    module: Any, words: Any, tree: CocoTree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One sentence, and the figures of what may have been hours of work on the screen."""

    def full(path: str, *_content: Any, **_options: Any) -> None:
        assert capsys.readouterr().out == ""  # files come first
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(module, "write_json", full)
    assert main(words(tree, "--json", "x.json", *(["--per-class"] if module is evaluate else []))) == 2
    out, err = capsys.readouterr()
    assert SHOWN in out and "\x1b" not in out + err
    assert err.splitlines()[-1] == f"error: x.json: {os.strerror(errno.ENOSPC)}"


def test_a_run_does_not_delete_what_it_starts_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, config = tmp_path / "run", tmp_path / "run" / "config.yaml"
    (run / "data" / "annotations").mkdir(parents=True)
    annotations = run / "data" / "annotations" / "instances_train2017.json"
    for file in (run / "log.jsonl", annotations):
        file.touch()
    config.write_text("base: quickstart\n")
    others = ["--set", "data.shapes=false", "--output", str(run), "--overwrite"]
    for words, path in ((["train", str(config)], config), (["train", "--data", str(run / "data")], annotations)):
        assert main([*words, *others]) == 2
        assert f"error: --overwrite would delete the input {path}" in capsys.readouterr().err
    assert config.is_file() and annotations.is_file()


def test_a_run_is_not_deleted_for_one_that_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "log.jsonl").write_text("mine")
    assert main(["train", "no_such_model", "--tensorboard", "--output", str(tmp_path), "--overwrite"]) == 2
    assert "solov2[tensorboard]" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_text() == "mine"


def test_lines_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a command around it, in Python: a console that lacks characters, a closed one, and none at all."""
    logger = RunLogger(tmp_path, main=True)
    with open(tmp_path / "console", "w", encoding="cp1252") as console:
        monkeypatch.setattr("sys.stdout", console)
        logger.print(f"{NAME} \u00c4\nsecond line")
    logger.print("to a closed file")
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    logger.print("to nobody")
    logger.start_epoch(1, 2)
    logger.close()
    lines = (tmp_path / "console").read_text(encoding="cp1252").splitlines()
    assert lines == [r"car\x1b[2J", r"error: \u202e\u732b " + "\u00c4", "second line"]
