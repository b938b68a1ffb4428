"""Every command opens a checkpoint file exactly once per process, counted by the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.tiny_runs import arguments

from solov2.commands import convert, evaluate, export, predict, train

ACCESS, CLOSE, OPEN = 0x1, 0x10, 0x20  # IN_ACCESS, IN_CLOSE_NOWRITE, IN_OPEN of inotify(7)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs inotify")


@contextlib.contextmanager
def counted_opens(path: Path) -> Iterator[list[int]]:
    """Count how often any process opens a file inside the block; the list has the count after the block.

    Reads and closes are watched too, because the kernel merges identical successive events.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    queue = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(queue, os.fsencode(path), ACCESS | CLOSE | OPEN) >= 0
    counts: list[int] = []
    yield counts
    events, count = b"", 0
    with contextlib.suppress(BlockingIOError):
        while True:
            events += os.read(queue, 65536)
    os.close(queue)
    while events:
        _, mask, _, length = struct.unpack_from("iIII", events)
        count += bool(mask & OPEN)
        events = events[16 + length :]
    counts.append(count)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(data, run folder) of one epoch."""
    root = tmp_path_factory.mktemp("run")
    words = ["--epochs", "1", "--evaluate-every", "0"]
    assert train.main(arguments(root / "shapes", root / "run", *words)) == 0
    return root / "shapes", root / "run"


def copy_of(folder, target):
    """Copy a run folder; as in the original, last.pth is a hard link to the newest step file."""
    shutil.copytree(folder, target)
    (target / "last.pth").unlink()
    os.link(next(target.glob("step_*.pth")), target / "last.pth")
    return target


def test_the_count_includes_a_second_open(finished):
    path = finished[1] / "last.pth"
    with counted_opens(path) as counts:
        path.read_bytes()
        path.read_bytes()
    assert counts == [2]


@pytest.mark.parametrize("command", ["--resume", "--resume FILE", "--weights", "eval", "predict", "export", "convert"])
def test_opened_once(finished, tmp_path, command):
    data, folder = finished
    run = copy_of(folder, tmp_path / "run")
    weights, image = str(run / "last.pth"), str(next((data / "val2017").iterdir()))
    more = ["--epochs", "2", "--evaluate-every", "0"]
    words = {
        "--resume": lambda: train.main(arguments(data, run, *more, "--resume")),
        "--resume FILE": lambda: train.main(["--resume", weights, "--output", str(run), "--device", "cpu", *more]),
        "--weights": lambda: train.main(arguments(data, tmp_path / "tuned", "--weights", weights, *more)),
        "eval": lambda: evaluate.main(["--weights", weights, "--data-root", str(data), "--device", "cpu"]),
        "predict": lambda: predict.main([image, "--weights", weights, "--output", str(tmp_path), "--device", "cpu"]),
        "export": lambda: export.main(
            [
                "--weights",
                weights,
                "--size",
                "64",
                "64",
                "--output",
                str(tmp_path / "a.pt2"),
                "--raw",
                "--device",
                "cpu",
            ]
        ),
        "convert": lambda: convert.main([weights, str(tmp_path / "converted.pth"), "--to", "solov2"]),
    }
    with counted_opens(run / "last.pth") as counts:
        assert words[command]() == 0
    assert counts == [1]


def test_the_launching_process_and_both_ranks_open_it_once_each(finished, tmp_path, repo_root):
    data, folder = finished
    run = copy_of(folder, tmp_path / "run")
    words = arguments(data, run, "--epochs", "2", "--evaluate-every", "0", "--resume", "--nproc", "2")
    with counted_opens(run / "last.pth") as counts:
        subprocess.run([sys.executable, "train.py", *words], cwd=repo_root, check=True, capture_output=True)
    assert counts == [3]
