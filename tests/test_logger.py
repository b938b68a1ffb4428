"""The log of a run: log.jsonl, and lines on the terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
from types import SimpleNamespace

import pytest

from solov2.training.logger import RunLogger, format_seconds


def test_log_rows_and_printed_lines(tmp_path, capsys):
    logger = RunLogger(tmp_path, main=True)
    logger.write("start", learning_rate=0.01)
    logger.start_epoch(1, 2)
    logger.advance()
    logger.train(
        1,
        epoch=1,
        total_steps=2,
        seconds_left=61.0,
        loss=3.0,
        loss_category=1.0,
        loss_mask=2.0,
        images_per_second=4.0,
        learning_rate=0.01,
    )
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["start", "train"]
    assert rows[1]["step"] == 1 and rows[1]["loss_mask"] == 2.0
    printed = capsys.readouterr().out
    assert "step 1/2" in printed and "4.0 images/s" in printed and "left 1:01" in printed


def test_a_closed_terminal_does_not_end_the_run(tmp_path, monkeypatch):
    def broken(*_words):
        raise BrokenPipeError

    logger = RunLogger(tmp_path, main=True)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=broken, flush=broken))
    logger.print("nobody reads this")
    logger.write("start")
    logger.close()
    assert json.loads((tmp_path / "log.jsonl").read_text())["kind"] == "start"


def test_other_ranks_write_nothing(tmp_path, capsys):
    logger = RunLogger(tmp_path, main=False)
    logger.print("hello")
    logger.write("start")
    logger.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "log.jsonl").exists()


def test_a_resumed_run_appends(tmp_path):
    for _ in range(2):
        logger = RunLogger(tmp_path, main=True)
        logger.write("start")
        logger.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_format_seconds():
    assert format_seconds(59.6) == "1:00" and format_seconds(3723) == "1:02:03"


FIGURES = {
    "loss": 3.0,
    "loss_category": 1.0,
    "loss_mask": 2.0,
    "images_per_second": 4.0,
    "learning_rate": 0.01,
}


def test_the_end_of_an_epoch_is_one_line_and_one_row(tmp_path, capsys):
    logger = RunLogger(tmp_path, main=True)
    logger.start_epoch(2, 8, done=2)  # resumed after two of its steps
    logger.train(12, epoch=2, total_steps=24, seconds_left=1.0, **FIGURES)
    logger.train(16, epoch=2, total_steps=24, seconds_left=1.0, **FIGURES | {"loss": 6.0, "loss_mask": math.nan})
    means = logger.end_epoch(2, images_per_step=4)
    capsys.readouterr()
    logger.show_epoch(2, 3, means, "mask AP 37.5  box AP -")
    logger.close()
    assert means["loss"] == 5.0 and means["loss_category"] == 1.0 and means["loss_mask"] == 2.0
    assert means["learning_rate"] == 0.01 and means["images_per_second"] * means["seconds"] == pytest.approx(4 * 6)
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert row["kind"] == "epoch" and row["epoch"] == 2 and row["step"] == 16 and row["loss"] == 5.0
    [line] = capsys.readouterr().out.splitlines()
    parts = ("epoch 2/3", "loss 5.000", "category 1.000", "mask 2.000", "images/s", "lr 1.00e-02", "mask AP 37.5")
    assert all(part in line for part in parts)


def test_an_epoch_that_ended_before_a_resume_shows_only_its_evaluation(tmp_path, capsys):
    logger = RunLogger(tmp_path, main=True)
    logger.show_epoch(1, 3, {}, "mask AP 37.5")
    logger.show_epoch(0, 3, {}, "")
    logger.close()
    assert capsys.readouterr().out == "epoch 1/3  mask AP 37.5\n"


def test_warnings_of_the_library_are_logged(tmp_path, caplog):
    logger = RunLogger(tmp_path, main=True)
    logging.getLogger("solov2.data.coco").warning("image 7")
    logging.getLogger("solov2.data.coco").info("not a warning")
    logger.warn("stuck", 3)
    logger.close()
    logging.getLogger("solov2").warning("after the run")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["kind"], row.get("step"), row["text"]) for row in rows] == [
        ("warning", None, "image 7"),
        ("warning", 3, "stuck"),
    ]
    assert [record.levelname for record in caplog.records if record.getMessage() == "stuck"] == ["WARNING"]


def test_durations_of_earlier_starts(tmp_path):
    rows = [
        {"kind": "start", "time": 100.0},
        {"kind": "train", "time": 160.0},
        {"kind": "start", "time": 1000.0},
        {"kind": "train", "time": 1005.5},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + '\n[1]\n{"kind": "train"}\n{"kind": "tra'
    (tmp_path / "log.jsonl").write_text(text)
    logger = RunLogger(tmp_path, main=True)
    logger.write("start")
    logger.close()
    assert logger.earlier_seconds == [60.0, 5.5]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["kind"] == "start"  # on its own line
