"""The forward pass from CUDA graphs, with a stand-in for the graph that has its semantics on a CPU.

Like a graph, it runs the recorded operations again on the memory that they read and wrote when they were recorded; no
Python of the network runs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers.tiny_models import lively, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solov2.compute import Compute
from solov2.errors import InputError
from solov2.models import graphs
from solov2.models.graphs import MAX_IMAGES, WARM_UPS, GraphedForward, use_graphs
from solov2.models.solov2 import SOLOv2
from solov2.predict import Predictor

CPU = torch.device("cpu")
RECORDING = WARM_UPS + 1  # forward passes


class Graph(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, tensors(outputs)))
        return outputs

    def replay(self) -> None:
        for function, args, kwargs, places in self.steps:
            for place, value in zip(places, tensors(function(*args, **kwargs)), strict=True):
                if place.data_ptr() != value.data_ptr():  # neither a view nor an operation in place
                    place.copy_(value)


class Stream:
    """In place of torch.cuda.Stream: what is queued on it has already run."""

    def __init__(self, device: torch.device) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def record_event(self) -> object:
        EVENTS.append(object())
        return EVENTS[-1]


EVENTS: list[object] = []


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, pools, used = threading.local(), itertools.count(), set()

    def current(device: torch.device) -> Stream:
        return vars(streams).setdefault("stream", Stream(device))

    @contextlib.contextmanager
    def record(graph: Graph, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        used.add((pool, stream))
        assert len(used) == 1, "memory is shared within one pool, recorded on one stream"
        assert stream is not current(CPU) and capture_error_mode == "thread_local"
        with graph:
            yield

    EVENTS.clear()
    monkeypatch.setattr(graphs, "has_graphs", lambda device: True)
    for name, stand_in in {
        "CUDAGraph": Graph, "graph": record, "graph_pool_handle": lambda: next(pools),
        "Stream": Stream, "stream": contextlib.nullcontext, "current_stream": current,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)


class Network(nn.Module):
    """Operations out of place and in place, views, and outputs in lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.layouts: list[bool] = []  # of each forward pass whose Python ran: whether images were channels last

    def forward(self, images: Tensor) -> dict[str, Any]:
        if not torch.compiler.is_compiling():
            self.layouts.append(images.is_contiguous(memory_format=torch.channels_last))
        x = self.first(images).relu_()
        halves = self.second(x).chunk(2, dim=1)
        return {"levels": [half + 1 for half in halves], "features": x[..., ::2]}


@pytest.fixture
def model() -> Network:
    torch.manual_seed(0)
    model = Network().eval()
    use_graphs(model, CPU)
    return model


@pytest.fixture
def instances() -> SOLOv2:
    """A whole network that finds something, without graphs."""
    return lively(tiny_model(input_scale=(96, 64))).eval()


def images(seed: int, height: int = 6, width: int = 8, count: int = 1) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def assert_right(found: dict[str, Any], model: Network, batch: Tensor) -> None:
    """The outputs are those of the plain network."""
    layouts, model.layouts = model.layouts, []
    for mine, wanted in zip(tensors(found), tensors(Network.forward(model, batch)), strict=True):
        assert mine.dtype == wanted.dtype and torch.allclose(mine, wanted, rtol=1e-5, atol=1e-6)
    model.layouts = layouts


def runs(model: Network, batch: Tensor) -> int:
    """How often the network's Python runs for one call, whose outputs are right."""
    model.layouts.clear()
    assert_right(model(batch), model, batch)
    return len(model.layouts)


@torch.no_grad()
def test_the_second_call_records_and_the_next_replay(model: Network) -> None:
    """Every call returns the values of its own images, in memory that no later call overwrites."""
    found, counts = [], []
    for seed in range(5):
        found.append(model(images(seed)))
        counts.append(len(model.layouts))
    assert counts == [1, 1 + RECORDING, 1 + RECORDING, 1 + RECORDING, 1 + RECORDING]
    for seed, result in enumerate(found):
        assert_right(result, model, images(seed))


def test_two_batches_in_flight(instances: SOLOv2) -> None:
    """As in evaluation: the next batch is launched before the last one is collected."""
    pixels = torch.randint(256, (4, 1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = {"sizes": torch.tensor([[64, 96]]), "original_sizes": torch.tensor([[48, 72]])}
    graphed, results = copy.deepcopy(instances), []
    use_graphs(graphed, CPU)
    for network in (instances, graphed):
        predictor = Predictor(network, Compute(CPU), mask_format="bool", max_instances=10)
        predictor.launch({"pixels": pixels[0], **sizes})
        for batch in pixels[1:]:
            predictor.launch({"pixels": batch, **sizes})
            results += predictor.collect()
        results += predictor.collect()
    assert any(vars(graphed.forward)["_graphs"].values())
    for found, wanted in zip(results[4:], results[:4], strict=True):
        assert len(wanted["scores"]) > 3 and torch.allclose(found["scores"], wanted["scores"], atol=1e-5)
        assert torch.equal(found["masks"], wanted["masks"])


@torch.no_grad()
def test_the_last_sizes_are_kept(model: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_SIZES", 2)
    steps = [(4, 1), (4, RECORDING), (6, 1), (6, RECORDING), (4, 0), (8, 1), (8, RECORDING), (4, 0), (6, 1)]
    for seed, (height, wanted) in enumerate(steps):
        assert runs(model, images(seed, height)) == wanted, (seed, height)
    assert len(vars(model.forward)["_graphs"]) == 2


@torch.no_grad()
def test_layout_and_number_of_images(model: Network) -> None:
    """Each has its own graph; channels-last images stay so in it, and large batches have none."""
    for count in (1, MAX_IMAGES, MAX_IMAGES + 1):
        for layout in (torch.contiguous_format, torch.channels_last):
            for seed, wanted in enumerate((1, 1, 1) if count > MAX_IMAGES else (1, RECORDING, 0)):
                assert runs(model, images(seed, count=count).contiguous(memory_format=layout)) == wanted
                assert set(model.layouts) <= {layout == torch.channels_last}


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_weights_may_change_and_move(model: Network, cast: torch.dtype) -> None:
    """Under autocast, too: a graph casts the weights again, and the caller's cache of casts plays no part."""

    def mixed(cache: bool) -> torch.autocast:
        return torch.autocast("cpu", dtype=cast, enabled=cast != torch.float32, cache_enabled=cache)

    with mixed(cache=True):
        for seed in range(3):
            model(images(seed))
    for change in ("in place", "moved"):
        for parameter in model.parameters():
            parameter.mul_(1.5) if change == "in place" else setattr(parameter, "data", 0.5 * parameter)
        model.layouts.clear()
        with mixed(cache=True):
            result = model(images(7))
        assert len(model.layouts) == (change == "moved")
        with mixed(cache=False):
            assert_right(result, model, images(7))


@torch.no_grad()
def test_each_arithmetic_has_its_own_graph(model: Network) -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            for cast in (None, torch.bfloat16, torch.float16):
                for wanted in (1, RECORDING, 0):
                    with torch.autocast("cpu", dtype=cast, enabled=cast is not None):
                        assert runs(model, images(wanted)) == wanted
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_gradients_training_and_compilation_use_no_graph(model: Network) -> None:
    for _ in range(3):
        assert model(images(0))["features"].requires_grad
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        exported = torch.export.export(model, (images(0),)).module()
        for seed in range(3):
            for form in (compiled, exported, model.train()):
                assert_right(form(images(seed)), model, images(seed))
    assert not vars(model.forward)["_graphs"]


def test_inference_mode_and_back(model: Network) -> None:
    with torch.inference_mode():
        assert [runs(model, images(seed)) for seed in range(3)] == [1, RECORDING, 0]
    with torch.no_grad():
        assert runs(model, images(4)) == 0 and not model(images(4))["features"].is_inference()


@torch.no_grad()
def test_a_copy_has_no_graphs(model: Network) -> None:
    for seed in range(3):
        model(images(seed))
    made = copy.deepcopy(model)
    assert made.forward.__self__ is made
    nn.init.zeros_(made.second.weight)
    assert [runs(made, images(seed)) for seed in range(3)] == [1, 1, 1]
    assert runs(model, images(4)) == 0


@torch.no_grad()
def test_threads_take_turns(model: Network) -> None:
    """Graphs share memory: each waits for the last one, which may have been queued elsewhere."""

    @torch.no_grad()
    def predict(seed: int) -> list[dict[str, Any]]:
        return [model(images(seed)) for _ in range(100)]

    with ThreadPoolExecutor(4) as pool:
        for seed, results in enumerate(pool.map(predict, range(4))):
            for result in results:
                assert_right(result, model, images(seed))
    queues = [Stream(CPU), Stream(CPU)]
    for number in range(4):
        queue, last = queues[number % 2], EVENTS[-1]
        torch.cuda.current_stream = lambda device, queue=queue: queue
        model(images(0))
        assert queue.waited[-1] is last and EVENTS[-1] is not last


def test_predict_of_an_optimized_model(instances: SOLOv2) -> None:
    photo = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fast = instances.optimize(graphs=True)
    assert isinstance(fast.forward, GraphedForward) and not isinstance(instances.forward, GraphedForward)
    assert not isinstance(fast.optimize().forward, GraphedForward)
    (wanted,) = instances.optimize().predict(photo, max_instances=9)
    for result in fast.predict([photo] * 4, max_instances=9):
        assert len(wanted["scores"]) > 3 and torch.equal(result["scores"], wanted["scores"])
    with torch.no_grad(), pytest.raises(InputError, match="multiples of 32"):
        fast(images(0, 60))


def test_devices_without_graphs(instances: SOLOv2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(InputError, match="graphs.* cpu "):
        instances.optimize(graphs=True)
    with pytest.raises(ValueError, match="compile=True or graphs=True"):
        instances.optimize(compile=True, graphs=True)
