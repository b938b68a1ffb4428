"""The plan of a run: warnings about settings with which it hardly learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny_runs import arguments, tiny_config

from solov2.commands.train import main
from solov2.config import list_models, load_config
from solov2.training.plan import Plan, hopeless_settings

COCO_IMAGES = 117_266


def warnings_of(*settings: str, weights: bool = False, batches: int | None = 100) -> list[str]:
    config = load_config("solov2_r50_fpn_1x", list(settings))
    plan = Plan.of(config.train, images=batches, batches=batches, processes=1)
    return hopeless_settings(config, plan, weights=weights)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("processes", [1, 8])
def test_no_published_recipe_is_hopeless(name: str, processes: int) -> None:
    config = load_config(name)
    images = COCO_IMAGES if not config.data.shapes else config.data.shapes_train
    batches = images // config.train.batch_size // processes
    assert hopeless_settings(config, Plan.of(config.train, images=images, batches=batches, processes=processes),
                             weights=False) == []  # fmt: skip


def test_a_random_backbone_must_not_be_frozen() -> None:
    stages, norms = warnings_of("train.pretrained_backbone=none")
    assert "model.frozen_stages is 1" in stages and "model.frozen_batch_norm is true" in norms
    assert all("--weights" in text and "train.pretrained_backbone" in text for text in (stages, norms))
    assert warnings_of("train.pretrained_backbone=none", weights=True) == []
    assert warnings_of("train.pretrained_backbone=file.pth") == []
    trained = ("model.frozen_stages=0", "model.frozen_batch_norm=false")
    assert warnings_of("train.pretrained_backbone=none", *trained) == []
    assert warnings_of("train.pretrained_backbone=none", trained[0]) == [norms]


def test_a_warm_up_longer_than_half_of_the_run() -> None:
    """Of 1,200 steps."""
    assert warnings_of("train.warmup_steps=600") == []
    [text] = warnings_of("train.warmup_steps=601")
    assert "601 steps" in text and "1,200 optimizer steps" in text and "train.warmup_steps" in text and "120" in text
    assert warnings_of("train.warmup_steps=601", batches=None) == []


def test_a_run_and_its_dry_run_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 4 steps, 3 in the warm-up; the generated shapes have no fifth class."""
    settings = ("train.warmup_steps=3", "train.epochs=1", "model.frozen_stages=2", "data.workers=0",
                "train.evaluate_every=0")  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(arguments(tmp_path / "data", tmp_path / "run", *words)) == 0
    file = tmp_path / "data" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["categories"].append({"id": 99, "name": "dodecahedron"})
    file.write_text(json.dumps(content))
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in logged if row["kind"] == "warning"]
    assert len(texts) == 2 and "model.frozen_stages is 2" in texts[0] and "3 steps" in texts[1]
    capsys.readouterr()
    assert main(arguments(tmp_path / "data", tmp_path / "run", *words, "--dry-run")) == 0
    report = capsys.readouterr().out.splitlines()
    shown = [line for line in report if line.startswith("warning: ")]
    assert shown[:2] == [f"warning: {text}" for text in texts] and "dodecahedron" in shown[2] and len(shown) == 3
    checkpoint = ("--weights", str(tmp_path / "run" / "last.pth"))
    assert main(arguments(tmp_path / "data", tmp_path / "other", *words, *checkpoint, "--dry-run")) == 0
    assert "model.frozen_stages is" not in capsys.readouterr().out


def test_the_tiny_runs_of_these_tests_are_not_hopeless() -> None:
    config = tiny_config()
    config = replace(config, train=replace(config.train, epochs=1))
    assert hopeless_settings(config, Plan.of(config.train, images=16, batches=4, processes=1), weights=False) == []
