"""The parts of the benchmark: spans, operations, the peak, synthetic inputs, comparisons and sweeps."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from torch import Tensor, nn
from torch.autograd import DeviceType

from solov2.benchmarking import measure, peak
from solov2.benchmarking.flops import OUTSIDE, count_flops
from solov2.benchmarking.measure import IDLE, profiled_shares, span_times
from solov2.benchmarking.peak import convolution_peak
from solov2.benchmarking.report import compare, format_part, read_report, sweep
from solov2.benchmarking.synthetic import calibrate, ellipses, synthetic_raw, synthetic_sample
from solov2.compute import Compute, span
from solov2.errors import InputError
from solov2.models.layers import DeformConv2d
from solov2.models.postprocess import suppress_neighbors, widen
from solov2.training.environment import git_commit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Graphs compiled in other tests count toward torch's limit per function."""
    torch._dynamo.reset()


def targets_of(graph: torch.fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes)


def test_compiled_and_exported_graphs_contain_no_spans() -> None:
    """The forward pass is one graph without profiler operations; in eager mode, it has them."""
    model, images, graphs = tiny_model().eval(), torch.randn(1, 3, 64, 64), []

    def keep(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        graphs.append(module.graph)
        return module.forward

    # Compile under a profiler, as a user might; dynamo drops profiler operations unless set to capture them.
    running = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with running, torch.no_grad(), torch._dynamo.config.patch(capture_profiler_record_function=True):
        torch.compile(model.forward, backend=keep)(images)
        graphs.append(torch.export.export(model, (images,)).graph)
    assert len(graphs) == 2 and all("conv" in targets_of(graph) for graph in graphs)
    assert not any("profiler" in targets_of(graph) or "record" in targets_of(graph) for graph in graphs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, torch.no_grad():
        model(images)
    assert {"solov2: backbone", "solov2: FPN", "solov2: head"} <= {event.name for event in profiler.events()}


def event(name: str, start: float, end: float, kernels: float = 0.0, **changes: Any) -> SimpleNamespace:
    """A profiler event; times in microseconds."""
    return SimpleNamespace(**{
        "name": name, "device_type": DeviceType.CPU, "self_device_time_total": kernels,
        "is_user_annotation": name.startswith("solov2: "),
        "time_range": SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start), **changes,
    })  # fmt: skip


EVENTS = [  # outer 10-100 with inner 20-50 (twice), then outer again
    event("aten::conv", 52, 60, 5.0),
    event("solov2: inner", 20, 50, 99.0),
    event("solov2: outer", 10, 100),
    event("solov2: inner", 20, 30),
    event("solov2: outer", 100, 110),
    event("Optimizer.step", 12, 90, 99.0, is_user_annotation=True),
    event("aten::mm", 25, 26, 7.0, thread=2),  # as in a backward pass
    event("aten::mm", 35, 200, 1.0),  # a kernel belongs to the span that launched it
    event("solov2: inner", 300, 900, 99.0, device_type=DeviceType.CUDA),  # the same span on the device's timeline
    event("kernel", 300, 400, 99.0, device_type=DeviceType.CUDA),
    event("aten::copy_", 5, 6, 3.0),
]


def test_nested_spans_count_once() -> None:
    assert span_times(EVENTS, on_device=False) == {"outer": 60 + 10, "inner": 20 + 10}
    assert span_times(EVENTS, on_device=True) == {OUTSIDE: 3, "outer": 5, "inner": 7 + 1}
    assert span_times(EVENTS[-1:], on_device=False) == {}


def test_shares_of_wall_time() -> None:
    def step() -> None:
        with span("outer"), torch.profiler.record_function("of torch"):
            torch.ones(1000).sum()
            with span("inner"):
                torch.ones(1000).sum()
        torch.ones(1000).sum()

    shares, seconds = profiled_shares(step, CPU, 2, 1.0)
    assert list(shares) == ["outer", "inner", OUTSIDE] and min(shares.values()) > 0
    assert sum(shares.values()) == pytest.approx(1) and 0 < seconds < 1


def test_shares_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel time per iteration over the time of an unprofiled iteration; the rest is idle time."""
    profile = SimpleNamespace(__enter__=None, events=lambda: EVENTS)
    manager = type("Profile", (), {"__enter__": lambda _: profile, "__exit__": lambda *_: None})
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: manager())
    monkeypatch.setattr(measure, "seconds_of", lambda *_: 0.5)
    shares, seconds = profiled_shares(lambda: None, torch.device("cuda"), 2, 16e-6)
    assert seconds == 0.5 and list(shares) == ["outer", "inner", OUTSIDE, IDLE]
    assert list(shares.values()) == pytest.approx([2.5 / 16, 4 / 16, 1.5 / 16, 8 / 16])
    shares, _ = profiled_shares(lambda: None, torch.device("cuda"), 2, 4e-6)  # concurrent kernels
    assert shares[IDLE] == 0 and sum(shares.values()) == pytest.approx(1)


def test_totals_come_from_unprofiled_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[bool] = []
    monkeypatch.setattr(measure, "seconds_of", lambda step, _device: (step(), len(steps) / 1000)[1])
    monkeypatch.setattr(measure, "profiled_shares", lambda step, _device, count, median: ({"a": median * count}, 0.010))
    workload = SimpleNamespace(compute=SimpleNamespace(device=CPU), iterations=4, warmup=2, batch_size=3)
    part = measure.measure(lambda: steps.append(torch.autograd._profiler_enabled()), workload)  # type: ignore[arg-type]
    assert steps == [True, *[False] * 6]  # one for the operations, two of warm-up, four of 4, 5, 6, 7 ms
    assert part["median_ms"] == pytest.approx(5.5) and part["p90_ms"] == pytest.approx(7)
    assert part["images_per_second"] == part["queued_images_per_second"] == pytest.approx(3 / 0.0055)
    with pytest.MonkeyPatch.context() as patch:  # next to a process that takes twice as long
        patch.setattr(measure.distributed, "all_gather_objects", lambda own: [own, tuple(2 * x for x in own)])
        steps.clear()
        both = measure.measure(lambda: steps.append(False), workload)  # type: ignore[arg-type]
        assert both["images_per_second"] == pytest.approx(2 * 3 / 0.011) and both["median_ms"] == part["median_ms"]
    assert part["profiler_cost"] == pytest.approx(10 / 5.5) and part["profiled_iterations"] == 3
    assert (
        part["stages"]["a"]["ms"] == pytest.approx(5.5 * 0.0165) and part["stages"]["total"]["ms"] == part["median_ms"]
    )


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3, padding=1, bias=False), DeformConv2d(8, 16, 3, padding=1)])
def test_operations_of_forward_and_backward(layer: nn.Module) -> None:
    """2 x outputs x weights per filter; the backward pass takes twice as many if the input needs a gradient."""
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    own = 2 * (2 * 16 * 6 * 5) * (8 * 3 * 3)
    offsets = 2 * (2 * 27 * 6 * 5) * (8 * 3 * 3) if isinstance(layer, DeformConv2d) else 0

    def step() -> None:
        with span("whole"):
            with span("forward"):
                y = layer(x)
            with torch.profiler.record_function("of torch"):
                torch.ones(2, 3) @ torch.ones(3, 4)
                with span("backward"):
                    y.sum().backward()
        torch.ones(2, 3) @ torch.ones(3, 5)

    forward = own + offsets
    assert count_flops(step) == {"forward": forward, "backward": 2 * forward, "whole": 48, OUTSIDE: 60}


@pytest.mark.parametrize(("precision", "layouts"), [("float32", 2), ("bf16", 1)])
def test_peak_is_the_best_convolution(precision: str, layouts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "CONVOLUTIONS", ((3, 8, 16),))
    monkeypatch.setattr(peak, "seconds_of", lambda function, *_: (function(), 0.5)[1])
    found = convolution_peak(Compute(CPU, precision))
    height, width = peak.CONVOLUTION_SIZE
    assert found["gflop_per_second"] == pytest.approx(2 * height * width * 16 * 8 * 9 / 0.5 / 1e9)
    assert found["convolution"].startswith(f"3x3 8->16 on 1 x {height} x {width}")
    assert len(found["convolutions"]) == layouts


def test_commit_is_that_of_the_checkout(repo_root: Path) -> None:
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) >= 12
    if not (repo_root / ".git").exists():
        assert commit is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synthetic_raw_keeps_shapes_types_and_layout(dtype: torch.dtype) -> None:
    like = {
        "category_logits": [torch.zeros(2, 5, size, size, dtype=dtype) for size in (12, 6)],
        "kernels": [torch.zeros(2, 8, size, size, dtype=dtype) for size in (12, 6)],
        "mask_features": torch.zeros(2, 8, 16, 16, dtype=dtype).to(memory_format=torch.channels_last),
        "semantic_logits": torch.zeros(2, 4, 16, 16, dtype=dtype).to(memory_format=torch.channels_last),
    }
    raw = synthetic_raw(like, 40, torch.Generator().manual_seed(0))
    for key in ("category_logits", "kernels"):
        assert [(x.shape, x.dtype) for x in raw[key]] == [(x.shape, x.dtype) for x in like[key]]
    for key in ("mask_features", "semantic_logits"):
        assert (raw[key].stride(), raw[key].dtype) == (like[key].stride(), dtype)
    assert 1 < len(raw["semantic_logits"][0].argmax(0).unique()) <= 4
    assert raw["mask_features"].min() == -8 and 7 < raw["mask_features"].max() <= 8
    scores = [widen(level).sigmoid() for level in raw["category_logits"]]
    assert sum(int((level > 0.1).sum()) for level in scores) == 2 * 40
    assert 2 * 25 <= sum(int((suppress_neighbors(level) > 0.1).sum()) for level in scores) <= 2 * 40
    again = synthetic_raw(like, 40, torch.Generator().manual_seed(0))
    assert torch.equal(raw["mask_features"], again["mask_features"])
    del like["semantic_logits"]
    assert "semantic_logits" not in synthetic_raw(like, 40, torch.Generator().manual_seed(0))


def test_synthetic_ground_truth() -> None:
    sample = synthetic_sample(6, (64, 96), 3, torch.Generator().manual_seed(0))
    assert sample["image"].shape == (3, 64, 96) and sample["original_size"] == (64, 96)
    assert sample["masks"].shape == (6, 64, 96) and sample["masks"].dtype == torch.uint8
    area = sample["masks"].flatten(1).sum(1)
    sides = sample["boxes"][:, 2:] - sample["boxes"][:, :2]
    assert (area > 0).all() and (sides > 0).all() and (area < 64 * 96 / 3).all()
    many = ellipses(200, 64, 96, torch.Generator().manual_seed(0))
    assert (many.amax((1, 2)) > 0.9).all() and (many.amin((1, 2)) < 0).all()


def test_calibrate_sets_the_statistics() -> None:
    model, images = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval(), 5 + 2 * torch.randn(4, 3, 8, 8)
    calibrate(model, images)
    assert not model[0].training and model[0].running_mean.allclose(images.mean((0, 2, 3)))
    assert model[1].running_mean.abs().max() < 1e-5


def report_of(milliseconds: float) -> dict[str, Any]:
    """A report of one part."""
    part = {
        "median_ms": milliseconds, "p90_ms": milliseconds, "images_per_second": 1000 / milliseconds,
        "queued_images_per_second": 1000 / milliseconds,
        "peak_memory_mib": 100.0, "iterations": 3, "profiled_iterations": 3, "profiler_cost": 1.5,
        "stages": {
            "backbone": {"share": 0.6, "ms": 0.6 * milliseconds, "gflop": 0.3},
            "masks": {"share": 0.4, "ms": 0.4 * milliseconds, "gflop": 0.0},
            "total": {"share": 1.0, "ms": milliseconds, "gflop": 0.3},
        },
    }  # fmt: skip
    return {
        "environment": {"threads": 2, "load": 0.1},
        "settings": {"size": [64, 64]},
        "model": {"num_classes": 4},
        "peak": None,
        "parts": {"optimized_inference": part},
    }


def test_rates_are_relative_to_the_peak() -> None:
    part = report_of(10.0)["parts"]["optimized_inference"]
    rows = [line.split() for line in format_part("optimized_inference", part, {"gflop_per_second": 100.0}).splitlines()]
    assert rows[-3:] == [
        ["backbone", "60.0%", "6.00", "0.3", "50.0", "50%"],
        ["masks", "40.0%", "4.00", "-", "-", "-"],
        ["total", "100.0%", "10.00", "0.3", "30.0", "30%"],
    ]


def test_comparison(tmp_path: Path) -> None:
    old, new = report_of(100.0), report_of(50.0)
    new["environment"] |= {"threads": 4, "load": 3.0}
    new["settings"]["size"] = [64, 96]
    new["parts"]["training"] = copy.deepcopy(new["parts"]["optimized_inference"])
    del new["parts"]["optimized_inference"]["stages"]["masks"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    assert [" ".join(line.split()) for line in compare(read_report(str(path)), new).splitlines()] == [
        "warning: threads differs: 2 (old), 4 (new)",
        "warning: size differs: [64, 64] (old), [64, 96] (new)",
        "optimized inference old ms new ms old / new",
        "backbone 60.00 30.00 2.00",
        "total 100.00 50.00 2.00",
        "the old report has no training",
    ]


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"parts": {}}', '{"sweep": "size", "reports": {}}'])
def test_other_files_are_rejected(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(InputError, match=f"^--compare {path} is not "):
        read_report(str(path))


def test_a_sweep_reports_a_failed_value_and_continues() -> None:
    write = f"import json, sys; json.dump({report_of(10.0)}, open(sys.argv[-1], 'w'))"
    fail = "import sys; sys.exit('warning: something\\nerror: it does not fit')"
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    commands = {name: [sys.executable, "-c", code] for name, code in (("8", fail), ("4", kill), ("2", write))}
    shown: list[str] = []
    content = sweep("batch-size", commands, shown.append)
    assert content["sweep"] == "batch-size" and content["reports"]["2"] == report_of(10.0)
    assert [" ".join(row.split()) for row in shown] == [
        "batch-size part ms images/s peak MiB",
        "8 it does not fit",
        "4 ended by signal 9, most likely out of memory",
        "2 optimized inference 10.00 100.00 100",
    ]
