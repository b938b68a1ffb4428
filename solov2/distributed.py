"""Process groups, ranks and collectives. Launching itself is torchrun's."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from solov2.errors import InputError

NCCL_GRACE = 300  # seconds
LAUNCHER_SETTINGS = {  # so that a signal for the launcher reaches its workers, and these have time to save
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
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_rank() -> int:
    """Number that a launcher gave this process, before there is a process group; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def restarted() -> bool:
    """Whether torchrun has started the workers again after a failure (its --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch_name() -> str:
    """What all starts of its workers by one torchrun have in common; empty without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name} of process {os.getppid()}" if name == "none" else name  # "none" is everybody's default


def is_main() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout: float = 1800) -> Iterator[None]:
    """Within it, this process belongs to the group that torchrun prepared; alone it only makes `device` current.

    The backend is torch's default for the device: nccl on GPUs, gloo on a CPU. After an error the group is not left in
    good order, since leaving nccl's waits for the other processes, which may wait for this one; torchrun ends them when
    this one has ended.

    Args:
        device: of this process.
        timeout: seconds after which an exchange that another process does not join is an error. nccl, which then ends
            the process without a word, gets more, so that an exchange between the hosts can be the first to fail.
    """
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if "RANK" in os.environ and not dist.is_initialized():
        patience = datetime.timedelta(seconds=timeout if device.type == "cpu" else timeout + NCCL_GRACE)
        store, own_rank, size = next(dist.rendezvous("env://", timeout=patience))
        dist.init_process_group(
            dist.get_default_backend_for_device(device),
            store=fresh_store(store, own_rank, size, timeout=timeout),
            rank=own_rank,
            world_size=size,
            timeout=patience,
            device_id=device if device.type != "cpu" else None,
        )
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def fresh_store(store: dist.Store, own_rank: int, size: int, *, timeout: float) -> dist.Store:
    """A part of `store` that only the processes living now know.

    The launcher's agent keeps one store for all its restarts (torch 2.14, which no longer tells them apart), and a
    process that finds the address of a dead one there fails or waits forever. So rank 0 hands a fresh key prefix to
    each live rank, and keys left by dead ranks are ignored.

    Args:
        store: what all processes reach; may hold what dead ones left.
        own_rank, size: of this process, and how many there are.
        timeout: seconds that rank 0 waits for the others.

    Raises:
        TimeoutError: some process did not ask.
    """
    name = uuid.uuid4().hex
    if own_rank > 0:
        store.set(f"asks/{own_rank}", name)
        name = store.get(f"told/{name}").decode()
        store.set(f"knows/{name}/{own_rank}", "")
        return dist.PrefixStore(name, store)
    missing, deadline = set(range(1, size)), time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if store.check([f"asks/{other}"]):
                store.set(f"told/{store.get(f'asks/{other}').decode()}", name)
            if store.check([f"knows/{name}/{other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(missing)} did not join within {timeout:.0f} seconds")
        time.sleep(0.02 if missing else 0)
    return dist.PrefixStore(name, store)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_gather_objects(value: Any) -> list[Any]:
    """`value` of every process, in rank order, on every process. Values are pickled: for small host data only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_reduce_max(value: Tensor) -> Tensor:
    """The largest of the processes' scalars (0 to 255), as uint8 on the same device; the host does not wait for it."""
    value = value.to(torch.uint8)
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers (running statistics differ between processes that saw other images)."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def relaunch(nproc: int, arguments: Sequence[str], device: str | None) -> None:
    """Replace this process by torch's launcher with `nproc` workers; returns only where nothing has to be done.

    Args:
        nproc: processes wanted on this machine.
        arguments: the whole command line without the flag that asked for it, script first.
        device: value of --device; more processes than accelerators are refused unless it is the CPU.

    Raises:
        InputError: nproc < 1, a torchrun of another size is already running, or too few devices.
    """
    if launched_processes(nproc) == nproc:
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and (device is None or not device.startswith("cpu")):
        if nproc > torch.accelerator.device_count():
            raise InputError(
                f"--nproc {nproc} but this machine has {torch.accelerator.device_count()} "
                f"{accelerator.type} devices; use one process per device"
            )
    elif nproc > (os.cpu_count() or 1):
        print(f"warning: --nproc {nproc} on {os.cpu_count()} CPU cores; the processes will share them", file=sys.stderr)
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


def launched_processes(nproc: int) -> int:
    """Number of processes that a torchrun has already started, 1 without one.

    Raises:
        InputError: nproc < 1, or another number of processes is already running.
    """
    running = int(os.environ.get("WORLD_SIZE", 1))
    if nproc < 1:
        raise InputError(f"--nproc must be at least 1, got {nproc}")
    if running > 1 and running != nproc:
        raise InputError(
            f"--nproc {nproc} inside a torchrun of {running} processes: leave the flag out or make them equal"
        )
    return running


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """A command line without `--nproc N` and `--nproc=N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--nproc":
            skip = True
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
