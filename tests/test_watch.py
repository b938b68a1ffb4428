"""Watched loaders: workers that die, hang or run out of shared memory; signals, threads and suspended processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from solov2.data import watch
from solov2.data.loader import Collate, EvalSampler, build_loader
from solov2.data.watch import shared_memory_warning, watched
from solov2.errors import InputError, RunFailed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="worker processes are forked")


class Images(Dataset):
    """Six samples; reading the image with this id does something in the worker."""

    image_ids = list(range(6))

    def __init__(self, act, at=2):
        self.act, self.at = act, at

    def __len__(self):
        return 6

    def file_name(self, image_id):
        return f"{image_id}.jpg"

    def __getitem__(self, index):
        if index == self.at:
            self.act()
        return {"image": torch.ones(3, 8, 8, dtype=torch.uint8), "image_id": index, "original_size": (8, 8)}


@pytest.fixture(autouse=True)
def no_handler_of_torch():
    """A loader that an earlier test used in the main thread left torch's handler, which raises anywhere in it."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def loaded(act, workers=2, **options):
    """The image ids of a watched loader."""
    before = set(multiprocessing.active_children())
    dataset = Images(act)
    loader = build_loader(dataset, sampler=EvalSampler(6, rank=0, world_size=1), collate=Collate(None), workers=workers)
    try:
        return [batch["image_ids"] for batch in watched(loader, dataset, **options)]
    finally:
        watch.kill_children(exclude=before)


def die(number):
    return lambda: os.kill(os.getpid(), number)


def fail(error):
    def act():
        raise error

    return act


def in_thread(call):
    """The result or the exception of a call in another thread than the main one."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (die(signal.SIGKILL), ("memory", "--workers")),
        (die(signal.SIGSEGV), ("SIGSEGV",)),
        (die(signal.SIGBUS), ("/dev/shm", "--shm-size")),
        (fail(MemoryError()), ("memory", "--workers")),
        (lambda: os._exit(3), ("exited", "--workers")),
    ],
)
def test_a_dead_worker_is_reported_with_its_images(act, words):
    with pytest.raises(RunFailed) as failed:
        loaded(act)
    assert all(word in str(failed.value) for word in (*words, ".jpg"))


def test_an_error_of_the_dataset_is_one_sentence():
    for workers in (0, 1):
        with pytest.raises(InputError) as failed:
            loaded(fail(InputError("2.jpg is damaged")), workers)
        assert str(failed.value) == "2.jpg is damaged"


def test_a_worker_that_is_alive_but_hangs_up_is_out_of_files():
    sentinel, _other = multiprocessing.Pipe()
    alive = [SimpleNamespace(exitcode=None, sentinel=sentinel)]
    for error in (RuntimeError("Too many open files"), RuntimeError("received 0 items of ancdata"), EOFError()):
        assert "ulimit" in watch._failure_reason(error, alive)
    for error in (RuntimeError("another"), EOFError("Original Traceback of the dataset")):
        assert watch._failure_reason(error, alive) is None


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("No space left on device (28)", ("/dev/shm", "MiB", "--shm-size", "--ipc=host")),
        ("Too many open files", ("ulimit",)),
    ],
)
def test_full_shared_memory_is_reported(monkeypatch, message, words):
    """torch moves batches there in a thread whose errors are lost; the workers inherit the patch."""

    def full(_tensor):
        raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1>: {message}")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(RunFailed) as failed:
        loaded(int)
    assert all(word in str(failed.value) for word in words) and "Traceback" not in str(failed.value)


@pytest.mark.skipif(not watch.SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_scarce_shared_memory_is_predicted(monkeypatch):
    monkeypatch.setattr(watch.shutil, "disk_usage", lambda _path: SimpleNamespace(free=60 * 2**20, total=64 * 2**20))
    assert shared_memory_warning(6 * 2**20, 10) is None and shared_memory_warning(2**40, 0) is None
    assert all(word in shared_memory_warning(8 * 2**20, 10) for word in ("80 MiB", "10 batches", "60 MiB of 64 MiB"))


def test_a_worker_that_is_slow_or_a_process_that_was_suspended_is_not_blamed(monkeypatch):
    monkeypatch.setattr(watch, "CHECK_SECONDS", 0.05)
    whole = [[index] for index in range(6)]
    assert loaded(lambda: time.sleep(0.4)) == whole  # without stall_seconds there is no limit
    with pytest.raises(RunFailed, match=r"train.stall_seconds.*2\.jpg"):
        loaded(lambda: time.sleep(5), stall_seconds=0.2)
    clock = iter(range(0, 10**9, 1000))  # each look at the clock comes 1,000 seconds after the last
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert loaded(lambda: time.sleep(0.4), stall_seconds=60) == whole


@pytest.mark.parametrize("main", [True, False])
def test_the_caller_can_stop_while_it_waits(main):
    class Heard(Exception):
        pass

    started = time.monotonic()

    def check():
        if time.monotonic() > started + 0.3:
            raise Heard

    def call():
        with pytest.raises(Heard):
            loaded(lambda: time.sleep(60), check=check)

    assert (call() if main else in_thread(call)) is None
    assert time.monotonic() - started < 5


def test_workers_are_watched_in_any_thread():
    assert in_thread(lambda: loaded(int)) == [[index] for index in range(6)]
    failed = in_thread(lambda: loaded(die(signal.SIGKILL)))
    assert isinstance(failed, RunFailed) and ".jpg" in str(failed)


def test_signal_handlers_are_left_alone(monkeypatch):
    """Except torch's, which a loader in the main thread installs: it would raise anywhere in the step."""
    before = signal.getsignal(signal.SIGCHLD)

    def torch_handler(*_arguments):
        raise AssertionError

    torch_handler.__module__ = "torch.utils.data._utils.signal_handling"
    seen = []
    try:
        for handler in (print, torch_handler):
            signal.signal(signal.SIGCHLD, handler)
            loaded(int, check=lambda: seen.append(signal.getsignal(signal.SIGCHLD)))
            assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert set(seen) == {print, signal.SIG_DFL}


def test_workers_start_in_the_thread_of_the_caller(monkeypatch):
    """There the current device is this rank's; torch's handler for exiting workers does not stay behind."""
    created = []
    start = DataLoader.__iter__

    def recorded(loader):
        created.append(threading.current_thread())
        return start(loader)

    monkeypatch.setattr(DataLoader, "__iter__", recorded)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    assert len(loaded(int)) == 6
    assert created == [threading.main_thread()] and signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
