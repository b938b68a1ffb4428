"""Where and how a network computes: device, precision and memory layout, which travel together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solov2.errors import InputError

HALF_TYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SPAN = "solov2: "  # before the names of spans, which tells them from torch's own annotations


@dataclass(frozen=True)
class Compute:
    """Device, precision and memory layout of a network.

    Args:
        device: where weights and batches lie.
        precision: "float32", or "bf16" and "fp16" for mixed precision by autocast.
        memory_format: layout of images and convolution weights.
    """

    device: torch.device
    precision: str = "float32"
    memory_format: torch.memory_format = torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """The context of the forward pass; off for float32."""
        half = HALF_TYPES[self.precision]
        return torch.autocast(self.device.type, dtype=half, enabled=half is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler for fp16; for the other precisions one that does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def move(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch whose tensors, those of its targets too, are on the device; everything else is handed on."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(self.device, non_blocking=True)
            return {key: moved(item) for key, item in value.items()} if isinstance(value, dict) else value

        return {key: moved(value) for key, value in batch.items()}

    def images(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Normalized images float32 [B, 3, H, W] of a batch on the device, in the layout of the network.

        Args:
            model: has `normalize(pixels, sizes)`.
            batch: pixels uint8 [B, 3, H, W] and sizes int64 [B, 2].
        """
        with span("normalize"):
            return model.normalize(batch["pixels"], batch["sizes"]).contiguous(memory_format=self.memory_format)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device and lay its weights out, in place; returns it."""
        return model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]  # stubs lack it


def select_device(name: str | None = None) -> torch.device:
    """Device of this process: `name` if given, else the accelerator of its local rank, else the CPU.

    Raises:
        InputError: `name` is not a device of this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return torch.device("cpu") if accelerator is None else _of_local_rank(accelerator.type)
    try:
        device = torch.device(name)
        if device.type != "cpu" and device.index is None and accelerator is not None:
            device = _of_local_rank(device.type)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise InputError(f"device '{name}' is not usable here (available: {available})") from error
    return device


def _of_local_rank(kind: str) -> torch.device:
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count())


def span(name: str) -> contextlib.AbstractContextManager[object]:
    """A stage of the work, by the name under which a profiler shows it and the benchmark counts it.

    Without a profiler it does nothing, which costs half a microsecond. Nor does it under `torch.compile` and
    `torch.export`, whose graphs would hold the profiler's operations.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return contextlib.nullcontext()
    return torch.profiler.record_function(SPAN + name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued; a CPU queues nothing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
