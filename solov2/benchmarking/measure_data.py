"""Timing of the training pipeline: files to batches with targets."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solov2.benchmarking.measure import SEED, Workload, measure
from solov2.benchmarking.measure_network import PHOTO_EDGE
from solov2.benchmarking.roofline import Lap
from solov2.build import build_assigner
from solov2.config import Config
from solov2.data.build import split_paths, training_loader, with_classes
from solov2.data.coco import CocoInstances, ImageRecord
from solov2.data.shapes import generate_shapes
from solov2.data.transforms import TransformedDataset, seeded_generator

GENERATED_IMAGES = 32


class StagedInstances(CocoInstances):
    """The training split whose reading of an image takes a lap when its pixels are decoded."""

    lap: Lap | None = None

    def _read_image(self, record: ImageRecord) -> Tensor:
        image = super()._read_image(record)
        if self.lap is not None:
            self.lap("decode")
        return image


def measure_loading(workload: Workload, root: Path | None) -> dict[str, dict[str, Any]]:
    """Training batches from files: decoding, masks, augmentation at the configuration's training scales, targets.

    Args:
        workload: the batch size and the iterations, one batch each.
        root: a COCO tree; None generates shapes in a temporary folder.

    Returns:
        "loading": `measure`'s keys of one thread without a worker process, images_per_second_per_worker (through one
        worker process, as in training), images and source.

    Raises:
        InputError: files are missing or broken.
    """
    if root is not None:
        return {"loading": _measure_tree(workload, root, source=str(root))}
    side = min(PHOTO_EDGE, max(workload.size))
    with tempfile.TemporaryDirectory() as folder:
        generate_shapes(folder, train_images=GENERATED_IMAGES, val_images=1, size=side, seed=SEED)
        return {"loading": _measure_tree(workload, Path(folder), source=f"generated shapes of {side} x {side}")}


def _measure_tree(workload: Workload, root: Path, *, source: str) -> dict[str, Any]:
    config = replace(
        workload.config,
        data=replace(workload.config.data, root=str(root), workers=1),
        train=replace(workload.config.train, batch_size=workload.batch_size),
    )
    annotations, images = split_paths(config.data, "train")
    dataset = StagedInstances(
        annotations, images, training=True, keep_empty=config.data.keep_empty, min_size=config.data.min_image_size
    )
    throughput = _worker_throughput(workload, config, dataset)  # first: the worker must not inherit a lap
    return {
        **_stages(workload, config, dataset),
        "images_per_second_per_worker": throughput,
        "images": len(dataset),
        "source": source,
    }


def _worker_throughput(workload: Workload, config: Config, dataset: StagedInstances) -> float:
    """Images per second that one worker process delivers."""
    loader, sampler = training_loader(config, dataset, build_assigner(with_classes(config, dataset).model))

    def batches() -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    stream = batches()
    for _ in range(1 + workload.warmup):  # the first batch waits for the worker to start
        next(stream)
    start = time.perf_counter()
    for _ in range(workload.iterations):
        next(stream)
    return workload.iterations * workload.batch_size / (time.perf_counter() - start)


def _stages(workload: Workload, config: Config, dataset: StagedInstances) -> dict[str, Any]:
    """The same samples in this process, with one thread as workers have."""
    loader, sampler = training_loader(config, dataset, build_assigner(with_classes(config, dataset).model))
    assert isinstance(loader.dataset, TransformedDataset)
    transform, seed = loader.dataset.transform, loader.dataset.seed

    def batches() -> Iterator[list[tuple[int, int, int]]]:
        while True:
            yield from sampler

    stream = batches()

    def step(lap: Lap) -> None:
        dataset.lap = lap
        samples = []
        for index, epoch, position in next(stream):
            sample = dataset[index]
            lap("masks")
            samples.append(transform(sample, seeded_generator(seed, epoch, position)))
            lap("resize and flip")
        loader.collate_fn(samples)
        lap("collate and targets")

    with _one_thread():
        report = measure(step, replace(workload, compute=replace(workload.compute, device=torch.device("cpu"))))
    dataset.lap = None
    return report


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
