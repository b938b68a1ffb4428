"""Non-finite steps: detected without waiting for the device, explained afterwards.

Each step leaves a status on the device, which the host reads a few steps later, when it has long been computed. By then
the device has already skipped the update of a failed step (`step.update_weights`).
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

DELAY = 4  # steps until a status is read
OVERFLOWED, FAILED = 1, 2  # status of a step: gradients overflow at fp16's loss scale; loss or gradients not finite
MAX_OVERFLOWS = 32  # in a row; the loss scale, halved each time, cannot be the cause of more
STUCK_MIN, STUCK_MAX = 2.9 / 3, 1.0  # range of a mask loss that is not learning, as a fraction of mask_weight


class NonFiniteError(RunFailed):
    """A step was not finite; the message names its images, the first non-finite tensor and the saved batches."""


@dataclass
class NonFiniteGuard:
    """Detects optimizer steps that were not finite.

    Args:
        folder: where the batches of a failed step are saved.
        skip: continue after a failed step (its update was skipped); otherwise it ends the run.
        file_name: image id -> file name, for the message.
        skipped: number of failed steps so far.
    """

    folder: Path
    skip: bool = False
    file_name: Callable[[int], str] = str
    skipped: int = 0
    _overflows: Tensor | None = None  # consecutive overflowing steps, on the device
    _waiting: deque[tuple[int, Tensor, torch.Event | None, list[dict[str, Any]]]] = field(default_factory=deque)

    def watch(self, step: int, status: Tensor, batches: list[dict[str, Any]]) -> None:
        """Record a step, without waiting for the device.

        Args:
            step: global step (0-based).
            status: 0, OVERFLOWED or FAILED; a scalar on the device, equal on all ranks.
            batches: the batches of the step, on the host.
        """
        before = torch.zeros_like(status) if self._overflows is None else self._overflows
        self._overflows = torch.where(status == OVERFLOWED, (before + 1).clamp(max=MAX_OVERFLOWS), 0)
        failed = (status == FAILED) | (self._overflows == MAX_OVERFLOWS)
        device, failed = failed.device, failed.to("cpu", non_blocking=True)
        copied = torch.accelerator.current_stream(device).record_event() if device.type != "cpu" else None
        self._waiting.append((step, failed, copied, batches))

    def failure(self, *, now: bool = False) -> tuple[int, list[dict[str, Any]]] | None:
        """(step, batches) of a failed step that ends the run, or None.

        Checks only steps recorded at least `DELAY` steps ago, which the device has long finished; with `now`, all.
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

    def explain(self, step: int, batches: Sequence[dict[str, Any]], cause: str) -> NonFiniteError:
        """Save the batches of a failed step and return its error, which combines the causes found by all ranks."""
        path = self.folder / f"nonfinite_step_{step + 1}_process_{distributed.rank()}.pth"
        write_file(path, {"step": step, "batches": list(batches)})
        names = ", ".join(self.file_name(image_id) for batch in batches for image_id in batch["image_ids"])
        causes = distributed.all_gather_objects(f"images {names}: {cause} (saved as {path.name})")
        return NonFiniteError(
            f"step {step + 1} is not finite, and its update was skipped. {'; '.join(causes)}. Lower the learning "
            "rate, use bf16 instead of fp16, or look at the images; train.nonfinite=skip continues without such steps"
        )


def first_nonfinite(model: nn.Module, forward: Callable[[], dict[str, Tensor]]) -> str:
    """Repeat a step and describe its first non-finite value: a parameter, a module's output, a loss or a gradient.

    Args:
        model: SOLOv2, without DistributedDataParallel; its gradients are overwritten.
        forward: repeats the forward passes and returns the losses of each batch, by name.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} is not finite"
    found: list[str] = []

    def output_check(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the output of {name} is the first that is not finite")

        return hook

    handles = [module.register_forward_hook(output_check(name)) for name, module in model.named_modules() if name]
    model.zero_grad(set_to_none=True)
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks would make a compiled network compile again
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
    return "with the current weights, the step is finite when repeated"


def stuck_mask_loss(loss_mask: float, mask_weight: float) -> str | None:
    """A warning if the mask loss did not fall during the warm-up, or None if it did.

    Masks unrelated to the ground truth have a dice loss of about 1 per instance, times `mask_weight`.
    """
    if not STUCK_MIN * mask_weight <= loss_mask <= STUCK_MAX * mask_weight:
        return None
    return (
        f"the mask loss is {loss_mask:.2f} after the warm-up, as for masks unrelated to the ground truth; usual "
        "causes: a learning rate that does not suit the batch size (see the first lines of the log), class ids that "
        "are off by one, or grid sizes and scale ranges for larger images; solov2 check-data says more"
    )
