"""Random number generators of a run, and deterministic operations."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from solov2.errors import RunFailed

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # environment variable


@contextlib.contextmanager
def determinism(enabled: bool) -> Iterator[None]:
    """Raise inside the block if an operation may not give bit-identical results; does nothing unless `enabled`.

    The caller's settings are restored on exit.

    Raises:
        RunFailed: a nondeterministic operation was used.
    """
    if not enabled:
        yield
        return
    workspace = os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, ":4096:8")  # read when the first cuBLAS handle is created
    deterministic: Any = torch.utils.deterministic  # type checkers do not see the property of this module
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before = deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = False, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunFailed) or "deterministic" not in str(error):
            raise
        raise RunFailed(f"--deterministic is not possible: {str(error).partition('.')[0]}") from error
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of this process's random number generators: "cpu", and "device" for an accelerator."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)
