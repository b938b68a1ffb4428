"""Timing of inference, training and data loading, stage by stage, on the inputs of `solov2.commands.synthetic`."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solov2.build import build_assigner, build_criterion, build_model, choose_memory_format
from solov2.commands.data import training_dataset, training_loader, with_classes
from solov2.commands.synthetic import calibrate, synthetic_instances, synthetic_raw
from solov2.config import Config, InputError
from solov2.engine import autocast, to_device
from solov2.models.postprocess import (
    PostprocessSettings,
    final_masks,
    flatten_raw,
    select_candidates,
    suppress,
    suppress_neighbours,
    widen,
)
from solov2.models.solov2 import SOLOv2
from solov2.optim import build_optimizer

PHOTO_EDGE = 640  # long edge (at most) of the photograph that is resized to the input, and masks back to it; as in COCO
LEARNING_RATE = 1e-6  # speed does not depend on it; training on noise at the real rate would diverge
PERCENTILE = 0.9
SEED = 0

Lap = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """What is measured: a model configuration, input (height, width) in pixels, and how often."""

    config: Config
    size: tuple[int, int]
    device: torch.device
    batch_size: int
    precision: str
    warmup: int
    iterations: int
    instances: int
    candidates: int

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout that the configuration trains and evaluates with."""
        return choose_memory_format(self.config, self.device)


class Stopwatch:
    """Seconds of named stages and of their `total`. With `split` every stage waits for the device, so that it pays for
    its own work; without, only the total is taken.
    """

    def __init__(self, device: torch.device, *, split: bool) -> None:
        self.device, self.split = device, split
        self.samples: dict[str, list[float]] = {}

    def start(self) -> None:
        """Begin an iteration."""
        self._current: dict[str, float] = {}
        self._begin = self._last = self._now()

    def lap(self, stage: str) -> None:
        """End a stage; a stage may come several times in an iteration."""
        if self.split:
            now = self._now()
            self._current[stage] = self._current.get(stage, 0.0) + now - self._last
            self._last = now

    def finish(self) -> None:
        """End the iteration."""
        self._current["total"] = self._now() - self._begin
        for stage, seconds in self._current.items():
            self.samples.setdefault(stage, []).append(seconds)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def measure(step: Callable[[Lap], None], workload: Workload) -> dict[str, Any]:
    """Time `step` stage by stage and, on an accelerator, in turn with that as a whole without the waits in between.

    Returns:
        stages: {name: {median_ms, p90_ms}} with `total` last; sum_of_stages_ms; images_per_second of the total;
        peak_memory_mib (of the device; on a CPU the resident memory of the process so far).
    """
    on_cpu = workload.device.type == "cpu"
    watches = [Stopwatch(workload.device, split=split) for split in ((True,) if on_cpu else (True, False))]
    if not on_cpu:
        torch.accelerator.reset_peak_memory_stats(workload.device)
    for iteration in range(workload.warmup + workload.iterations):
        for watch in watches:
            if iteration == workload.warmup:
                watch.samples = {}
            watch.start()
            step(watch.lap)
            watch.finish()
    stages = {name: milliseconds(samples) for name, samples in (watches[0].samples | watches[-1].samples).items()}
    total = stages["total"]["median_ms"]
    return {
        "stages": stages,
        "sum_of_stages_ms": sum(stage["median_ms"] for stage in stages.values()) - total,
        "images_per_second": 1000 * workload.batch_size / total,
        "peak_memory_mib": peak_memory(workload.device),
    }


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 90th percentile (the nearest sample at or above it)."""
    ordered = sorted(seconds)
    rank = min(len(ordered) - 1, int(PERCENTILE * len(ordered)))
    return {"median_ms": 1000 * statistics.median(ordered), "p90_ms": 1000 * ordered[rank]}


def peak_memory(device: torch.device) -> float | None:
    """MiB: tensors on an accelerator since the last reset, else resident memory of the process; None where unknown."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def staged_postprocess(
    raw: dict[str, Any], sizes: Tensor, original_sizes: Tensor, settings: PostprocessSettings, lap: Lap
) -> list[dict[str, Any]]:
    """The steps of `solov2.models.postprocess.postprocess` with a lap after each; a test compares the results."""
    category_scores, kernels, area_thresholds = flatten_raw(raw, settings)
    results = []
    for i, (size, original_size) in enumerate(zip(sizes.tolist(), original_sizes.tolist(), strict=True)):
        features = widen(raw["mask_features"][i])
        candidates = select_candidates(category_scores[i], kernels[i], features, area_thresholds, settings)
        lap("dynamic masks")
        kept = suppress(candidates, settings)
        lap("matrix NMS")
        masks, boxes = final_masks(
            kept.cells, kernels[i], features, tuple(size), tuple(original_size), settings.mask_threshold, "bool"
        )
        lap("mask resize")
        results.append({"scores": kept.scores, "labels": kept.labels, "masks": masks, "boxes": boxes})
    return results


def network_model(workload: Workload) -> tuple[SOLOv2, Tensor, Tensor]:
    """(model with calibrated random weights, pixels uint8 [B, 3, H, W], sizes int64 [B, 2]), all on the device."""
    torch.manual_seed(SEED)
    height, width = workload.size
    model = build_model(workload.config, device=workload.device, input_scale=(max(workload.size), min(workload.size)))
    model = model.to(memory_format=workload.memory_format)
    pixels = torch.randint(256, (workload.batch_size, 3, height, width), dtype=torch.uint8).to(workload.device)
    sizes = torch.tensor([workload.size] * workload.batch_size, device=workload.device)
    calibrate(model, model.normalize(pixels, sizes).contiguous(memory_format=workload.memory_format))
    return model, pixels, sizes


@torch.no_grad()
def measure_inference(workload: Workload) -> dict[str, Any]:
    """From photographs in memory to boolean masks at their size; `measure`'s keys and what was decoded per image."""
    model, _, _ = network_model(workload)
    scale = min(1, PHOTO_EDGE / max(workload.size))
    shape = [max(1, round(scale * side)) for side in workload.size]
    photos = list(torch.randint(256, (workload.batch_size, *shape, 3), dtype=torch.uint8).numpy())
    images, sizes, original_sizes = model.preprocess(photos)
    with autocast(workload.device, workload.precision):
        raw = synthetic_raw(model(images), workload.candidates, torch.Generator().manual_seed(SEED))

    def step(lap: Lap) -> None:
        images, sizes, original_sizes = model.preprocess(photos)
        images = images.contiguous(memory_format=workload.memory_format)
        lap("preprocess")
        with autocast(workload.device, workload.precision):
            features = model.backbone(images)
            lap("backbone")
            pyramid = model.fpn(features)
            lap("FPN")
            model.head(pyramid)
            lap("heads")
            model.mask_feature_head(pyramid[:4])
            lap("mask features")
        staged_postprocess(raw, sizes, original_sizes, model.settings, lap)

    report = measure(step, workload)
    results = model.postprocess(raw, sizes, original_sizes)
    return {
        **report,
        "photo_size": shape,
        "input_size": list(images.shape[-2:]),
        "candidates_per_image": count_candidates(raw, model.settings.category_threshold) / workload.batch_size,
        "instances_per_image": sum(len(result["scores"]) for result in results) / workload.batch_size,
    }


def count_candidates(raw: dict[str, Any], threshold: float) -> int:
    """(cell, class) pairs of a batch above the threshold after points NMS."""
    return sum(int((suppress_neighbours(widen(level).sigmoid()) > threshold).sum()) for level in raw["category_logits"])


def measure_training(workload: Workload) -> dict[str, Any]:
    """One optimiser step on a batch in memory; `targets` are assigned by the loader's workers in real training.

    Returns:
        `measure`'s keys, the losses, and images_per_second_without_targets.
    """
    model, pixels, sizes = network_model(workload)
    config, generator = workload.config, torch.Generator().manual_seed(SEED)
    model.train()
    assigner = build_assigner(config.model)
    criterion = build_criterion(config.model, mask_weight=config.train.mask_weight)
    optimizer = build_optimizer(
        model,
        name=config.train.optimizer,
        learning_rate=LEARNING_RATE,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
        decay_norms=config.train.decay_norms,
    )
    scaler = torch.amp.GradScaler(workload.device.type, enabled=workload.precision == "fp16")
    instances = [
        synthetic_instances(workload.instances, workload.size, config.model.num_classes, generator)
        for _ in range(workload.batch_size)
    ]
    losses: dict[str, Tensor] = {}

    def step(lap: Lap) -> None:
        targets = assigner(instances, workload.size)
        lap("targets")
        targets = to_device(targets, workload.device)
        images = model.normalize(pixels, sizes).contiguous(memory_format=workload.memory_format)
        with autocast(workload.device, workload.precision):
            raw = model(images)
        lap("forward")
        losses.update(criterion(raw, targets))
        lap("loss")
        scaler.scale(sum(losses.values())).backward()
        lap("backward")
        if config.train.clip_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        lap("optimiser step")

    report = measure(step, workload)
    values = {name: loss.item() for name, loss in losses.items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise InputError(f"the loss is not finite in {workload.precision} ({values}); use --precision bf16 or float32")
    without_targets = report["stages"]["total"]["median_ms"] - report["stages"]["targets"]["median_ms"]
    return {**report, **values, "images_per_second_without_targets": 1000 * workload.batch_size / without_targets}


def measure_loading(workload: Workload, root: Path) -> dict[str, Any]:
    """Training batches from real files by one worker process: decoding, augmentation, padding, target assignment."""
    config = replace(
        workload.config,
        data=replace(workload.config.data, root=str(root), workers=1),
        train=replace(workload.config.train, batch_size=workload.batch_size),
    )
    dataset = training_dataset(config.data)
    loader, _ = training_loader(config, dataset, build_assigner(with_classes(config, dataset).model))

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            yield from loader

    stream = batches()
    for _ in range(1 + workload.warmup):  # the first batch waits for the worker to start
        next(stream)
    start = time.perf_counter()
    for _ in range(workload.iterations):
        next(stream)
    seconds = time.perf_counter() - start
    return {"images_per_second_per_worker": workload.iterations * workload.batch_size / seconds, "images": len(dataset)}
