"""Shared fixtures: the paths of the repository and of the optional reference material."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

pytest.register_assert_rewrite("helpers")  # so that its failed assertions show values, as those of test modules do

# With more threads than cores, small tensors are slower by an order of magnitude; for the commands under test, too.
WORKERS = 2
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 2)
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    THREADS = max(1, THREADS // WORKERS)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)


def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite (`pytest` without files) in two processes where pytest-xdist is installed."""
    option, whole = config.option, config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and not IS_WORKER and getattr(option, "numprocesses", 0) is None and not option.usepdb:
        option.numprocesses, option.tx, option.dist = WORKERS, ["popen"] * WORKERS, "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests, and all processes that they start, a home folder of their own: they may not write elsewhere."""
    home = tempfile.mkdtemp(prefix="solov2-home-")
    config.add_cleanup(functools.partial(shutil.rmtree, home, ignore_errors=True))
    caches = {"XDG_CACHE_HOME": "cache", "MPLCONFIGDIR": "matplotlib", "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis"}
    os.environ |= {"HOME": home, **{name: os.path.join(home, folder) for name, folder in caches.items()}}


@pytest.fixture(autouse=True)
def restore_thread_count() -> Iterator[None]:
    """A command under test may set the number of threads, which changes the last bits of other tests' results."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def the_same_limit_of_pixels() -> Iterator[None]:
    """`data.max_image_pixels` above Pillow's own limit raises that for the whole process."""
    limit = Image.MAX_IMAGE_PIXELS
    yield
    Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout, the folder that contains setup.py."""
    return ROOT


def shared_folder(name: str) -> Path:
    """A folder of reference material beside the checkout; skips the test if it does not exist."""
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"no reference material at ../shared/{name}")
    return folder


@pytest.fixture(scope="session")
def coco_photos() -> Path:
    """A small COCO dataset of real photographs: annotations/, train2017/, val2017/."""
    return shared_folder("coco_photos")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Stored results of the SOLOv2 reference (described in its README.md)."""
    return shared_folder("golden")
