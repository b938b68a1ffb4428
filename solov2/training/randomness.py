"""Random generators of a run, and operations that give the same bits every time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from solov2.errors import RunFailed


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Within it, an operation that may give other bits the next time is an error.

    Raises:
        RunFailed: such an operation was used.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
    deterministic: Any = torch.utils.deterministic  # a module whose property type checkers do not see
    before = deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = False, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunFailed) or "deterministic" not in str(error):
            raise
        raise RunFailed(f"--deterministic cannot be kept here: {str(error).partition('.')[0]}") from error
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of this process's generators, on the host and on its device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)
