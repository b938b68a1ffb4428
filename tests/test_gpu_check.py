"""The accelerator check (tests/scripts/gpu_check.py) runs on a CPU, and its items are independent of each other."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import gpu_check


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Item -> content of its result file, of the items that are fast on a CPU; here in one process."""
    folder, threads = tmp_path_factory.mktemp("gpu_check"), torch.get_num_threads()
    torch.set_num_threads(1)  # two threads would wait for each other on a busy machine
    for item in (*gpu_check.ITEMS, "overflow"):
        assert gpu_check._run_here(item, folder, "cpu") == 0, item
    torch.set_num_threads(threads)
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


def test_items_run_in_processes_of_their_own(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, repo_root / "tests/scripts/gpu_check.py", "--out", "out", "--device", "cpu", "--only"]
    done = subprocess.run([*command, "environment", "process_group"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert found["process_group"]["backend"] == "gloo"
    assert found["environment"]["device"] == "cpu" and found["environment"]["torch"] == torch.__version__
    assert "\nprocess_group:\n" in done.stdout


def test_every_item_has_a_result(results: dict[str, dict[str, Any]]) -> None:
    assert results.keys() == gpu_check.ITEMS.keys() | {"overflow"}
    for item, found in results.items():
        assert "error" not in found and "item_seconds" in found, (item, found)
    assert results["overflow"]["skipped"] > 0 and results["overflow"]["scale"] < 2**40


def test_a_cpu_does_not_differ_from_itself(results: dict[str, dict[str, Any]]) -> None:
    differences = {name: value for name, value in results["parity"].items() if name != "item_seconds"}
    assert len(differences) == 8 and set(differences.values()) == {0}


def test_differences() -> None:
    wanted = torch.tensor([1.0, 3.0])  # standard deviation 1
    assert gpu_check.relative_difference(torch.tensor([1.0, 2.5]), wanted) == 0.5
    assert gpu_check.relative_difference(torch.tensor(3.0), torch.tensor(2.0)) == 0.5
    for broken in (math.nan, math.inf):
        assert gpu_check.difference(torch.tensor([1.0, broken]), wanted) > 1e300


def test_losses_are_finite_and_similar_in_both_precisions(results: dict[str, dict[str, Any]]) -> None:
    step = results["step"]
    for precision in ("float32", "bf16"):
        assert set(step[precision]) == {"loss_category", "loss_mask"}
        assert all(math.isfinite(loss) and loss > 0 for loss in step[precision].values())
    assert step["bf16"] == pytest.approx(step["float32"], rel=0.02)


def test_every_form_has_a_speed(results: dict[str, dict[str, Any]]) -> None:
    forms = {
        "training": gpu_check.PRECISIONS,
        "inference": [f"{p}, {kind}" for p in ("float32", "tf32", "bf16") for kind in ("plain", "optimized")],
        "light_inference": [f"{p}, {kind}" for p in ("tf32", "bf16") for kind in ("plain", "optimized")],
    }
    for item, wanted in forms.items():
        rows = {name: row for name, row in results[item].items() if "batch" in name}
        assert rows.keys() == {f"{form}, batch {count}" for form in wanted for count in (1, 2)}
        for row in rows.values():
            assert math.isfinite(row["images_per_second"]) and row["images_per_second"] > 0
            assert item == "training" or row["instances"] == 100 and row["network_ms"] < row["ms"]
    for item in ("ceilings", "postprocess", "loader"):
        speeds = {name: value for name, value in results[item].items() if name != "item_seconds"}
        assert speeds and all(value > 0 for value in speeds.values())
    assert 0 < results["profile"]["busy"]


def test_an_item_that_crashes_does_not_affect_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its process does not know the item and exits without a result; the result of an earlier call is not used."""
    monkeypatch.setitem(gpu_check.ITEMS, "broken", (lambda device, rows: None, 60))
    (tmp_path / "broken.json").write_text('{"seconds": 1.0}')
    assert gpu_check.main(["--only", "broken", "environment", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]
    assert json.loads((tmp_path / "environment.json").read_text())["device"] == "cpu"
    lines = capfd.readouterr().out.splitlines()
    at = lines.index("broken:")
    assert lines[at + 1].split() == "error the process ended without a result".split()
    assert lines[at + 2] == "environment:" and lines[at + 3].split() == ["device", "cpu"]


def test_an_item_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "START", 0)
    for item in ("parity", "step"):
        monkeypatch.setitem(gpu_check.ITEMS, item, (gpu_check.ITEMS[item][0], 0.01))
    assert gpu_check.main(["--only", "parity", "step", "--out", str(tmp_path), "--device", "cpu"]) == 1
    for item in ("parity", "step"):
        assert json.loads((tmp_path / f"{item}.json").read_text()) == {"error": "took longer than 0.01 seconds"}


def test_an_exception_becomes_the_result_of_its_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu_check.ITEMS, "broken", (lambda device, rows: rows.update(share=1 / 0), 60))
    assert gpu_check.main(["--here", "broken", "--out", str(tmp_path), "--device", "cpu"]) == 1
    assert json.loads((tmp_path / "broken.json").read_text())["error"] == "ZeroDivisionError: division by zero"
    assert "Traceback" in capsys.readouterr().err


def test_a_step_that_does_not_fit_has_no_speed() -> None:
    def step() -> None:
        raise torch.OutOfMemoryError

    row = gpu_check._speed(step, 2, torch.device("cpu"))
    assert row == {"images_per_second": None, "ms": None, "peak_mib": "more than there is"}


def test_rows_are_written_at_once(tmp_path: Path) -> None:
    """So that an item that is stopped keeps what it has found."""
    rows = gpu_check.Rows(tmp_path / "parity.json")
    rows["a"] = 1
    assert gpu_check._read(rows.path) == {"a": 1}
    rows |= {"b": 2, "c": 3}
    assert isinstance(rows, gpu_check.Rows) and gpu_check._read(rows.path) == {"a": 1, "b": 2, "c": 3}


def test_the_table_shows_an_earlier_call_beside(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_check._show("training", *({"bf16, batch 2": {"ms": speed}} for speed in (2.0, 1.0)))
    assert capsys.readouterr().out.split() == "training: bf16, batch 2 ms 2 before: ms 1".split()


def test_inference_with_graphs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One more row, whose failure does not hide the others; on a CPU without graphs it fails."""
    torch.set_num_threads(1)  # as above
    monkeypatch.setattr(gpu_check, "has_graphs", lambda device: True)
    model = "solov2_r50_fpn_1x", (800, 1088)
    rows = gpu_check.Rows(tmp_path / "rows.json")
    gpu_check._inference(gpu_check.CPU, rows, *model, ["tf32"])
    assert "InputError" in rows.pop("bf16, graphs, batch 1")["error"] and "Traceback" in capsys.readouterr().err
    assert gpu_check._failed({"graphs": {"error": "x"}}) and not gpu_check._failed(rows)
    assert len(rows) == 6 and all(row["images_per_second"] > 0 for name, row in rows.items() if "batch" in name)
    monkeypatch.setattr("solov2.models.solov2.use_graphs", lambda model, device: None)
    gpu_check._inference(gpu_check.CPU, rows, *model, [])
    row = rows["bf16, graphs, batch 1"]
    assert row["difference"] == 0 and row["network_ms"] < row["ms"] and row["instances"] == 100


def test_waits_are_counted_by_module() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for module in ("postprocess", "masks", "masks"):
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, f"solov2/{module}.py", 1)
        warnings.warn_explicit("something else", UserWarning, "solov2/masks.py", 1)
    assert gpu_check._by_module(caught) == {"all": 3, "postprocess": 1, "masks": 2}


def test_the_reference_is_timed_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpu_check.PEER:
        monkeypatch.delenv(name, raising=False)
    assert gpu_check._run_here("reference", tmp_path, "cpu") == 0
    assert "--peer" in json.loads((tmp_path / "reference.json").read_text())["reference"]
    (tmp_path / "peer.py").touch()
    calls: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "run", lambda _command, env, **_others: calls.append(env))
    gpu_check.main(["--only", "reference", "--peer", str(tmp_path), sys.executable, "--out", str(tmp_path / "out")])
    for name in gpu_check.PEER:
        monkeypatch.setenv(name, calls[0][name])
    assert gpu_check._run_here("reference", tmp_path, "cpu") == 1  # there is a peer.py, but nothing in it
    assert "no attribute 'build'" in json.loads((tmp_path / "reference.json").read_text())["error"]


@pytest.mark.slow
def test_the_reference_on_a_cpu(tmp_path: Path) -> None:
    if not all(os.environ.get(name) for name in gpu_check.PEER):
        pytest.skip(f"{' and '.join(gpu_check.PEER)} are not both set")
    assert gpu_check._run_here("reference", tmp_path, "cpu") == 0
    found = json.loads((tmp_path / "reference.json").read_text())
    assert found["relative difference of losses"] < 1e-4
    assert found["instances"]["reference"] == found["instances"]["plain"] > 0
    for name in ("network, batch 1", "network, batch 2", "inference, batch 1", "inference, batch 2"):
        assert found[name].keys() == {"reference_ms"} | {
            f"{form}_{unit}" for form in ("plain", "optimized", "bf16") for unit in ("ms", "ratio")
        }
    assert found["training, batch 2"]["plain_ratio"] > 0
