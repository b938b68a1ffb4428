"""Optimizer, learning-rate schedule and weight average. Reference recipe: SGD, linear warm-up, step decay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from solov2.models.optimize import inference_copy
from solov2.models.solov2 import SOLOv2


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_norms: bool, backbone_rates: Sequence[float] = ()
) -> list[dict[str, object]]:
    """Group the trainable parameters; without `decay_norms`, vectors (norms, biases) get no weight decay.

    Args:
        model: SOLOv2, or any module without `backbone_rates`.
        weight_decay: coefficient.
        decay_norms: whether it also applies to vectors.
        backbone_rates: factors of the learning rate for the stem and layer1 to layer4 of the backbone; default: 1.
            Groups with another factor than 1 have it as "rate_factor", and follow those of all other parameters.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = []
    for factor in dict.fromkeys((1.0, *backbone_rates)):
        members = [p for name, p in trainable if not backbone_rates or _rate_factor(name, backbone_rates) == factor]
        parts = [(members, weight_decay)]
        if not decay_norms:
            parts = [([p for p in members if p.ndim > 1], weight_decay), ([p for p in members if p.ndim <= 1], 0.0)]
        extra = {} if factor == 1 else {"rate_factor": factor}
        groups += [{"params": params, "weight_decay": decay, **extra} for params, decay in parts if params or not extra]
    return groups


def _rate_factor(name: str, backbone_rates: Sequence[float]) -> float:
    """The factor of a parameter, by its name: backbone.layer3.0.conv1.weight has the fourth, backbone.bn1.bias the
    first.
    """
    part, _, rest = name.partition(".")
    if part != "backbone":
        return 1.0
    return backbone_rates[int(rest[len("layer")])] if rest.startswith("layer") else backbone_rates[0]


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    decay_norms: bool,
    backbone_rates: Sequence[float] = (),
) -> torch.optim.Optimizer:
    """SGD with momentum ("sgd", the reference) or AdamW ("adamw") over the trainable parameters.

    See `parameter_groups`; whoever sets learning rates multiplies them by the "rate_factor" of a group.

    Raises:
        ValueError: unknown name.
    """
    groups = parameter_groups(model, weight_decay=weight_decay, decay_norms=decay_norms, backbone_rates=backbone_rates)
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, fused=True)
        if momentum:
            optimizer.register_step_pre_hook(_start_momentum)
        return optimizer
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {name!r}")


def _start_momentum(optimizer: torch.optim.Optimizer, *_arguments: object) -> None:
    """Initialize missing momentum buffers with zeros.

    torch 2.14's fused SGD allocates them without filling them, and a first step that is skipped on the device would
    leave them so.
    """
    for parameter in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
        if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def scaled_learning_rate(learning_rate: float, batch_size: int, reference_batch_size: int) -> float:
    """Linear scaling rule (Goyal et al. 2017): the rate for `reference_batch_size` images, scaled to `batch_size`."""
    return learning_rate * batch_size / reference_batch_size


def learning_rate_factor(
    step: int,
    kind: str,
    *,
    steps_per_epoch: int,
    epochs: int,
    warmup_steps: int,
    warmup_start: float,
    step_epochs: Sequence[int] = (),
) -> float:
    """Factor of the learning rate: a pure function of the optimizer step (0-based), so resuming needs no state.

    A linear warm-up from `warmup_start` reaches 1 at step `warmup_steps` - 1, like mmengine's LinearLR with end =
    warmup_steps. "step" multiplies by 0.1 after each epoch in `step_epochs`; "cosine" falls from 1 at the end of the
    warm-up to 0 after the last step.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("step", "cosine"):
        raise ValueError(f"schedule must be 'step' or 'cosine', got {kind!r}")
    warmup = 1.0
    if step < warmup_steps - 1:
        warmup = warmup_start + (1 - warmup_start) * step / (warmup_steps - 1)
    if kind == "step":
        return warmup * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in step_epochs)
    progress = (step - warmup_steps) / max(1, steps_per_epoch * epochs - warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Check that a stored state is of the same parameters; torch would crash in the next step, if not in its kernels.

    Raises:
        ValueError: it has other parameters, or moments of other shapes.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in state["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("it has other parameters")
    if not all(isinstance(group.get("lr"), (int, float)) for group in state["param_groups"]):
        raise ValueError("it has no learning rate")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    required = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else set()
    for number, values in state["state"].items():
        if number not in range(len(parameters)) or not required <= values.keys():
            raise ValueError(f"it has no complete state of parameter {number}")
        for name, value in values.items():
            shape = () if name == "step" else parameters[number].shape
            if value is None and name == "momentum_buffer":  # without momentum
                continue
            if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.shape != shape:
                raise ValueError(f"{name} of parameter {number} is not a tensor {list(shape)}")


class WeightAverage:
    """Exponential moving average of weights and running statistics: after each step, a = decay a + (1 - decay) w.

    The first update copies the weights. torch's AveragedModel computes the same, but copies its counter to the device
    in every step, which makes the host wait.

    Args:
        model: the model to average; `module`, a copy for inference, holds the averages.
        decay: between 0 and 1.
    """

    def __init__(self, model: SOLOv2, decay: float) -> None:
        self.module = inference_copy(model)
        self.updates = 0
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the weights after a step, without waiting for the device."""
        kept, trained = (dict(itertools.chain(m.named_parameters(), m.named_buffers())) for m in (self.module, model))
        averages, values = list(kept.values()), [trained[name] for name in kept]  # all but an auxiliary head
        floating = [average.is_floating_point() for average in averages]
        if self.updates:
            self._average(
                list(itertools.compress(averages, floating)), list(itertools.compress(values, floating)), self.updates
            )
        for average, value, averaged in zip(averages, values, floating, strict=True):
            if not (self.updates and averaged):  # integers (num_batches_tracked) are copied
                average.copy_(value)
        self.updates += 1
