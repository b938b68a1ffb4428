"""train.py --dry-run: it prints what a run would do, and does nothing else."""

from __future__ import annotations

import multiprocessing.process
import os
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from helpers.tiny_models import TINY, VARIANTS
from helpers.tiny_runs import arguments, tiny_config

from solov2 import distributed
from solov2.build import build_assigner, build_compute, build_criterion, construct
from solov2.commands.train import main
from solov2.config import list_models, load_config, replace_model
from solov2.data.build import prepare_data, training_dataset, training_loader
from solov2.data.categories import default_class_names
from solov2.training import dry_run
from solov2.training.optim import learning_rate_factor
from solov2.training.plan import Plan
from solov2.training.step import backward

CPU = torch.device("cpu")
STEP = ("train.schedule=step", "train.step_epochs=[2, 3]", "train.epochs=4", "train.learning_rate=0.01",
        "train.optimizer=sgd", "train.warmup_steps=3")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Root of the generated dataset."""
    root = tmp_path_factory.mktemp("dry") / "shapes"
    prepare_data(tiny_config(f"data.root={root}"), splits=("train", "val"))
    return root


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """No test in this file may start a process."""

    def fail(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(os, "execvpe", fail)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fail)


def set_words(*changes):
    return [word for change in changes for word in ("--set", change)]


def sections(capsys, words):
    """The paragraphs of a successful dry run: configuration, summary, rates, sizes, memory."""
    assert main([*words, "--dry-run"]) == 0
    captured = capsys.readouterr()
    parts = captured.out.strip().split("\n\n")
    assert len(parts) == 5, captured.out
    return parts


def cells(text):
    """Rows of a table without its header."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[1:]]


def test_all_sections_match_a_real_run(data, tmp_path, capsys):
    before = listing(data.parent), listing(tmp_path)
    text, summary, rates, sizes, memory = sections(
        capsys, arguments(data, tmp_path / "run", *set_words(*STEP, "model.num_classes=9"))
    )
    assert (listing(data.parent), listing(tmp_path)) == before
    config = tiny_config(f"data.root={data}", *STEP)
    assert yaml.safe_load(text) == config.to_dict()  # 4 classes, from the annotation file
    dataset = training_dataset(config)
    loader, sampler = training_loader(
        replace(config, data=replace(config.data, workers=0)), dataset, build_assigner(config.model)
    )
    steps = len(sampler)
    assert f"{len(dataset)} training images, 1 process on cpu, float32" in summary
    assert f"4 epochs of {steps} steps, 4 images per step" in summary and "scaled to 0.005" in summary
    parameters = list(construct(config.model, default_class_names(4)).parameters())
    total = sum(p.numel() for p in parameters)
    assert f"{total:,} of the {total:,} parameters are trainable" in summary  # the quickstart freezes nothing

    schedule = partial(
        learning_rate_factor,
        kind="step",
        steps_per_epoch=steps,
        epochs=4,
        warmup_steps=3,
        warmup_start=config.train.warmup_start,
        step_epochs=(2, 3),
    )
    wanted = sorted({0, 1, 2, 2 * steps - 1, 2 * steps, 3 * steps - 1, 3 * steps, 4 * steps - 1})
    plan = Plan.of(config.train, images=len(dataset), batches=steps, processes=1)
    assert dry_run.learning_rates(config.train, plan) == [
        (str(step + 1), str(step // steps + 1), 0.01 * 4 / 8 * schedule(step)) for step in wanted
    ]
    assert cells(rates) == [[str(step + 1), str(step // steps + 1), f"{0.005 * schedule(step):g}"] for step in wanted]

    sampler.set_epoch(0)
    expected = []
    for number, batch in zip(range(1, 5), loader):
        height, width = batch["pixels"].shape[2:]
        positive = int((batch["targets"]["category"] < 4).sum())
        expected.append([number, f"{height} x {width}", 4, len(batch["targets"]["masks"]), positive])
    assert cells(sizes) == [list(map(str, row)) for row in expected] and len(expected) == 4
    assert "4 images of 64 x 64, float32" in memory and "not counted" not in memory


def test_learning_rates_equal_those_in_the_log_of_a_run(data, tmp_path, capsys):
    words = arguments(data, tmp_path / "run", *set_words(*STEP, "train.evaluate_every=0"))
    rates = {row[0]: row[2] for row in cells(sections(capsys, words)[2])}
    assert main([*words, "--workers", "0"]) == 0
    logged = dict(re.findall(r"step (\d+)/\d+ .*lr (\S+)", capsys.readouterr().out))
    assert {step: f"{float(rate):.2e}" for step, rate in rates.items()} == {step: logged[step] for step in rates}


def test_a_cosine_lists_the_quarters_of_the_run(capsys):
    config = tiny_config("train.epochs=8")
    rows = dry_run.learning_rates(config.train, Plan.of(config.train, images=40, batches=10, processes=1))
    assert [row[:2] for row in rows] == [("1", "1"), ("2", "1"), ("21", "3"), ("41", "5"), ("61", "7"), ("80", "8")]


def test_processes_change_the_batch_and_are_not_launched(data, tmp_path, capsys):
    words = arguments(data, tmp_path / "run", "--nproc", "4", "--accumulate", "1")
    _, summary, _, sizes, _ = sections(capsys, words)
    assert "4 processes on cpu" in summary and "16 images per step (4 per process x 4 x 1 accumulated)" in summary
    config = tiny_config(f"data.root={data}")
    loader, sampler = training_loader(
        replace(config, data=replace(config.data, workers=0)),
        training_dataset(config),
        build_assigner(config.model),
        processes=4,
    )
    assert "epochs of 1 step," in summary and len(cells(sizes)) == len(sampler) == 1
    assert cells(sizes)[0][3] == str(len(next(iter(loader))["targets"]["masks"]))
    assert main([*words[:-4], "--nproc", "0", "--dry-run"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_only_rank_zero_prints(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    words = arguments(data, tmp_path / "run")
    assert "2 processes on cpu" in sections(capsys, words)[1]
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


def test_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, summary, rates, sizes, memory = sections(capsys, ["solov2_light_r18_fpn_3x", "--device", "cpu"])
    assert yaml.safe_load(text)["model"]["num_classes"] == 80
    assert "data/coco/annotations/instances_train2017.json" in summary
    assert summary.count("unknown number") == 2  # images and steps
    third = 0.01 / 8 / 3
    assert cells(rates)[:-1] == [
        ["1", "1", f"{third:g}"],
        ["250", "?", f"{third + (0.00125 - third) * 249 / 499:g}"],
        ["500", "?", "0.00125"],
        ["last", "27", "0.00125"],
        ["first", "28", "0.000125"],
        ["last", "33", "0.000125"],
        ["first", "34", "1.25e-05"],
        ["last", "36", "1.25e-05"],
    ]
    rows = [row.split("  ") for row in sizes.splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell] for row in rows][:2] == [
        ["512", "512 x 704", "704 x 512"],
        ["480", "480 x 640", "640 x 480"],
    ]
    assert len(rows) == 6 and "2 images of 512 x 768" in memory
    assert listing(tmp_path) == []


def test_shapes_are_not_generated(tmp_path, capsys):
    _, summary, rates, _, _ = sections(capsys, arguments(tmp_path / "shapes", tmp_path / "run"))
    assert "no data: " in summary and "generates the shapes" in summary and "cosine" in rates
    assert listing(tmp_path) == []


def test_a_run_folder_with_files_is_no_error_but_invalid_arguments_are(data, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("keep")
    sections(capsys, arguments(data, tmp_path))
    assert main(arguments(data, tmp_path, "--dry-run", "--resume")) == 2
    assert main(arguments(data, tmp_path, "--dry-run", "--weights", "none.pth")) == 2
    assert main(arguments(data, tmp_path, "--dry-run", "--set", "train.epoch=3")) == 2
    assert listing(tmp_path) == ["thesis.tex"]


def deformable_config():
    config = load_config("solov2_r50_fpn_1x", {"train.batch_size": 2})
    return replace(config, model=replace_model(config.model, TINY | VARIANTS["deformable everywhere"][1]))


@pytest.mark.parametrize("make_config", [lambda: tiny_config("train.batch_size=2"), deformable_config])
def test_estimated_memory_equals_that_of_real_tensors(make_config):
    config, size = make_config(), (64, 96)
    estimated = dry_run.estimate_activation_bytes(config, size, CPU)
    assert estimated == dry_run.saved_activation_bytes(config, size, CPU) == bytes_of_a_step(config, size)
    # The saved statistics of a norm may have another dtype in the estimate: a few numbers per channel.
    half = replace(config, train=replace(config.train, precision="bf16"))
    assert dry_run.estimate_activation_bytes(half, size, CPU) == pytest.approx(
        dry_run.saved_activation_bytes(half, size, CPU), rel=0.01
    )
    assert dry_run.estimate_activation_bytes(half, size, CPU) != estimated


def bytes_of_a_step(config, size):
    """Bytes that a real training step saves for backward, counted by hooks."""
    model = construct(config.model, default_class_names(config.model.num_classes)).train()
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor.detach()

    batch = {
        "pixels": torch.zeros(config.train.batch_size, 3, *size, dtype=torch.uint8),
        "sizes": torch.tensor([size] * config.train.batch_size),
        "targets": dry_run.synthetic_targets(config.model, config.train.batch_size, size),
    }
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        backward(
            model,
            build_criterion(config.model),
            [batch],
            scaler,
            build_compute(config, CPU),
        )
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("name", list_models())
def test_memory_of_every_configuration(name):
    config = load_config(name, {"train.precision": "bf16"})
    lines = dry_run.memory_lines(config, dry_run.empty_model(config.model), CPU)
    amounts = {name.strip(): float(amount.replace(",", "")) for name, amount in
               (re.fullmatch(r"(.+?)  +([\d,.]+) MiB", line).groups() for line in lines[1:-1])}  # fmt: skip
    total = amounts.pop("total")
    assert len(amounts) == 4 and total == pytest.approx(sum(amounts.values()), abs=0.5)


def test_frozen_parameters_have_neither_gradient_nor_state():
    config = load_config("solov2_light_r18_fpn_3x", {"train.optimizer": "adamw"})
    model = dry_run.empty_model(config.model)
    trainable = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad) / 2**20
    lines = dry_run.memory_lines(config, model, CPU)
    assert any(line.startswith("gradients") and line.endswith(f" {trainable:.1f} MiB") for line in lines)
    assert any(line.startswith("state of adamw") and line.endswith(f" {2 * trainable:.1f} MiB") for line in lines)


def test_a_failed_estimate_is_reported(monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(dry_run, "estimate_activation_bytes", fail)
    config = tiny_config()
    lines = dry_run.memory_lines(config, dry_run.empty_model(config.model), CPU)
    assert any("not counted (RuntimeError: no kernel)" in line for line in lines)
    assert any(line.startswith("total without activations") for line in lines)


def test_rotated_images_share_a_batch():
    config = load_config("solov2_r50_fpn_3x")
    assert dry_run.max_padded_size(config) == (800, 1344)
    rotating = replace(config, data=replace(config.data, dihedral=True))
    assert dry_run.max_padded_size(rotating) == (1344, 1344)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
