"""Steps that went wrong: seen without waiting for the device, explained afterwards.

A failure is a number on the device that nobody reads in the step itself; it is read a few steps later, when it has long
been there. The update of such a step was already left out on the device (`step.update_weights`).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solov2 import distributed
from solov2.checkpoint import write_file
from solov2.errors import RunFailed

DELAY = 4  # steps until a flag is read
OVERFLOWED, FAILED = 1, 2  # what can be wrong with a step: gradients too large for fp16's scale, or not finite
OVERFLOWS = 32  # steps in a row that overflow; the scale, halved each time, is not the cause then
STUCK_FROM, STUCK_TO = 2.9 / 3, 1.0  # of the mask weight: where a dice loss stays that learns nothing


class NonFiniteError(RunFailed):
    """A step was not finite; the sentence names its images, the first tensor, and the file that replays it."""


@dataclass
class NonFiniteGuard:
    """Watches whether optimizer steps were finite.

    Args:
        folder: where a failed step's batches are saved.
        skip: go on after a failed step (its update was left out), counting them; else it ends the run.
        file_name: image id -> file name, for the message.
        skipped: failed steps so far.
    """

    folder: Path
    skip: bool = False
    file_name: Callable[[int], str] = str
    skipped: int = 0
    _overflows: Tensor | None = None  # steps in a row, on the device
    _waiting: deque[tuple[int, Tensor, torch.Event | None, list[dict[str, Any]]]] = field(default_factory=deque)

    def watch(self, step: int, wrong: Tensor, batches: list[dict[str, Any]]) -> None:
        """Remember a step, without waiting for the device.

        Args:
            step: its global number.
            wrong: 0, OVERFLOWED or FAILED; a scalar on the device, the same on all processes.
            batches: what it was made of, on the host.
        """
        before = torch.zeros_like(wrong) if self._overflows is None else self._overflows
        self._overflows = torch.where(wrong == OVERFLOWED, (before + 1).clamp(max=OVERFLOWS), 0)
        failed = (wrong == FAILED) | (self._overflows == OVERFLOWS)
        device, failed = failed.device, failed.to("cpu", non_blocking=True)
        copied = torch.accelerator.current_stream(device).record_event() if device.type != "cpu" else None
        self._waiting.append((step, failed, copied, batches))

    def failure(self, *, now: bool = False) -> tuple[int, list[dict[str, Any]]] | None:
        """(step, batches) of a failed step that ends the run, else None.

        Reads what was remembered `DELAY` steps ago, which the device has long passed; everything with `now`.
        """
        while len(self._waiting) > (0 if now else DELAY):
            step, failed, copied, batches = self._waiting.popleft()
            if copied is not None:
                copied.synchronize()
            if failed.item():
                self.skipped += 1
                if not self.skip:
                    return step, batches
        return None

    def explain(self, step: int, batches: Sequence[dict[str, Any]], culprit: str) -> NonFiniteError:
        """The error of a failed step, after its batches have been saved; every process tells its own share."""
        path = self.folder / f"nonfinite_step_{step + 1}_process_{distributed.rank()}.pth"
        write_file(path, {"step": step, "batches": list(batches)})
        names = ", ".join(self.file_name(image_id) for batch in batches for image_id in batch["image_ids"])
        shares = distributed.all_gather_objects(f"images {names}: {culprit} (saved as {path.name})")
        return NonFiniteError(
            f"step {step + 1} is not finite, and its update was left out. {'; '.join(shares)}. Lower the learning "
            "rate, use bf16 instead of fp16, or look at the images; train.nonfinite=skip goes on without such steps"
        )


def first_nonfinite(model: nn.Module, forward: Callable[[], dict[str, Tensor]]) -> str:
    """What is not finite first when a step is repeated: a parameter, a module's output, a loss or a gradient.

    Args:
        model: the network itself, without DistributedDataParallel; its gradients are overwritten.
        forward: repeats the forward passes and returns the losses of each batch, by name.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} is itself not finite"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the output of {name} is the first that is not finite")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    model.zero_grad(set_to_none=True)
    try:
        losses = forward()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    for name, loss in losses.items():
        if not loss.isfinite():
            return f"{name} is {loss.item()}"
    functools.reduce(torch.add, losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name} is the first that is not finite"
    return "repeating the step with the present weights is finite"


def stuck_mask_loss(loss_mask: float, mask_weight: float) -> str | None:
    """What to say of a mask loss that the warm-up did not move: None where it moved.

    A dice loss of 1 for every instance (times its weight, 3) is what masks give that have nothing to do with the truth.
    """
    if not STUCK_FROM * mask_weight <= loss_mask <= STUCK_TO * mask_weight:
        return None
    return (
        f"the mask loss is {loss_mask:.2f} after the warm-up, as for masks that have nothing to do with the truth; "
        "usual causes: a learning rate that does not suit the batch size (see the first lines of this log), class ids "
        "that are off by one, or grids and scale ranges made for larger images: solov2 check-data says more"
    )
