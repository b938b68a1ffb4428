"""The machine, versions and commit behind a run or a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

from solov2 import version
from solov2.distributed import world_size


def environment(device: torch.device) -> dict[str, Any]:
    """Device, CPU, load, threads, processes, versions and commit, as values for JSON."""
    name = cpu_name()
    if device.type != "cpu":
        properties = getattr(torch.get_device_module(device), "get_device_properties", lambda _: None)(device)
        name = getattr(properties, "name", device.type)
    return {
        "device": str(device),
        "device_name": name,
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # Windows has no load average
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "solov2": version.__version__,
        "commit": git_commit(),
    }


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout that contains the package, with "+" if files differ from it; None outside a checkout."""
    checkout = Path(version.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    try:
        answers = [
            subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
            for arguments in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return answers[0].stdout.strip() + ("+" if answers[1].stdout.strip() else "")
