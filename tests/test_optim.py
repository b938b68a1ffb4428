"""Learning rates equal the reference's to the last digits; parameter groups, optimizers, scaling rule, averages."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import tiny_config
from helpers.training_parity import SCHEDULES, stored_schedule
from torch import nn

import solov2
from solov2.build import build_model
from solov2.checkpoint import load_file
from solov2.config import load_config
from solov2.errors import InputError
from solov2.training.optim import (
    WeightAverage,
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    scaled_learning_rate,
)
from solov2.training.step import update_weights


# The reference computes each rate from the previous one, so its last digit drifts by a few units.
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates(name: str) -> None:
    stored, factor = SCHEDULES[name], stored_schedule(SCHEDULES[name])
    assert stored["gamma"] == 0.1
    for step, rate in stored["lr"]:
        assert stored["base_lr"] * factor(step) == pytest.approx(rate, rel=1e-14)


@pytest.mark.parametrize(
    ("model", "name"), [("solov2_r50_fpn_1x", "1x"), ("solov2_r50_fpn_3x", "3x"), ("solov2_light_r18_fpn_3x", "3x")]
)
def test_configurations_match_the_reference_recipe(model: str, name: str) -> None:
    train, stored = load_config(model).train, SCHEDULES[name]
    assert (train.optimizer, train.schedule, train.learning_rate) == ("sgd", "step", stored["base_lr"])
    assert (train.momentum, train.weight_decay, train.clip_norm, train.decay_norms) == (0.9, 1e-4, 35, True)
    assert (train.epochs, list(train.step_epochs)) == (stored["epochs"], stored["milestones"])
    assert train.warmup_steps == stored["warmup_iters"] and train.reference_batch_size == 16
    assert train.warmup_start == pytest.approx(stored["warmup_start_factor"])


def test_a_decay_inside_the_warm_up_multiplies_it() -> None:
    """With short epochs on a small dataset both factors apply."""
    factor = partial(
        learning_rate_factor, kind="step", steps_per_epoch=10, epochs=4, warmup_steps=31, warmup_start=0.0,
        step_epochs=(2,),
    )  # fmt: skip
    assert factor(15) == pytest.approx(0.5) and factor(21) == pytest.approx(0.07) and factor(39) == pytest.approx(0.1)


def test_no_warm_up() -> None:
    for steps in (0, 1):
        factor = partial(
            learning_rate_factor, kind="step", steps_per_epoch=5, epochs=2, warmup_steps=steps, warmup_start=0.1
        )
        assert [factor(step) for step in range(10)] == [1.0] * 10


def test_cosine() -> None:
    """Rises during the warm-up, falls to one half halfway through the rest, and ends at 0."""
    factor = partial(
        learning_rate_factor, kind="cosine", steps_per_epoch=11, epochs=10, warmup_steps=10, warmup_start=0.1
    )
    assert factor(0) == pytest.approx(0.1) and factor(9) == pytest.approx(1.0) and factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.5) and factor(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(110) == pytest.approx(0.0) == factor(1000)
    rates = [factor(step) for step in range(111)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="'step' or 'cosine', got 'poly'"):
        learning_rate_factor(0, "poly", steps_per_epoch=1, epochs=1, warmup_steps=0, warmup_start=1.0)


def network() -> nn.Module:
    """Convolution, norm and a frozen layer: 4 trainable tensors, two of them with more than one dimension."""
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2, bias=False), nn.Linear(2, 2)
    )
    layers[3].requires_grad_(False)
    return layers


def test_groups_contain_every_trainable_parameter_once() -> None:
    model = network()
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for decay_norms, sizes in ((True, [4]), (False, [2, 2])):
        groups = parameter_groups(model, weight_decay=0.01, decay_norms=decay_norms)
        assert [len(group["params"]) for group in groups] == sizes
        members = [id(parameter) for group in groups for parameter in group["params"]]
        assert set(members) == trainable and len(members) == len(trainable)
        assert groups[0]["weight_decay"] == 0.01
    assert groups[1]["weight_decay"] == 0 and all(parameter.ndim == 1 for parameter in groups[1]["params"])


def test_factors_of_the_backbone() -> None:
    """Each parameter once; the first group is that of the network's rate; default factors change no group."""
    model = build_model(tiny_config("model.frozen_stages=1"), weights=None)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = {names[id(p)] for p in model.parameters() if p.requires_grad}
    assert not any(name.startswith("backbone.layer1") for name in trainable)
    for decay_norms in (True, False):
        common = {"weight_decay": 0.01, "decay_norms": decay_norms}
        plain = parameter_groups(model, **common)
        ones = parameter_groups(model, **common, backbone_rates=(1.0,) * 5)
        assert [group.keys() for group in plain] == [{"params": 0, "weight_decay": 0}.keys()] * len(plain)
        assert [[id(p) for p in group["params"]] for group in plain] == [
            [id(p) for p in group["params"]] for group in ones
        ]
        assert [group.keys() for group in ones] == [group.keys() for group in plain]
        found: dict[str, float] = {}
        groups = parameter_groups(model, **common, backbone_rates=(0.1, 0.2, 0.5, 1.0, 0.5))
        assert "rate_factor" not in groups[0] and groups[0]["weight_decay"] == 0.01
        for group in groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in found
                found[names[id(parameter)]] = group.get("rate_factor", 1.0)
                assert group["weight_decay"] == (0.01 if decay_norms or parameter.ndim > 1 else 0)
        assert found.keys() == trainable
        wanted = {"layer2": 0.5, "layer3": 1.0, "layer4": 0.5}
        for name, factor in found.items():
            part, rest = name.split(".")[:2]
            assert factor == (wanted[rest] if part == "backbone" else 1.0), name


def test_steps_follow_the_factors(tmp_path: Path) -> None:
    """A factor of 0 keeps a stage as it is; the logged rate is the network's; a resumed run keeps the factors."""
    settings = {
        "epochs": 1,
        "workers": 0,
        "evaluate_every": 0,
        "weight_decay": 0.0,
        "backbone_rates": (0, 0.5, 1, 1, 0),
    }
    more = {"data": tmp_path / "data", "output": tmp_path / "run", "device": "cpu"}
    config = tiny_config()
    torch.manual_seed(config.train.seed)
    start = build_model(config, weights=None).state_dict()
    solov2.train(config, **more, **settings)
    content = load_file(tmp_path / "run" / "last.pth")
    rates = {group.get("rate_factor", 1.0): group["lr"] for group in content["optimizer"]["param_groups"]}
    assert rates[0.0] == 0 and rates[0.5] == pytest.approx(0.5 * rates[1.0]) and rates[1.0] > 0
    moved = {name for name, value in content["model"].items() if not torch.equal(value, start[name])}
    assert not {f"backbone.{name}" for name in ("conv1.weight", "layer4.0.conv1.weight")} & moved
    assert {f"backbone.layer{number}.0.conv1.weight" for number in (1, 2, 3)} <= moved
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows if row["kind"] == "train"][-1] == rates[1.0]
    solov2.train(config, **more, **settings | {"epochs": 2}, resume=True)
    content = load_file(tmp_path / "run" / "last.pth")
    assert torch.equal(content["model"]["backbone.layer4.0.conv1.weight"], start["backbone.layer4.0.conv1.weight"])
    with pytest.raises(InputError, match="optimizer state"):
        solov2.train(config, **more, **settings | {"epochs": 3, "backbone_rates": (1,) * 5}, resume=True)


def test_sgd_step_by_hand() -> None:
    """v = momentum v + g + decay w;  w = w - rate v; two steps, so that the momentum matters."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    weight = model.weight.item()
    optimizer = build_optimizer(model, name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01, decay_norms=True)
    velocity = 0.0
    for gradient in (2.0, -1.0):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 0.01 * weight
        weight -= 0.1 * velocity
        assert model.weight.item() == pytest.approx(weight, rel=1e-12)


def test_optimizers_by_name() -> None:
    common = {"learning_rate": 0.02, "momentum": 0.9, "weight_decay": 0.05, "decay_norms": False}
    sgd, adamw = (build_optimizer(network(), name=name, **common) for name in ("sgd", "adamw"))
    assert type(sgd) is torch.optim.SGD and sgd.defaults["momentum"] == 0.9
    assert type(adamw) is torch.optim.AdamW
    for optimizer in (sgd, adamw):
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    with pytest.raises(ValueError, match="'sgd' or 'adamw', got 'lion'"):
        build_optimizer(network(), name="lion", **common)


def test_scaling_rule() -> None:
    assert scaled_learning_rate(0.01, 16, 16) == 0.01
    assert scaled_learning_rate(0.01, 2, 16) == pytest.approx(0.00125)
    assert scaled_learning_rate(0.01, 64, 16) == pytest.approx(0.04)


def test_a_skipped_first_step_leaves_no_momentum():
    """torch's fused SGD allocates momentum without filling it; the deterministic mode fills such memory with NaN."""
    torch.manual_seed(0)
    first, second = (nn.Linear(3, 2) for _ in range(2))
    second.load_state_dict(first.state_dict())
    torch.use_deterministic_algorithms(True)
    try:
        for model, failures in ((first, 1), (second, 0)):
            optimizer = build_optimizer(
                model, name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=1e-4, decay_norms=True
            )
            for factor in [*[math.inf] * failures, 1.0, 2.0]:
                (model(torch.ones(1, 3)).sum() * factor).backward()
                update_weights(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_norm=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters()))
    assert first.weight.isfinite().all()


def test_averages_follow_their_formula():
    torch.manual_seed(0)
    model = build_model(tiny_config(), weights=None)
    average = WeightAverage(model, 0.9)
    before = copy.deepcopy(model.state_dict())
    expected = None
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model.backbone.bn1.running_mean.normal_()
            model.backbone.bn1.num_batches_tracked.add_(1)
        average.update(model)
        state = {name: value.double() for name, value in model.state_dict().items()}
        expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in state.items()} if expected else state
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert torch.equal(value, model.state_dict()[name]), name
    assert not any(torch.equal(before[name], value) for name, value in model.named_parameters())  # own copies
    assert average.updates == 4 and not any(p.requires_grad for p in average.module.parameters())
