"""Fixtures shared by the tests: where the repository and the optional reference material are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytest.register_assert_rewrite("helpers")  # their assertions tell values as those of test modules do

# More threads than cores slow small tensors down by an order of magnitude.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 2))


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """A command under test may choose its own number of threads, on which the last bits of others' figures depend."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout: the folder of setup.py."""
    return ROOT


def shared_folder(name: str) -> Path:
    """A folder of reference material beside the checkout; a test that needs it is skipped where it is absent."""
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"no reference material at ../shared/{name}")
    return folder


@pytest.fixture(scope="session")
def coco_photos() -> Path:
    """A COCO tree of a few real photographs: annotations/, train2017/, val2017/."""
    return shared_folder("coco_photos")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference numbers of SOLOv2 (README.md there says what they are)."""
    return shared_folder("golden")
