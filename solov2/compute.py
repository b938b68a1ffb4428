"""Device, precision and memory layout of a network, which travel together as one `Compute`."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solov2.distributed import check_device_per_process
from solov2.errors import InputError

HALF_TYPES = {"float32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = (*HALF_TYPES, "auto")
LOG = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt
SPAN = "solov2: "  # prefix of span names, which distinguishes them from torch's own annotations


@dataclass(frozen=True)
class Compute:
    """Device, precision and memory layout of a network.

    Args:
        device: of weights and batches.
        precision: "float32"; "tf32", whose convolutions on an NVIDIA card since Ampere round their inputs to 10 bits,
            with float32 matrix products (torch's default; the same as float32 on any other device); or "bf16" and
            "fp16" for mixed precision by autocast. See `select_precision`.
        memory_format: layout of images and convolution weights.
    """

    device: torch.device
    precision: str = "tf32"
    memory_format: torch.memory_format = torch.contiguous_format

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Set how an NVIDIA card multiplies float32, in forward and backward passes, and restore it on exit."""
        if not _is_nvidia(self.device):
            yield
            return
        cudnn: Any = torch.backends.cudnn  # type checkers do not see the properties of this module
        flags = cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul
        before = [flag.fp32_precision for flag in flags]
        try:
            cudnn.allow_tf32 = self.precision != "float32"  # the older flag, which Inductor reads, sets the first two
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            yield
        finally:
            cudnn.allow_tf32 = before[0] == "tf32"
            for flag, value in zip(flags, before):
                if flag.fp32_precision != value:
                    flag.fp32_precision = value

    def autocast(self) -> torch.autocast:
        """The autocast context of the forward pass; disabled for float32 and tf32."""
        half = HALF_TYPES[self.precision]
        return torch.autocast(self.device.type, dtype=half, enabled=half is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler for fp16; a disabled one for the other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def move(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Move the tensors of a batch, including those of its targets, to the device; keep everything else."""

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
        """Move a network to the device and memory format, in place; returns it."""
        return model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]  # stubs lack it


def select_precision(name: str, device: torch.device) -> str:
    """Resolve the name of a precision on a device.

    "tf32" becomes "float32" except on NVIDIA cards. "auto" becomes the precision in which the device multiplies fastest
    ("bf16", "fp16" or "float32"), which is logged. Other names are returned unchanged.
    """
    if name != "auto":
        return "float32" if name == "tf32" and not _is_nvidia(device) else name
    chosen = "float32"
    if _is_nvidia(device):
        chosen = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        chosen = "bf16"
    LOG.info("precision auto: %s on %s", chosen, device)
    return chosen


def _is_nvidia(device: torch.device) -> bool:
    """Whether a device multiplies in TF32, or does not but has torch's flags for it."""
    return device.type == "cuda"


def select_device(name: str | None = None) -> torch.device:
    """Device of this process: `name` if given, else the accelerator of its local rank, else the CPU.

    Raises:
        InputError: `name` is not a device of this machine, or a single one that several processes would share.
    """
    check_device_per_process(name, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return torch.device("cpu") if accelerator is None else _local_rank_device(accelerator.type)
    try:
        device = torch.device(name)
        if device.type != "cpu" and device.index is None and accelerator is not None:
            device = _local_rank_device(device.type)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise InputError(f"device '{name}' is not usable here (available: {available})") from error
    return device


def _local_rank_device(kind: str) -> torch.device:
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count())


def span(name: str) -> contextlib.AbstractContextManager[object]:
    """Context that marks a stage of the work with a name, for profilers and the benchmark.

    Without a profiler it does nothing, at a cost of half a microsecond. It also does nothing under `torch.compile` and
    `torch.export`, whose graphs would otherwise contain the profiler's operations.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return contextlib.nullcontext()
    return torch.profiler.record_function(SPAN + name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work; a CPU queues nothing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class SideStream:
    """A second queue of a device, for work that does not wait for what is queued on the first one later.

    A CPU has no queues: there, the methods do nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def mark(self) -> torch.Event | None:
        """An event after all work that is on the current queue now; None on a CPU."""
        return None if self._stream is None else torch.accelerator.current_stream(self._device).record_event()

    @contextlib.contextmanager
    def after(self, mark: torch.Event | None, inputs: Iterable[Tensor]) -> Iterator[None]:
        """Queue the work of the block here, after `mark`; the memory of its `inputs` is kept until it has run."""
        if self._stream is None or mark is None:
            yield
            return
        self._stream.wait_event(mark)
        for tensor in inputs:
            tensor.record_stream(self._stream)
        with self._stream:
            yield

    def hand_over(self, results: Iterable[Tensor]) -> None:
        """Let the current queue wait for this one before it reads `results`; those on the host are complete already."""
        if self._stream is None:
            return
        current = torch.accelerator.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in results:
            if tensor.device.type != "cpu":
                tensor.record_stream(current)


def reuse_freed_memory() -> None:
    """Let this process keep the host memory that it frees for what it allocates next.

    By default glibc returns every block above 32 MB to the system and gets it back zeroed page by page, which costs a
    fifth of R50's forward pass at 800 x 1216 on a CPU. Training gains less, and its many sizes would break the memory
    into pieces. Other C libraries are left as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, -1)


def has_cudnn(x: Tensor) -> bool:
    """Whether cuDNN convolves this tensor."""
    return _is_nvidia(x.device) and torch.version.hip is None and torch.backends.cudnn.is_acceptable(x)


def has_graphs(device: torch.device) -> bool:
    """Whether torch can record the work of a device in graphs, and replay it: `torch.cuda.CUDAGraph`."""
    return device.type == "cuda"


def arithmetic_state(device: torch.device) -> tuple[Any, ...]:
    """What `Compute.arithmetic` and `Compute.autocast` have set at the moment, which recorded work keeps."""
    flags = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]  # as in `arithmetic`
    casts = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return *casts, *(flag.fp32_precision for flag in flags)
