"""Process groups, ranks and collectives. Processes are launched by torchrun."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from solov2.errors import InputError, count

LOG = logging.getLogger(__name__)
NCCL_EXTRA_SECONDS = 300  # timeout of nccl beyond that of gloo, see `process_group`
LAUNCHER_SETTINGS = {  # the launcher forwards signals to its workers and gives them time to save
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
}
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def launched_rank() -> int:
    """Rank assigned by the launcher, known before there is a process group; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def launched_world_size() -> int:
    """Number of processes, known before there is a process group; 1 without a launcher."""
    return world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def restarted() -> bool:
    """Whether torchrun has restarted the workers after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch_name() -> str:
    """Name of the torchrun launch, the same for all restarts of its workers; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name} of process {os.getppid()}" if name == "none" else name  # "none" is torchrun's default


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes files."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout: float = 1800) -> Iterator[None]:
    """Initialize torch's process group under torchrun and destroy it on exit; make `device` the current device.

    A group that the caller has initialized is used and stays. After an error the group is not destroyed: with nccl that
    waits for the other ranks, which may be waiting for this one. torchrun ends them once this one has exited.

    Args:
        device: device of this process.
        timeout: seconds after which a collective that another rank does not join is an error. On timeout nccl ends the
            process without a message, so it gets `NCCL_EXTRA_SECONDS` more and gloo's collectives fail first.
    """
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    own = "RANK" in os.environ and not dist.is_initialized()
    if own:
        group_timeout = datetime.timedelta(seconds=timeout if device.type == "cpu" else timeout + NCCL_EXTRA_SECONDS)
        store, own_rank, size = next(dist.rendezvous("env://", timeout=group_timeout))
        dist.init_process_group(
            backend(device),
            store=fresh_store(store, own_rank, size, timeout=timeout),
            rank=own_rank,
            world_size=size,
            timeout=group_timeout,
            device_id=device if device.type != "cpu" else None,
        )
    yield
    if own and dist.is_initialized():
        dist.destroy_process_group()


def backend(device: torch.device) -> str:
    """Backends of the process group: gloo for tensors and objects on the host, torch's default (nccl) for a device."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def fresh_store(store: dist.Store, own_rank: int, size: int, *, timeout: float) -> dist.Store:
    """A view of `store` under a new key prefix, shared by the live ranks only.

    torchrun keeps one store across all restarts (torch 2.14 no longer separates them), and a rank that finds the
    address of a dead one there fails or waits forever. So rank 0 hands a fresh key prefix to each live rank, and keys
    left by dead ranks are ignored.

    Args:
        store: the store that all ranks share; may contain keys of dead ranks.
        own_rank: rank of this process.
        size: number of processes.
        timeout: seconds that rank 0 waits for the others.

    Raises:
        TimeoutError: a rank did not join in time.
    """
    name = uuid.uuid4().hex  # rank 0: the prefix; other ranks: the id of their request
    if own_rank > 0:
        store.set(f"request/{own_rank}", name)
        prefix = store.get(f"reply/{name}").decode()
        store.set(f"joined/{prefix}/{own_rank}", "")
        return dist.PrefixStore(prefix, store)
    missing, deadline = set(range(1, size)), time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if store.check([f"request/{other}"]):
                store.set(f"reply/{store.get(f'request/{other}').decode()}", name)
            if store.check([f"joined/{name}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not join within {timeout:.0f} seconds")
        time.sleep(0.02 if missing else 0)
    return dist.PrefixStore(name, store)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank. Values are pickled: for small data only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_objects(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on rank 0; an empty list on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def broadcast_object(value: Any) -> Any:
    """The `value` of rank 0, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_max(value: Tensor) -> Tensor:
    """Maximum of a scalar (integer in 0..255) over all ranks, as uint8 on the same device; the host does not wait."""
    value = value.to(torch.uint8)
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0 to all ranks; running statistics differ between ranks, which see different images."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def missing_ranks(seconds: float) -> list[int]:
    """The ranks that do not call this as well within `seconds`, after a collective has failed.

    The ranks meet in the store, because connections between them may be broken.
    """
    missing, deadline = set(range(world_size())), time.monotonic() + seconds
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"responds/{rank()}", "")
        while missing and time.monotonic() < deadline:
            missing -= {other for other in missing if store.check([f"responds/{other}"])}
            time.sleep(0.1)
    except RuntimeError:  # the store has died with its process: torchrun, or rank 0
        missing -= {rank()}
    return sorted(missing)


def relaunch(nproc: int, arguments: Sequence[str], device: str | None) -> None:
    """Replace this process by torchrun with `nproc` workers; returns only if that many processes are already running.

    Args:
        nproc: number of processes on this machine.
        arguments: the command line without --nproc, script first.
        device: value of --device; unless it is the CPU, there must be an accelerator for each process.

    Raises:
        InputError: nproc < 1, a torchrun with another number of processes is running, `device` is a single one, or
            there are too few devices.
    """
    if launched_processes(nproc) == nproc:
        return
    check_device_per_process(device, nproc)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and (device is None or not device.startswith("cpu")):
        if nproc > torch.accelerator.device_count():
            raise InputError(
                f"--nproc {nproc} but this machine has {torch.accelerator.device_count()} "
                f"{accelerator.type} devices; use at most one process per device"
            )
    elif nproc > (os.cpu_count() or 1):
        LOG.warning("--nproc %d on %s; the processes will share them", nproc, count(os.cpu_count() or 1, "CPU core"))
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in LAUNCHER_VARIABLES and not key.startswith("TORCHELASTIC_")
    }
    environment = LAUNCHER_SETTINGS | environment
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(nproc),
        *arguments,
    ]
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def check_device_per_process(name: str | None, processes: int) -> None:
    """Raise InputError if `name` is a single accelerator, such as GPU 0, for several processes on this machine."""
    kind, _, index = (name or "").partition(":")
    if processes > 1 and index and kind != "cpu":
        raise InputError(f"--device {name} would put {processes} processes on one device; use --device {kind}, or none")


def launched_processes(nproc: int) -> int:
    """Number of processes that torchrun has started, 1 without torchrun.

    Raises:
        InputError: nproc < 1, or another number of processes is already running.
    """
    running = int(os.environ.get("WORLD_SIZE", 1))
    if nproc < 1:
        raise InputError(f"--nproc must be at least 1, got {nproc}")
    if running > 1 and running != nproc:
        raise InputError(f"--nproc {nproc} inside a torchrun of {running} processes: omit --nproc or pass {running}")
    return running


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """The command line without `--nproc N` or `--nproc=N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
