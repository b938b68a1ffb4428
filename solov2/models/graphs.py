"""CUDA graphs: all kernels of a forward pass, recorded once per input size, and launched together."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from solov2.compute import arithmetic_state, has_graphs
from solov2.errors import InputError

MAX_IMAGES = 2  # of a larger batch, the device computes for longer than the host launches: a graph gains nothing
MAX_SIZES = 8  # a graph keeps its input and outputs, about 90 MB for R50 at 800 x 1344
WARM_UPS = 3  # as in torch.cuda.make_graphed_callables

Forward = Callable[[Tensor], Any]


class GraphedForward:
    """The forward pass of a network from CUDA graphs, which `use_graphs` puts in place of `model.forward`.

    An input size is recorded when it comes for the second time, and the `MAX_SIZES` sizes seen last are kept. Recording
    takes several forward passes and waits for the device, so graphs are for inputs of few sizes. Batches of more than
    `MAX_IMAGES`, training mode, enabled gradients, `torch.compile` and `torch.export` use no graph, and neither does a
    copy of the model. Weights may change in place or move, but modules must keep their parameters.

    Args:
        model: its forward pass takes a tensor and returns tensors, in lists and dicts.
        device: of the model, see `solov2.compute.has_graphs`.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._forward = model, model.forward
        self.__code__ = getattr(model.forward, "__code__", None)  # torch.export reads it
        self._weights = list(model.parameters())
        self._graphs: dict[Any, _Graph | None] = {}  # the size seen last comes last; None: seen once
        self._lock = threading.Lock()
        # Graphs share the memory of their intermediate results, so that no two of them may run at once.
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._done: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        """The plain forward pass of the copied model, whose weights no graph knows."""
        return copy.deepcopy(self._forward, memo)

    def __call__(self, images: Tensor) -> Any:
        """What the forward pass returns for images [B, 3, H, W], in memory of its own."""
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or self._model.training
        if plain or not has_graphs(images.device) or len(images) > MAX_IMAGES:
            return self._forward(images)
        with self._lock:
            graph = self._find(images)
            if graph is None:
                return self._forward(images)
            queue = torch.cuda.current_stream(images.device)
            if self._done is not None:
                queue.wait_event(self._done)
            outputs = graph(images)
            self._done = queue.record_event()
            return outputs

    def _find(self, images: Tensor) -> _Graph | None:
        """The graph for these images; None if their size was not among the last ones."""
        weights = tuple(weight.data_ptr() for weight in self._weights)
        key = images.shape, images.stride(), images.dtype, arithmetic_state(images.device), weights
        is_known = key in self._graphs
        graph = self._graphs.pop(key, None)
        if is_known and graph is None:
            graph = _Graph(self._forward, images, self._stream, self._pool)
        self._graphs[key] = graph
        if len(self._graphs) > MAX_SIZES:
            self._graphs.pop(next(iter(self._graphs)))
        return graph


class _Graph:
    """A recorded forward pass, which reads one place in memory and writes to others."""

    def __init__(self, forward: Forward, images: Tensor, stream: torch.cuda.Stream, pool: Any) -> None:
        kind, queue = images.device.type, torch.cuda.current_stream(images.device)
        # Not the caller's autocast: its cache would keep casts of the weights that a graph must make again.
        cast = torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        # Inference mode would make tensors that cannot be written to outside it.
        with torch.inference_mode(False), torch.no_grad(), cast:
            self._input = images.clone()
            stream.wait_stream(queue)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    forward(self._input)
            queue.wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Another thread may be post-processing the previous batch, which an error mode of "global" would not allow.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._outputs = forward(self._input)

    def __call__(self, images: Tensor) -> Any:
        self._input.copy_(images)
        self._graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self._outputs)  # the next replay overwrites the outputs


def use_graphs(model: nn.Module, device: torch.device) -> None:
    """Let a model replay its forward pass from CUDA graphs, in place, see `GraphedForward`.

    Raises:
        InputError: the device has no such graphs.
    """
    if not has_graphs(device):
        raise InputError(f"graphs=True needs CUDA graphs, which {device} does not have; leave it out there")
    model.forward = GraphedForward(model, device)
