"""Timing of the network: inference from photographs to masks, and the training step."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from solov2.benchmarking.measure import SEED, Workload, measure
from solov2.benchmarking.roofline import Lap
from solov2.benchmarking.synthetic import calibrate, synthetic_instances, synthetic_raw
from solov2.build import build_assigner, build_criterion, build_model, prepare_for_training
from solov2.errors import InputError
from solov2.models.postprocess import (
    PostprocessSettings,
    final_masks,
    flatten_raw,
    select_candidates,
    suppress,
    suppress_neighbors,
    widen,
)
from solov2.models.solov2 import SOLOv2
from solov2.predict import Predictor
from solov2.training.optim import build_optimizer
from solov2.training.run import wrap
from solov2.training.step import update_weights

PHOTO_EDGE = 640  # long edge (at most) of the photograph that is resized to the input, and masks back to it; as in COCO
LEARNING_RATE = 1e-6  # speed does not depend on it; training on noise at the real rate would diverge


def staged_postprocess(
    raw: dict[str, Any],
    sizes: Tensor,
    original_sizes: Tensor,
    settings: PostprocessSettings,
    lap: Lap,
    mask_format: str = "bool",
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
            kept.cells, kernels[i], features, tuple(size), tuple(original_size), settings.mask_threshold, mask_format
        )
        lap("mask resize")
        results.append({"scores": kept.scores, "labels": kept.labels, "masks": masks, "boxes": boxes})
    return results


class StagedModel:
    """A network as `Predictor` knows it, with a lap after each of its parts.

    Its outputs are dropped for prepared ones, since a network with random weights finds nothing to decode.
    """

    def __init__(self, model: SOLOv2, raw: dict[str, Any], lap: Lap) -> None:
        self.model, self.raw, self.lap = model.eval(), raw, lap

    def eval(self) -> StagedModel:
        """Itself: the network is in evaluation mode already."""
        return self

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """`SOLOv2.normalize`."""
        return self.model.normalize(pixels, sizes)

    def __call__(self, images: Tensor) -> dict[str, Any]:
        """`SOLOv2.forward`, part by part; returns the prepared outputs."""
        model, lap = self.model, self.lap
        lap("preprocess")
        features = model.backbone(images.to(model.backbone.conv1.weight.dtype))
        lap("backbone")
        pyramid = model.fpn(features)
        lap("FPN")
        model.head(pyramid)
        lap("heads")
        model.mask_feature_head(pyramid[:4])
        lap("mask features")
        return self.raw

    def postprocess(
        self, raw: dict[str, Any], sizes: Tensor, original_sizes: Tensor, *, mask_format: str
    ) -> list[dict[str, Any]]:
        """`SOLOv2.postprocess`, step by step."""
        return staged_postprocess(raw, sizes, original_sizes, self.model.settings, self.lap, mask_format)


def network_model(workload: Workload) -> tuple[SOLOv2, Tensor, Tensor]:
    """(model with calibrated random weights, pixels uint8 [B, 3, H, W], sizes int64 [B, 2]), all on the device."""
    torch.manual_seed(SEED)
    height, width = workload.size
    model = build_model(
        workload.config, device=workload.compute.device, input_scale=(max(workload.size), min(workload.size))
    )
    workload.compute.place(model)
    pixels = torch.randint(256, (workload.batch_size, 3, height, width), dtype=torch.uint8)
    batch = workload.compute.move({"pixels": pixels, "sizes": torch.tensor([workload.size] * workload.batch_size)})
    calibrate(model, workload.compute.images(model, batch))
    return model, batch["pixels"], batch["sizes"]


def photo_size(workload: Workload) -> tuple[int, int]:
    """(height, width) of the photographs that inference starts from."""
    scale = min(1, PHOTO_EDGE / max(workload.size))
    height, width = (max(1, round(scale * side)) for side in workload.size)
    return height, width


def measure_inference(workload: Workload) -> dict[str, dict[str, Any]]:
    """From photographs in memory to boolean masks at their size.

    Returns:
        "inference", the model as it is built, and "inference_optimized", what `SOLOv2.optimize` makes of it: the keys
        of `measure` and what was decoded per image.
    """
    model, _, _ = network_model(workload)
    plain = _measure_form(model, workload)
    compute = replace(workload.compute, memory_format=torch.channels_last)
    if compute.precision == "bf16":  # the weights themselves are cast, so there is nothing left for autocast
        optimized, compute = model.optimize(precision="bf16"), replace(compute, precision="float32")
    else:
        optimized = model.optimize()
    return {"inference": plain, "inference_optimized": _measure_form(optimized, replace(workload, compute=compute))}


@torch.no_grad()
def _measure_form(model: SOLOv2, workload: Workload) -> dict[str, Any]:
    compute, shape = workload.compute, photo_size(workload)
    generator = torch.Generator().manual_seed(SEED)
    photos = list(torch.randint(256, (workload.batch_size, *shape, 3), dtype=torch.uint8, generator=generator).numpy())
    images, sizes, original_sizes = model.preprocess(photos)
    with compute.autocast():
        raw = synthetic_raw(model(images), workload.candidates, generator)

    def step(lap: Lap) -> None:
        predictor = Predictor(StagedModel(model, raw, lap), compute, mask_format="bool")
        predictor.launch(model.load_batch(photos))
        predictor.collect()

    report = measure(step, workload)
    results = model.postprocess(raw, sizes, original_sizes)
    return {
        **report,
        "photo_size": list(shape),
        "input_size": list(images.shape[-2:]),
        "candidates_per_image": count_candidates(raw, model.settings.category_threshold) / workload.batch_size,
        "instances_per_image": sum(len(result["scores"]) for result in results) / workload.batch_size,
    }


def count_candidates(raw: dict[str, Any], threshold: float) -> int:
    """(cell, class) pairs of a batch above the threshold after points NMS."""
    return sum(int((suppress_neighbors(widen(level).sigmoid()) > threshold).sum()) for level in raw["category_logits"])


def measure_training(workload: Workload) -> dict[str, dict[str, Any]]:
    """One optimizer step on a batch in memory; `targets` are assigned by the loader's workers in real training.

    Where several processes run, they share gradients by DistributedDataParallel as train.py does.

    Returns:
        "training": `measure`'s keys, the losses, and images_per_second_without_targets.

    Raises:
        InputError: a loss is not finite in this precision.
    """
    model, pixels, sizes = network_model(workload)
    config, compute, generator = workload.config, workload.compute, torch.Generator().manual_seed(SEED)
    model = prepare_for_training(model, config, compute).train()
    network = wrap(model, compute.device)
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
    scaler = compute.scaler()
    instances = [
        synthetic_instances(workload.instances, workload.size, config.model.num_classes, generator)
        for _ in range(workload.batch_size)
    ]
    losses: dict[str, Tensor] = {}

    def step(lap: Lap) -> None:
        targets = assigner(instances, workload.size)
        lap("targets")
        targets = compute.move(targets)
        images = compute.images(model, {"pixels": pixels, "sizes": sizes})
        with compute.autocast():
            raw = network(images)
        lap("forward")
        losses.update(criterion(raw, targets))
        lap("loss")
        scaler.scale(functools.reduce(torch.add, losses.values())).backward()
        lap("backward")
        update_weights(optimizer, scaler, clip_norm=config.train.clip_norm)
        lap("optimizer step")

    report = measure(step, workload)
    values = {name: loss.item() for name, loss in losses.items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise InputError(f"the loss is not finite in {compute.precision} ({values}); use --precision bf16 or float32")
    images = workload.batch_size * report["processes"]
    without_targets = report["slowest_process_ms"] - report["stages"]["targets"]["median_ms"]
    return {"training": {**report, **values, "images_per_second_without_targets": 1000 * images / without_targets}}
