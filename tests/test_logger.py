"""Run log: lines for machines and for people."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

from solov2.training.logger import RunLogger, format_seconds


def test_lines_for_machines_and_people(tmp_path, capsys):
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


def test_a_run_outlives_its_terminal(tmp_path, monkeypatch):
    def broken(*_words):
        raise BrokenPipeError

    logger = RunLogger(tmp_path, main=True)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=broken, flush=broken))
    logger.say("nobody reads this")
    logger.write("start")
    logger.close()
    assert json.loads((tmp_path / "log.jsonl").read_text())["kind"] == "start"


def test_other_processes_are_silent(tmp_path, capsys):
    logger = RunLogger(tmp_path, main=False)
    logger.say("hello")
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
