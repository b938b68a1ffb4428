"""Panoptic models through the commands: training, resuming, evaluation, the oracle, and results in COCO's format."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_panoptic import panoptic_arguments, panoptic_config
from helpers.tiny_runs import arguments
from PIL import Image

import solov2
from solov2.build import build_assigner
from solov2.checkpoint import load_file
from solov2.commands.evaluate import main as evaluate_main
from solov2.commands.panoptic_quality import main as panoptic_quality_main
from solov2.commands.train import main as train_main
from solov2.data.build import locate_data, oracle_dataset, validation_dataset, validation_loader
from solov2.data.panoptic_file import open_annotations
from solov2.evaluation.oracle import Oracle, oracle_semantic_logits
from solov2.evaluation.panoptic import PanopticEvaluator
from solov2.evaluation.summary import flatten, main_figure

GROUPS = ("all", "things", "stuff")
WORDS = ("--epochs", "3", "--evaluate-every", "1", "--set", "data.workers=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dataset, finished run of three epochs)."""
    folder = tmp_path_factory.mktemp("panoptic")
    data, output = folder / "data", folder / "run"
    settings = ("picture_images=2", "checkpoint_steps=2", "keep_checkpoints=9")
    words = [word for setting in settings for word in ("--set", f"train.{setting}")]
    assert train_main(panoptic_arguments(data, output, *WORDS, *words)) == 0
    return data, output


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def evaluated(data: Path, *words: str) -> int:
    return evaluate_main(["--data-root", str(data), "--device", "cpu", "--set", "data.workers=0", *words])


def user_error(capsys: pytest.CaptureFixture[str], code: int) -> str:
    errors = capsys.readouterr().err.splitlines()
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def test_a_run_trains_and_validates_by_panoptic_quality(run: tuple[Path, Path]) -> None:
    data, folder = run
    losses, evaluations = rows(folder, "epoch"), rows(folder, "evaluation")
    assert [row["loss_semantic"] > 0 for row in losses] == [True] * 3
    assert losses[-1]["loss_semantic"] < losses[0]["loss_semantic"] < 1.1 * 0.5 * torch.tensor(6.0).log()
    assert all(
        row["loss"] == pytest.approx(row["loss_category"] + row["loss_mask"] + row["loss_semantic"]) for row in losses
    )
    assert [row["epoch"] for row in evaluations] == [1, 2, 3] and evaluations[0]["all_n"] == 9
    best, last = (load_file(folder / f"{name}.pth") for name in ("best", "last"))
    assert best["best"] == last["best"] == max(row["all_pq"] for row in evaluations)
    file = open_annotations(data / "annotations" / "panoptic_val2017.json")
    things, stuff = (sorted(c for c in file.categories if c.is_thing == kind) for kind in (True, False))
    model = solov2.build_model(weights=folder / "best.pth")
    assert (model.class_names, model.category_ids) == ([c.name for c in things], [c.id for c in things])
    assert (model.stuff_names, model.stuff_category_ids) == ([c.name for c in stuff], [c.id for c in stuff])
    with Image.open(folder / "predictions.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1000  # two rows


def test_a_killed_run_ends_as_a_whole_one(run: tuple[Path, Path], tmp_path: Path) -> None:
    """From a checkpoint inside an epoch, with its evaluations: to the bit."""
    data, folder = run
    shutil.copy(folder / "step_00000006.pth", tmp_path / "cut.pth")
    words = (*WORDS, "--set", "train.picture_images=0", "--resume", str(tmp_path / "cut.pth"))
    assert train_main(panoptic_arguments(data, tmp_path / "run", *words)) == 0
    whole, cut = (load_file(path / "last.pth") for path in (folder, tmp_path / "run"))
    assert whole["epoch"] == cut["epoch"] == 3 and any(name.startswith("semantic_head.") for name in whole["model"])
    for name, value in whole["model"].items():
        assert torch.equal(value, cut["model"][name]), name
    evaluations = [rows(path, "evaluation")[-1] for path in (folder, tmp_path / "run")]
    assert [{**row, "time": 0} for row in evaluations][0] == {**evaluations[1], "time": 0}


def test_other_stuff_is_not_resumed(run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = run
    source = data / "annotations" / "panoptic_train2017.json"
    renamed = source.read_text().replace('"waves"', '"sea"')
    (tmp_path / "train.json").write_text(renamed)
    words = ("--resume", str(folder / "last.pth"), "--epochs", "4", "--train-annotations", str(tmp_path / "train.json"))
    segments = ("--train-segments", str(source.with_suffix("")), "--evaluate-every", "0")
    code = train_main(panoptic_arguments(data, tmp_path / "run", *words, *segments))
    error = user_error(capsys, code)
    assert "without waves" in error and "with sea" in error


def test_results_of_eval_are_those_of_two_files(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = run
    weights, results, figures = folder / "best.pth", tmp_path / "results", tmp_path / "eval.json"
    words = ("--weights", str(weights), "--results", str(results))
    assert evaluated(data, *words, "--json", str(figures), "--per-class") == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["PQ", "SQ", "RQ", "N"] and [row.split()[0] for row in table[1:4]] == [
        "All", "Things", "Stuff",
    ]  # fmt: skip
    summary = json.loads(figures.read_text())
    assert summary["images"] == 6 and summary["config"] == "quickstart_panoptic" and len(summary["per_class"]) == 9
    truth = data / "annotations" / "panoptic_val2017.json"
    assert panoptic_quality_main([str(truth), str(results / "panoptic.json"), "--json", str(tmp_path / "pq.json")]) == 0
    again = json.loads((tmp_path / "pq.json").read_text())
    assert {group: again[group] for group in GROUPS} == {group: summary[group] for group in GROUPS}
    written = open_annotations(results / "panoptic.json")
    assert written.image_ids == open_annotations(truth).image_ids
    capsys.readouterr()
    assert "panoptic.json already exists" in user_error(capsys, evaluated(data, *words))


def test_what_panoptic_models_do_not_take(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = run
    weights = ("--weights", str(folder / "best.pth"))
    assert "leave it out" in user_error(capsys, evaluated(data, *weights, "--fast"))
    assert "name a folder" in user_error(capsys, evaluated(data, *weights, "--results", "-"))
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "annotations" / "panoptic_val2017")
    assert "panoptic_val2017" in user_error(capsys, evaluated(tmp_path / "data", *weights))
    (tmp_path / "data" / "annotations" / "panoptic_val2017").mkdir()
    words = panoptic_arguments(tmp_path / "data", tmp_path / "run", *WORDS, "--set", "data.shapes=false")
    assert "6 of 6 PNGs" in user_error(capsys, train_main(words)) and not (tmp_path / "run").exists()
    instances = arguments(data, tmp_path / "run", "--set", "data.shapes=false")
    named = ("--train-annotations", str(data / "annotations" / "panoptic_train2017.json"))
    error = user_error(capsys, train_main([*instances, *named, "--evaluate-every", "0"]))
    assert "panoptic annotation file" in error and "model.num_stuff" in error


def test_default_files_follow_the_kind_of_model(tmp_path: Path) -> None:
    config = panoptic_config()
    stored = locate_data(config, {"train_annotations": tmp_path / "a.json", "val_segments": tmp_path / "png"})
    assert stored.data.train_annotations == str(tmp_path / "a.json")
    assert stored.data.val_segments == str(tmp_path / "png")
    moved = locate_data(stored, tmp_path / "coco").data
    assert (moved.train_annotations, moved.val_segments) == ("annotations/panoptic_train2017.json", "auto")


def test_a_sweep_of_thresholds(run: tuple[Path, Path], repo_root: Path) -> None:
    """Each pair has the figures of an evaluation with these settings."""
    spec = importlib.util.spec_from_file_location("panoptic_sweep", repo_root / "examples" / "panoptic_sweep.py")
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    data, folder = run
    model = solov2.build_model(weights=folder / "best.pth")
    dataset = validation_dataset(locate_data(panoptic_config(), data))
    evaluators, share = example.sweep(model, dataset, [0.01, 1.0], [32, 10**6])
    assert list(evaluators) == [(0.01, 32), (0.01, 10**6), (1.0, 32), (1.0, 10**6)] and 0 < share < 1
    assert evaluators[0.01, 32].summarize()["all"]["pq"] == pytest.approx(rows(folder, "evaluation")[-1]["all_pq"])
    assert evaluators[1.0, 10**6].summarize()["all"]["rq"] == 0


# ---- the oracle


def oracle_shares(data: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[Any, Any]]:
    """What each of several processes finds with the oracle."""
    config = locate_data(panoptic_config("data.workers=0"), data)
    dataset = oracle_dataset(config, "val")
    shares = []
    for rank in range(processes):
        monkeypatch.setattr("solov2.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("solov2.distributed.world_size", lambda: processes)
        model = config.model
        settings = model.postprocess_settings, model.panoptic_settings
        oracle = Oracle(model.grid_sizes, 4, settings[0], num_stuff=5, panoptic=settings[1])
        evaluator = PanopticEvaluator(dataset.panoptic, dataset.category_ids, dataset.stuff_category_ids)
        for batch in validation_loader(config, dataset, assigner=build_assigner(model)):
            oracle.launch(batch)
            evaluator.update(batch["image_ids"], oracle.collect())
        shares.append(evaluator.predictions)
    return shares


def summary_of(data: Path, shares: Sequence[dict[Any, Any]]) -> dict[str, Any]:
    dataset = oracle_dataset(locate_data(panoptic_config(), data), "val")
    evaluator = PanopticEvaluator(dataset.panoptic, dataset.category_ids, dataset.stuff_category_ids)
    evaluator.merge(shares)
    return evaluator.summarize(per_class=True)


def test_the_oracle_for_any_number_of_processes(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 64 pixels, whose masks are coarse; all stuff is recognized. The figures are equal to the bit."""
    alone, three = (summary_of(run[0], oracle_shares(run[0], count, monkeypatch)) for count in (1, 3))
    assert alone == three
    monkeypatch.undo()
    words = ("--oracle", "--weights", str(run[1] / "best.pth"), "--json", str(tmp_path / "oracle.json"))
    assert evaluated(run[0], *words) == 0
    figures = json.loads((tmp_path / "oracle.json").read_text())
    assert figures["oracle"] and [figures[group] for group in GROUPS] == [alone[group] for group in GROUPS]
    assert main_figure(figures) == figures["all"]["pq"] > 0.7 and figures["stuff"]["rq"] > 0.95
    assert set(flatten(figures)) == {f"{group}_{name}" for group in GROUPS for name in ("pq", "sq", "rq", "n")}


def test_semantic_logits_of_the_oracle() -> None:
    """Void is a thing; the padding repeats the last row and column whose pixels 4 i + 2 are inside the image."""
    semantic = torch.full((1, 3, 4), 255, dtype=torch.uint8)
    semantic[0, :2, :3] = torch.tensor([[0, 1, 255], [1, 0, 2]])
    labels = oracle_semantic_logits(semantic, [(7, 11)], 2).argmax(1)
    assert labels.tolist() == [[[0, 1, 2, 2], [1, 0, 2, 2], [1, 0, 2, 2]]]
