"""What a report reads of a run: a log that is broken or was written twice, and the counts of the training file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from solov2.config import load_config
from solov2.report.content import _points
from solov2.report.pictures import choose_images
from solov2.report.run_files import count_training, is_number, read_log


def test_rows_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "train"}\n' + "[" * 100_000 + '\n[1]\n\x00\n{"kind": "en')
    assert read_log(tmp_path) == [{"kind": "train"}]
    assert read_log(tmp_path / "nothing") == []


def test_points_of_a_run_that_was_resumed() -> None:
    """Steps 2 and 3 are repeated: the later values count, and the line never turns back."""
    steps, values = [1, 2, 3, 2, 3, 4], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0]
    rows = [{"step": step, "loss": value} for step, value in zip(steps, values)]
    assert _points(rows, "loss") == ([1, 2, 3, 4], [9.0, 6.0, 5.0, 4.0])


@pytest.mark.parametrize("value", [None, "fast", [1], float("nan"), float("inf"), 10**400, -1e300])
def test_values_that_cannot_be_drawn(value: object) -> None:
    assert not is_number(value)
    assert _points([{"step": 1, "loss": value}, {"step": 2, "loss": 3}], "loss") == ([2], [3])


def test_instances_in_training_are_counted_by_the_name_of_their_class(tmp_path: Path) -> None:
    """The two files number their classes differently, and each has one of its own."""
    categories = [{"id": 5, "name": "dog"}, {"id": 9, "name": "cat"}, {"id": 1, "name": "emu"}]
    annotations = [{"category_id": number, "iscrowd": crowd} for number, crowd in ((5, 0), (5, 0), (9, 0), (9, 1))]
    file = tmp_path / "train.json"
    file.write_text(json.dumps({"categories": categories, "annotations": annotations}))
    config = load_config("quickstart", [f"data.train_annotations={file}", f"data.train_images={tmp_path}"])
    assert count_training(config, {1: "cat", 5: "owl", 7: "dog"}) == {1: 1, 7: 2}
    segments = [{"segments_info": annotations}]
    file.write_text(json.dumps({"categories": categories, "annotations": segments}))
    assert count_training(config, {1: "cat", 5: "owl", 7: "dog"}) == {1: 1, 7: 2}
    file.write_text("{}")
    assert not count_training(config, {1: "cat"})


def test_images_on_which_two_runs_differ() -> None:
    """The worst changes first, then the best; images without a change are not shown."""
    facts = [SimpleNamespace(quality=quality) for quality in ({1: 0.5, 2: 0.5, 3: 0.2, 4: 0.9, 5: 0.1},
                                                              {1: 0.5, 2: 0.4, 3: 0.9, 4: 0.1, 6: 1.0})]  # fmt: skip
    assert [image_id for image_id, _ in choose_images(facts)] == [4, 2, 3]
    assert choose_images(facts)[0][1] == "quality 90 %, then 10 %"
    assert [image_id for image_id, _ in choose_images(facts[:1])] == [5, 3, 1, 2, 4]
