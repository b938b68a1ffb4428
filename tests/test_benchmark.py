"""The benchmark command: complete and finite reports, stages that add up, mistakes told in one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import solov2
from solov2.commands.benchmark import git_commit, main
from solov2.commands.measure import Stopwatch, count_candidates, milliseconds, staged_postprocess
from solov2.commands.synthetic import ellipses, synthetic_instances, synthetic_raw

TINY = (
    "--config",
    "quickstart",
    "--size",
    "64",
    "64",
    "--iterations",
    "1",
    "--warmup",
    "0",
    "--candidates",
    "100",
    "--device",
    "cpu",
)


def numbers(value: Any) -> list[float]:
    """All numbers of a nested report."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a tiny run of everything that needs no data, with two images per batch."""
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    assert (
        main([*TINY, "--mode", "all", "--batch-size", "2", "--warmup", "1", "--iterations", "3", "--json", str(path)])
        == 0
    )
    return json.loads(path.read_text())


def test_report_is_complete_and_finite(report: dict[str, Any]) -> None:
    assert set(report) == {"environment", "settings", "reports"}
    assert {"device", "device_name", "cpu", "threads", "torch", "torchvision", "solov2", "commit"} <= set(
        report["environment"]
    )
    [model] = report["reports"]
    assert model["config"] == "quickstart" and model["size"] == [64, 64] and model["batch_size"] == 2
    assert model["precision"] == "float32" and "synthetic" in model
    figures = numbers(report)
    assert len(figures) > 40 and all(math.isfinite(figure) for figure in figures)


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        (
            "inference",
            [
                "preprocess",
                "backbone",
                "FPN",
                "heads",
                "mask features",
                "dynamic masks",
                "matrix NMS",
                "mask resize",
                "total",
            ],
        ),
        ("training", ["targets", "forward", "loss", "backward", "optimiser step", "total"]),
    ],
)
def test_stages(report: dict[str, Any], mode: str, names: list[str]) -> None:
    part = report["reports"][0][mode]
    assert list(part["stages"]) == names
    medians = {name: stage["median_ms"] for name, stage in part["stages"].items()}
    assert all(median > 0 for median in medians.values())
    total = medians.pop("total")
    assert part["sum_of_stages_ms"] == pytest.approx(sum(medians.values()))
    assert total / 2 < part["sum_of_stages_ms"] < 2 * total  # medians, so not exactly
    assert part["images_per_second"] == pytest.approx(2000 / total)
    assert part["peak_memory_mib"] > 50


def test_something_flows_through_every_stage(report: dict[str, Any]) -> None:
    inference, training = report["reports"][0]["inference"], report["reports"][0]["training"]
    assert inference["input_size"] == [64, 64]
    assert 70 <= inference["candidates_per_image"] <= 100  # direct neighbours of one class suppress each other
    assert inference["instances_per_image"] > 5
    assert training["loss_mask"] > 0.1 and training["loss_category"] > 0


def test_table_says_what_is_synthetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--mode", "infer"]) == 0
    output = capsys.readouterr().out
    for text in ("synthetic", "quickstart: 64 x 64", "matrix NMS", "images/s", "candidates"):
        assert text in output
    assert "training" not in output


def test_training_in_bf16_and_loading_of_files(coco_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--mode", "train", "--precision", "bf16", "--data-root", str(coco_tree)]) == 0
    output = capsys.readouterr().out
    assert "bf16" in output and "images/s per worker" in output and "inference" not in output


@pytest.fixture
def coco_tree(tmp_path: Path) -> Path:
    """A generated data set in COCO's layout."""
    from solov2.config import load_config
    from solov2.data.shapes import generate_shapes

    generate_shapes(tmp_path, train_images=6, val_images=1, size=64, seed=0)
    assert (tmp_path / load_config("quickstart").data.train_annotations).is_file()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100", "64"], "--size must be two multiples of 32, at least 64, got 100 64"),
        (["--size", "32", "32"], "--size must be two multiples of 32, at least 64, got 32 32"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--iterations", "0"], "--iterations must be at least 1, got 0"),
        (["--mode", "infer", "--data-root", "."], "--data-root measures the loading of training data"),
        (["--config", "solov2_r50_1x"], "did you mean"),
        (["--config", "quickstart", "--candidates", "5000"], "--candidates 5000 is more than the"),
        (["--device", "nonsense"], "device 'nonsense' is not usable here"),
        (["--json", "no/such/folder/x.json"], "the folder does not exist"),
        (["--data-root", "/nonexistent"], "/nonexistent"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_staged_postprocess_is_postprocess() -> None:
    """The steps that are timed one by one give what the model gives."""
    model = solov2.build_model("quickstart")
    shapes = {"category_logits": 4, "kernels": 64}
    raw = {
        name: [torch.zeros(2, channels, size, size) for size in model.grid_sizes] for name, channels in shapes.items()
    }
    raw["mask_features"] = torch.zeros(2, 64, 24, 32)
    raw = synthetic_raw(raw, 80, torch.Generator().manual_seed(0))
    sizes, original_sizes = torch.tensor([[96, 128], [90, 100]]), torch.tensor([[60, 80], [45, 50]])
    laps: list[str] = []
    staged = staged_postprocess(raw, sizes, original_sizes, model.settings, laps.append)
    assert laps == ["dynamic masks", "matrix NMS", "mask resize"] * 2
    for one, other in zip(staged, model.postprocess(raw, sizes, original_sizes), strict=True):
        assert len(one["scores"]) > 5 and one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synthetic_raw_keeps_shapes_types_and_layout(dtype: torch.dtype) -> None:
    like = {
        "category_logits": [torch.zeros(2, 5, size, size, dtype=dtype) for size in (12, 6)],
        "kernels": [torch.zeros(2, 8, size, size, dtype=dtype) for size in (12, 6)],
        "mask_features": torch.zeros(2, 8, 16, 16, dtype=dtype).to(memory_format=torch.channels_last),
    }
    raw = synthetic_raw(like, 40, torch.Generator().manual_seed(0))
    for key in ("category_logits", "kernels"):
        assert [(x.shape, x.dtype) for x in raw[key]] == [(x.shape, x.dtype) for x in like[key]]
    assert raw["mask_features"].stride() == like["mask_features"].stride()
    assert raw["mask_features"].abs().max() == 8
    assert 2 * 25 <= count_candidates(raw, 0.1) <= 2 * 40
    again = synthetic_raw(like, 40, torch.Generator().manual_seed(0))
    assert torch.equal(raw["mask_features"], again["mask_features"])


def test_synthetic_ground_truth() -> None:
    truth = synthetic_instances(6, (64, 96), 3, torch.Generator().manual_seed(0))
    assert truth["masks"].shape == (6, 64, 96) and truth["masks"].dtype == torch.uint8
    area = truth["masks"].flatten(1).sum(1)
    sides = truth["boxes"][:, 2:] - truth["boxes"][:, :2]
    assert (area > 0).all() and (sides > 0).all() and (area < 64 * 96 / 3).all()
    whole = ellipses(200, 64, 96, torch.Generator().manual_seed(0))
    assert (whole.amax((1, 2)) > 0.9).all() and (whole.amin((1, 2)) < 0).all()


def test_stopwatch_splits_or_takes_the_whole() -> None:
    for split, names in ((True, ["a", "b", "total"]), (False, ["total"])):
        watch = Stopwatch(torch.device("cpu"), split=split)
        for _ in range(3):
            watch.start()
            for stage in ("a", "b", "a"):
                watch.lap(stage)
            watch.finish()
        assert list(watch.samples) == names and all(len(samples) == 3 for samples in watch.samples.values())
        if split:
            sums = [a + b for a, b in zip(watch.samples["a"], watch.samples["b"], strict=True)]
            assert all(part <= whole for part, whole in zip(sums, watch.samples["total"], strict=True))


def test_percentiles() -> None:
    assert milliseconds([0.003, 0.001, 0.002]) == pytest.approx({"median_ms": 2.0, "p90_ms": 3.0})
    assert milliseconds([value / 1000 for value in range(1, 101)])["p90_ms"] == pytest.approx(90, abs=1)


def test_commit_is_that_of_the_checkout(repo_root: Path) -> None:
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) >= 12
    if not (repo_root / ".git").exists():
        assert commit is None
