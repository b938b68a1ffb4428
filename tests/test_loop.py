"""The evaluation loop and the predictor: overlap of launch and collect, errors, and bit-identical results."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import pytest
import torch
from helpers.tiny_runs import random_batch, tiny_config

from solov2.build import construct
from solov2.compute import Compute
from solov2.evaluation.loop import evaluate
from solov2.predict import Predictor


class Collector:
    """An evaluator that stores its inputs in order."""

    def __init__(self) -> None:
        self.predictions: list[Any] = []

    def update(self, image_ids: list[int], results: list[Any]) -> None:
        self.predictions.append((image_ids, results))

    def merge(self, shares: list[Any]) -> None:
        assert shares == [self.predictions]

    def summarize(self, *, per_class: bool) -> dict[str, Any]:
        return {"images": [image_id for image_ids, _ in self.predictions for image_id in image_ids]}


class Halves:
    """A predictor made of two functions."""

    def __init__(self, launch, collect) -> None:
        self.launch, self.collect = launch, collect


@pytest.mark.parametrize("count", [0, 1, 4])
def test_results_are_collected_while_the_next_batch_is_computed(count):
    batches = [{"image_ids": [number]} for number in range(count)]
    computed = [threading.Event() for _ in batches]
    unfinished, waiting = threading.Semaphore(2), deque()

    def launch(batch):
        (number,) = batch["image_ids"]
        assert unfinished.acquire(blocking=False)  # never more than two batches in flight
        waiting.append(number)
        computed[number].set()

    def collect():
        number = waiting.popleft()
        if number + 1 < count:
            assert computed[number + 1].wait(20)  # never set without overlap
        unfinished.release()
        return [number]

    collector = Collector()
    assert evaluate(Halves(launch, collect), batches, collector, overlap=True) == {"images": list(range(count))}
    assert collector.predictions == [([number], [number]) for number in range(count)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_errors_in_collect_end_the_evaluation(overlap, broken):
    waiting = deque()

    def collect():
        if waiting.popleft() == {"image_ids": [broken]}:
            raise ArithmeticError(f"batch {broken}")
        return [0]

    batches = [{"image_ids": [number]} for number in range(3)]
    with pytest.raises(ArithmeticError, match=f"batch {broken}"):
        evaluate(Halves(waiting.append, collect), batches, Collector(), overlap=overlap)


def test_overlap_changes_no_bit():
    config = tiny_config()
    torch.manual_seed(0)
    model = construct(config.model, list("abcd"))
    torch.nn.init.zeros_(model.head.category_predictor.bias)  # scores around 0.5
    predictor = Predictor(model, Compute(torch.device("cpu")))
    batches, found = [random_batch(config, seed=seed) for seed in range(3)], []
    for overlap in (False, True):
        collector = Collector()
        evaluate(predictor, batches, collector, overlap=overlap)
        found.append([result for _, results in collector.predictions for result in results])
    assert sum(len(result["scores"]) for result in found[0]) > 0
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys() and one["masks"] == other["masks"]
        assert all(torch.equal(one[key], other[key]) for key in ("scores", "labels", "boxes"))


def test_gradients_are_disabled_in_both_halves():
    class Model(torch.nn.Module):
        def normalize(self, pixels, sizes):
            return pixels

        def forward(self, images):
            assert not torch.is_grad_enabled() and not self.training
            return images

        def postprocess(self, raw, sizes, original_sizes, *, mask_format, max_instances):
            assert not torch.is_grad_enabled()
            return [(mask_format, max_instances)]

    predictor = Predictor(Model().train(), Compute(torch.device("cpu")), max_instances=3)
    predictor.launch(random_batch(tiny_config(), seed=0))
    assert predictor.collect() == [("rle", 3)]
