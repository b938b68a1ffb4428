"""Two processes train like one that averages their gradients; sharded evaluation gives the same AP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from helpers.distributed_worker import RATE, STEPS, batches_of, fresh_model
from helpers.tiny_runs import arguments, tiny_config

from solov2 import distributed
from solov2.build import build_criterion
from solov2.compute import select_device
from solov2.errors import InputError
from solov2.training.signals import TIME_UP

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command, cwd, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def averaged_in_one_process():
    """The same steps in this process: the gradients of both half-batches averaged, with one thread like each worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, criterion = fresh_model().train(), build_criterion(tiny_config().model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, fused=True)
    for halves in zip(batches_of(0), batches_of(1)):
        for batch in halves:
            losses = criterion(model(model.normalize(batch["pixels"], batch["sizes"])), batch["targets"])
            (sum(losses.values()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return model


def test_two_processes_equal_averaged_gradients(repo_root, tmp_path):
    done = run([*LAUNCHER, "tests/helpers/distributed_worker.py", str(tmp_path)], repo_root, PYTHONPATH=str(repo_root))
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    assert first["gathered"] == second["gathered"] == [0, 1]
    assert first["gathered_by_main"] == [0, 1] and second["gathered_by_main"] == []
    assert first["broadcast"] == second["broadcast"] == "from 0"
    assert first["status"] == second["status"] == TIME_UP  # although only the clock of rank 0 is past the deadline
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name  # parameters by DDP, buffers by the broadcast
    running = [name for name in first["buffers_before"] if "running_mean" in name]
    assert any(not torch.equal(first["buffers_before"][name], second["buffers_before"][name]) for name in running)

    model = averaged_in_one_process()
    start = fresh_model()
    moved = 0.0
    for (name, value), initial in zip(model.named_parameters(), start.parameters()):
        torch.testing.assert_close(first["state"][name], value, rtol=0, atol=1e-6, msg=name)
        moved = max(moved, float((value - initial).abs().max().detach()))
    assert moved > 0.01 and STEPS == 20


def test_commands_on_two_processes(repo_root, tmp_path):
    """`python train.py --nproc 2` equals torchrun; evaluation does not depend on the number of processes."""
    settings = [
        "--epochs",
        "2",
        "--seed",
        "3",
        "--set",
        "model.score_threshold=0.0",
        "--set",
        "model.category_threshold=0.01",
        "--set",
        "train.ema_decay=0.9",
    ]
    data = tmp_path / "shapes"
    by_flag = run([sys.executable, "train.py", *arguments(data, tmp_path / "a", *settings, "--nproc", "2")], repo_root)
    assert by_flag.returncode == 0, by_flag.stderr[-3000:]
    assert "2 processes on cpu" in by_flag.stdout and "8 images per step" in by_flag.stdout
    by_torchrun = run([*LAUNCHER, "train.py", *arguments(data, tmp_path / "b", *settings)], repo_root)
    assert by_torchrun.returncode == 0, by_torchrun.stderr[-3000:]
    states = [torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in "ab"]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    figures, results = [], []
    for nproc in ([], ["--nproc", "2"]):
        out, instances = tmp_path / f"figures{len(nproc)}.json", tmp_path / f"results{len(nproc)}.json"
        done = run(
            [
                sys.executable,
                "eval.py",
                "--weights",
                str(tmp_path / "a" / "last.pth"),
                "--data-root",
                str(data),
                "--workers",
                "0",
                "--json",
                str(out),
                "--results",
                str(instances),
                "--device",
                "cpu",
                *nproc,
            ],
            repo_root,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        figures.append(json.loads(out.read_text()))
        results.append(json.loads(instances.read_text()))
    assert figures[0]["segm"] == figures[1]["segm"] and figures[0]["bbox"] == figures[1]["bbox"]
    assert results[0] == results[1] and len(results[0]) > 0
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    logged = next(entry for entry in reversed(log) if entry["kind"] == "evaluation")  # each rank evaluated its share
    assert all(logged[f"segm_{name}"] == value for name, value in figures[0]["segm"].items())


def test_objects_travel_between_hosts():
    """On GPUs, nccl would carry them through device memory."""
    assert distributed.backend(torch.device("cpu")) == "gloo"
    assert distributed.backend(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"


def test_several_processes_do_not_share_a_device(monkeypatch):
    with pytest.raises(InputError, match="cuda:0 .*8 processes.*--device cuda"):
        distributed.relaunch(8, ["train.py"], "cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cuda:1 .*2 processes"):
        select_device("cuda:1")
    assert select_device("cpu:0") == torch.device("cpu", 0)


def test_relaunch_rejects_an_invalid_number_of_processes(monkeypatch):
    with pytest.raises(InputError, match="at least 1"):
        distributed.relaunch(0, ["train.py"], "cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="--nproc 2 .*torchrun of 4"):
        distributed.relaunch(2, ["train.py"], "cpu")
    distributed.relaunch(4, ["train.py"], "cpu")  # already running: nothing to do
    assert distributed.without_nproc(["a", "--nproc", "2", "--seed", "1"]) == ["a", "--seed", "1"]
    assert distributed.without_nproc(["--nproc=2", "b"]) == ["b"]


def test_device_and_rank_without_a_group():
    assert select_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device 'warp9'"):
        select_device("warp9")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)


def test_a_group_is_not_destroyed_after_an_error(monkeypatch):
    """Destroying nccl's group waits for the other ranks, so a rank that fails alone must not do it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with distributed.process_group(torch.device("cpu")):
        assert dist.is_initialized()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with distributed.process_group(torch.device("cpu")):  # the caller's own group
        pass
    assert dist.is_initialized()
    dist.destroy_process_group()
    try:
        with pytest.raises(InputError), distributed.process_group(torch.device("cpu")):
            raise InputError("a broken image")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_missing_ranks_are_those_that_do_not_answer(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    store.set("responds/2", "")
    assert distributed.missing_ranks(0.2) == [1, 3]
    for other in (1, 3):
        store.set(f"responds/{other}", "")
    assert distributed.missing_ranks(20) == []


def test_a_fresh_store_ignores_keys_of_dead_ranks():
    store = dist.HashStore()
    for key in ("request/1", "request/2", "reply/dead", "address"):
        store.set(key, "dead")
    with ThreadPoolExecutor() as pool:  # rank 0 must ignore the requests of dead ranks
        others = [pool.submit(distributed.fresh_store, store, rank, 3, timeout=5) for rank in (2, 1)]
        stores = [distributed.fresh_store(store, 0, 3, timeout=5), *(other.result() for other in others)]
    assert not stores[0].check(["address"])
    stores[2].set("address", "alive")
    assert all(fresh.get("address") == b"alive" for fresh in stores)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] .*0 seconds"):
        distributed.fresh_store(store, 0, 2, timeout=0.1)
