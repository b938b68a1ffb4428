"""`--classes`: training, evaluation and prediction with some of the classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import lively
from helpers.tiny_panoptic import panoptic_arguments
from helpers.tiny_runs import arguments, tiny_config

import solov2
from solov2.build import build_model
from solov2.checkpoint import Checkpoint
from solov2.class_rows import restrict_classes
from solov2.commands.evaluate import main as evaluate_main
from solov2.commands.predict import main as predict_main
from solov2.commands.train import main as train_main
from solov2.data.build import locate_data, oracle_dataset, training_dataset, validation_dataset
from solov2.data.shapes import generate_shapes
from solov2.errors import InputError
from solov2.weights import weight_metadata

NAMES = ["disc", "square", "triangle", "star"]
IDS = [1, 3, 4, 7]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes") / "data"
    generate_shapes(root, train_images=16, val_images=6, size=64, seed=0)
    return root


@pytest.fixture(scope="module")
def weights(data: Path) -> Path:
    """A random model of all four classes that finds something."""
    config = tiny_config("data.shapes=false")
    torch.manual_seed(0)
    model = lively(build_model(config))
    path = data.parent / "model.pth"
    Checkpoint(
        source="a test", weights=model.state_dict(), traits=weight_metadata(config.model), class_names=NAMES,
        category_ids=IDS, config=config.to_dict(),
    ).save(path)  # fmt: skip
    return path


def test_datasets_lack_the_other_classes(data: Path) -> None:
    config = locate_data(tiny_config("data.classes=[star, disc]"), data)
    for dataset in (training_dataset(config), validation_dataset(config), oracle_dataset(config, "val")):
        assert (dataset.class_names, dataset.category_ids) == (["disc", "star"], [1, 7])
        assert {entry["category_id"] for entry in dataset.coco.dataset["annotations"]} == {1, 7}
        assert not dataset.unknown_categories
    everything, some = (
        training_dataset(locate_data(tiny_config(*words), data)) for words in ((), ("data.classes=[star]",))
    )
    stars = everything.instance_table()[1] == NAMES.index("star")
    assert len(some.instance_table()[0]) == stars.sum() > 0 and len(some) < len(everything)
    with pytest.raises(InputError, match="no class 'sqare' .did you mean square"):
        training_dataset(locate_data(tiny_config("data.classes=[sqare]"), data))


def test_a_run_with_two_classes(data: Path, tmp_path: Path) -> None:
    words = (
        "--classes",
        "triangle, disc",
        "--epochs",
        "1",
        "--set",
        "data.workers=0",
        "--set",
        "train.picture_images=0",
    )
    assert train_main(arguments(data, tmp_path / "run", *words)) == 0
    model = solov2.build_model(weights=tmp_path / "run" / "last.pth")
    assert (model.class_names, model.category_ids) == (["disc", "triangle"], [1, 4])
    figures = tmp_path / "figures.json"
    words = ("--data-root", str(data), "--per-class", "--json", str(figures), "--device", "cpu", "--workers", "0")
    assert evaluate_main(["--weights", str(tmp_path / "run" / "last.pth"), *words]) == 0
    assert list(json.loads(figures.read_text())["per_class"]) == ["disc", "triangle"]


def test_a_restricted_model_finds_what_the_whole_one_finds_of_its_classes(data: Path, weights: Path) -> None:
    images = sorted((data / "val2017").iterdir())[:3]
    limits = {"score_threshold": 0.0, "max_instances": 0, "max_candidates": 0}
    whole = build_model(weights=weights, **limits)
    some = build_model(weights=weights, **limits)
    restrict_classes(some, ["star", "square"], "a test")
    assert (some.class_names, some.category_ids) == (["square", "star"], [3, 7])
    for all_found, found in zip(whole.predict(images), some.predict(images), strict=True):
        chosen = (all_found["labels"] == 1) | (all_found["labels"] == 3)
        assert 0 < chosen.sum() < len(chosen)
        torch.testing.assert_close(found["scores"], all_found["scores"][chosen], rtol=1e-5, atol=1e-7)
        assert torch.equal(found["labels"], all_found["labels"][chosen] // 2)
        assert torch.equal(found["masks"], all_found["masks"][chosen])


def test_commands_take_classes(data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, results = tmp_path / "figures.json", tmp_path / "results.json"
    shared = ("--weights", str(weights), "--device", "cpu", "--classes")
    words = ("star", "--data-root", str(data), "--per-class", "--json", str(figures), "--workers", "0")
    assert evaluate_main([*shared, *words]) == 0
    assert list(json.loads(figures.read_text())["per_class"]) == ["star"] and "lacks" not in capsys.readouterr().err
    image = str(sorted((data / "val2017").iterdir())[0])
    words = ("star,disc", image, "--results", str(results), "--output", str(tmp_path / "out"), "--score-threshold", "0")
    assert predict_main([*shared, *words]) == 0
    assert {entry["category_id"] for entry in json.loads(results.read_text())} == {1, 7}
    assert predict_main([*shared, "plate", image, "--output", str(tmp_path / "new")]) == 2
    assert "no class 'plate'" in capsys.readouterr().err


def test_panoptic_models_refuse_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = panoptic_arguments(tmp_path / "data", tmp_path / "run", "--classes", "disc")
    assert train_main(words) == 2 and "panoptic" in capsys.readouterr().err.splitlines()[-1]
