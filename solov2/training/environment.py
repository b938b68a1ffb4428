"""The machine, versions and commit behind a run or a measurement."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

from solov2 import version
from solov2.compute import Compute
from solov2.data.image_dataset import ImageDataset
from solov2.distributed import world_size

MAX_IMAGES, HEAD_BYTES = 1000, 2**16  # what `images_sha256` reads


def environment(device: torch.device) -> dict[str, Any]:
    """Device, CPU, load, threads, processes, versions and commit, as values for JSON."""
    return {
        "device": str(device),
        "device_name": device_name(device),
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


def conditions(compute: Compute, dataset: ImageDataset, validation: ImageDataset | None) -> dict[str, str]:
    """What a bit-identical resume depends on besides configuration and training annotations, by name for messages."""
    known = {
        "device": device_name(compute.device),
        "precision": compute.precision,
        "CPU threads": str(torch.get_num_threads()),
        "processes": str(world_size()),
        "torch": str(torch.__version__),  # a subclass of str, which a checkpoint may not contain
        "training images": images_sha256(dataset),
    }
    return known if validation is None else known | {"validation annotations": file_sha256(validation.annotation_file)}


def images_sha256(dataset: ImageDataset) -> str:
    """SHA-256 of the name, size and first 64 KiB of at most 1,000 images, spread over the dataset, and of their PNGs.

    It finds another set of images or a re-encoded one in seconds, even on slow storage; one changed image of a large
    dataset may escape it.
    """
    digest = hashlib.sha256()
    for _, folder, names, _ in dataset.files():
        for name in names[:: -(-len(names) // MAX_IMAGES) or 1]:
            path = folder / name
            try:
                with open(path, "rb") as file:
                    digest.update(f"{path.name} {os.fstat(file.fileno()).st_size}".encode() + file.read(HEAD_BYTES))
            except OSError:  # loading it will say so
                digest.update(f"{path.name} missing".encode())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, so that a log or a checkpoint identifies it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """Name of the accelerator, or of the processor."""
    if device.type == "cpu":
        return cpu_name()
    properties = getattr(torch.get_device_module(device), "get_device_properties", lambda _: None)(device)
    return getattr(properties, "name", device.type)


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
