"""train.py end to end on a few synthetic images, and how it reports user errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.tiny_runs import arguments
from PIL import Image

from solov2.build import build_model
from solov2.checkpoint import load_file
from solov2.commands.evaluate import main as evaluate_main
from solov2.commands.train import main
from solov2.config import load_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two epochs: (data root, run folder)."""
    root = tmp_path_factory.mktemp("run")
    assert main(arguments(root / "shapes", root / "first", "--epochs", "2")) == 0
    return root / "shapes", root / "first"


def test_files_of_a_finished_run(run):
    data, folder = run
    assert {"config.yaml", "log.jsonl", "last.pth", "predictions.png"} <= set(os.listdir(folder))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    epoch = [*["train"] * 4, "epoch"]
    assert [row["kind"] for row in rows] == ["start", *epoch, *epoch, "evaluation", "end"]
    assert [(row["epoch"], row["step"]) for row in rows[-3:-1]] == [(2, 8), (2, 8)]
    config = load_config(folder / "config.yaml")
    assert config.train.epochs == 2 and config.model.num_classes == 4
    content = load_file(folder / "last.pth")
    assert content["epoch"] == 2 and content["class_names"] == ["disc", "square", "triangle", "star"]
    assert content["category_ids"] == [1, 3, 4, 7]
    with Image.open(folder / "predictions.png") as picture:
        assert min(picture.size) > 200


def test_build_model_loads_the_checkpoint(run):
    data, folder = run
    model = build_model(weights=folder / "last.pth")
    assert model.class_names == ["disc", "square", "triangle", "star"] and not model.training
    image = next((data / "val2017").iterdir())
    result = model.predict(image, score_threshold=0.0)[0]
    assert result["masks"].shape[1:] == (64, 64)


def test_evaluation_of_the_checkpoint(run, tmp_path, capsys):
    data, folder = run
    figures, results = tmp_path / "figures.json", tmp_path / "results.json"
    assert (
        evaluate_main(
            [
                "--weights",
                str(folder / "last.pth"),
                "--data-root",
                str(data),
                "--workers",
                "0",
                "--per-class",
                "--json",
                str(figures),
                "--results",
                str(results),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    content = json.loads(figures.read_text())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    [logged] = [row for row in rows if row["kind"] == "evaluation"]
    assert content["segm"]["AP"] == logged["segm_AP"] and content["bbox"]["AR100"] == logged["bbox_AR100"]
    assert set(content["per_class"]) == {"disc", "square", "triangle", "star"}
    assert isinstance(json.loads(results.read_text()), list)
    assert "AP50" in capsys.readouterr().out


def test_oracle_of_the_training_targets(run, tmp_path):
    data, _ = run
    figures = tmp_path / "oracle.json"
    settings = arguments(data, tmp_path)[1:-6]  # without --data-root, --output and --device
    assert (
        evaluate_main(
            [
                "quickstart",
                *settings,
                "--oracle",
                "--split",
                "train",
                "--data-root",
                str(data),
                "--json",
                str(figures),
                "--workers",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert 0.2 < json.loads(figures.read_text())["segm"]["AP"] < 1


def test_renamed_classes_are_a_warning(run, tmp_path, capsys):
    """A class is known by its name, even if the number of classes is the same."""
    data, folder = run
    root = tmp_path / "renamed"
    shutil.copytree(data, root)
    for file in (root / "annotations").glob("*.json"):
        file.write_text(file.read_text().replace('"disc"', '"plate"'))
    weights = str(folder / "last.pth")
    words = ["--epochs", "1", "--weights", weights, "--data-root", str(root), "--set", "data.shapes=false"]
    assert main([*arguments(root, tmp_path / "tuned"), *words]) == 0
    errors = capsys.readouterr().err
    assert weights in errors and "re-initialized for plate and kept for square, triangle, star" in errors
    assert evaluate_main([*words[2:6], "--device", "cpu", "--set", "data.shapes=false"]) == 0
    errors = capsys.readouterr().err
    assert "does not know plate" in errors and "lacks disc" in errors


def test_fine_tuning_on_some_of_the_classes_keeps_their_rows(run, tmp_path, capsys):
    data, folder = run
    annotations = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    annotations["categories"] = annotations["categories"][:2]
    annotations["annotations"] = [a for a in annotations["annotations"] if a["category_id"] in (1, 3)]
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(annotations))
    paths = ["--train-annotations", str(mine), "--val-annotations", str(mine), "--val-images", str(data / "train2017")]
    assert (
        main(arguments(data, tmp_path / "tuned", "--epochs", "1", "--weights", str(folder / "last.pth"), *paths)) == 0
    )
    captured = capsys.readouterr()
    assert "re-initialized" not in captured.err and "2 classes" in captured.err
    tuned = load_file(tmp_path / "tuned" / "last.pth")
    assert tuned["class_names"] == ["disc", "square"]
    assert tuned["model"]["head.category_predictor.bias"].shape == (2,)
    # The checkpoint stores the paths of its annotation files, but --data-root selects others, which have 4 classes.
    weights = str(tmp_path / "tuned" / "last.pth")
    assert evaluate_main(["--weights", weights, "--data-root", str(data), "--device", "cpu"]) == 0
    assert "does not know triangle, star" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_metadata_of_its_initial_weights(run, tmp_path):
    """BGR input, for example, is set by the weights and not on the command line."""
    data, folder = run
    weights = load_file(folder / "last.pth")
    weights["traits"] |= {"channel_order": "bgr", "pixel_std": [1.0, 1.0, 1.0]}
    torch.save(weights, tmp_path / "bgr.pth")
    words = arguments(data, tmp_path / "run", "--evaluate-every", "0")
    assert main([*words, "--epochs", "1", "--weights", str(tmp_path / "bgr.pth")]) == 0
    assert main([*words, "--epochs", "2", "--resume"]) == 0
    model = build_model(weights=tmp_path / "run" / "last.pth")
    assert load_file(tmp_path / "run" / "last.pth")["epoch"] == 2
    assert model.channel_order == "bgr" and model.pixel_std.flatten().tolist() == [1, 1, 1]


def test_interrupted_and_resumed_equals_uninterrupted(run, tmp_path, repo_root):
    """Ctrl-C stops the run in the middle and prints how to resume; the resumed run ends bit-identically."""
    data, _ = run
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in background
    words = ["--epochs", "4", "--evaluate-every", "0", "--set", "train.warmup_steps=3"]
    assert main(arguments(data, tmp_path / "whole", *words)) == 0
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments(data, tmp_path / "cut", *words)],
        cwd=repo_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 2"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors and "Traceback" not in errors
    assert load_file(tmp_path / "cut" / "last.pth")["epoch"] < 4
    assert main(arguments(data, tmp_path / "cut", *words, "--resume")) == 0
    whole, cut = (load_file(tmp_path / name / "last.pth") for name in ("whole", "cut"))
    assert cut["epoch"] == 4
    for name, value in whole["model"].items():
        assert torch.equal(value, cut["model"][name]), name


def user_error(capsys, words):
    """The one error on stderr of a command that ends with a user error, after what was logged."""
    code = main(words)
    errors = [line for line in capsys.readouterr().err.splitlines() if "iscrowd 1" not in line]
    assert code == 2 and errors[0].startswith("error: ") and len(errors) == 1, errors
    return errors[0]


def test_user_errors_are_one_line_and_change_nothing(run, tmp_path, capsys, monkeypatch):
    data, folder = run
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    error = user_error(capsys, arguments(data, folder))
    assert str(folder) in error and "--overwrite" in error
    assert "quickstart" in user_error(capsys, ["solov2_r50_fpn_1x"])  # needs no data
    assert "did you mean quickstart" in user_error(capsys, ["quickstrat"])
    assert "epoch" in user_error(capsys, arguments(data, tmp_path / "x", "--set", "train.epoch=3"))
    assert "at least 1" in user_error(capsys, arguments(data, tmp_path / "x", "--nproc", "0"))
    assert "does not exist" in user_error(capsys, arguments(data, tmp_path / "x", "--weights", "none.pth"))
    assert str(tmp_path / "x") in user_error(capsys, arguments(data, tmp_path / "x", "--resume"))
    assert "last.pth is a file" in user_error(capsys, arguments(data, folder / "last.pth"))
    assert "device 'warp9'" in user_error(capsys, [*arguments(data, tmp_path / "x"), "--device", "warp9"])
    other = ["--weights", str(folder / "last.pth"), "--set", "model.fpn_channels=64"]
    assert "does not fit" in user_error(capsys, arguments(data, tmp_path / "x", *other))
    assert not (tmp_path / "x").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_overwrite_replaces_only_run_folders(run, tmp_path, capsys):
    data, _ = run
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("keep")
    assert "log.jsonl" in user_error(capsys, arguments(data, precious, "--overwrite"))
    assert (precious / "thesis.tex").read_text() == "keep"


def test_a_damaged_image_is_named_or_skipped(run, tmp_path, capsys):
    data, _ = run
    folder = tmp_path / "train2017"
    folder.mkdir()
    for path in (data / "train2017").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    broken = sorted(folder.iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:300])
    words = ["--train-images", str(folder), "--evaluate-every", "0", "--epochs", "1"]
    assert broken.name in user_error_after_log(capsys, arguments(data, tmp_path / "stops", *words))
    assert main(arguments(data, tmp_path / "goes", *words, "--set", "data.skip_broken_images=true")) == 0


def user_error_after_log(capsys, words):
    code = main(words)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: "), last
    return last


def test_eval_without_weights_names_the_flag(capsys, tmp_path, run):
    assert evaluate_main([]) == 2
    assert "--weights" in capsys.readouterr().err
    assert evaluate_main(["--weights", str(tmp_path / "none.pth")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_saved_configuration_is_plain_yaml(run):
    _, folder = run
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["backbone"] == "resnet10"
