"""What is measured: inference with `Predictor`, the training step `take_step`, and the training loader."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from solov2.benchmarking.measure import Workload, measure, seconds_of
from solov2.benchmarking.peak import convolution_peak
from solov2.benchmarking.report import format_header, format_part
from solov2.benchmarking.synthetic import calibrate, synthetic_raw, synthetic_sample
from solov2.build import add_auxiliary_head, build_assigner, build_criterion, build_model, prepare_for_training
from solov2.compute import Compute
from solov2.config import override_config
from solov2.data.build import locate_data, training_dataset, training_loader, with_classes
from solov2.data.loader import Collate
from solov2.data.panoptic_shapes import generate_panoptic_shapes
from solov2.data.shapes import generate_shapes
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.predict import Predictor
from solov2.training.environment import environment
from solov2.training.optim import build_optimizer
from solov2.training.run import wrap
from solov2.training.step import take_step

CPU = torch.device("cpu")
MAX_IMAGE_EDGE = 640  # long edge of the original images, as in COCO; masks are resized back to it
LEARNING_RATE = 1e-6  # speed does not depend on it; training on noise at the real rate would diverge
MIN_LOADED_BATCHES = 20  # timed batches: loading one takes only milliseconds
GENERATED_IMAGES = 32
SEED = 0

Parts = Iterator[tuple[str, dict[str, Any]]]


def measure_workload(mode: str, workload: Workload, show: Callable[[str], object]) -> dict[str, Any]:
    """Run the mode "data", "infer", "train" or "all"; `show` is called with each piece of text for people.

    Returns:
        The report. environment: see `solov2.training.environment`. settings: the workload. model: section of the
        configuration. peak: see `convolution_peak`; None for "data". parts: {name: figures of `measure` and its own}.

    Raises:
        InputError: out of memory, non-finite loss, or broken files.
    """
    config, compute = workload.config, workload.compute
    names = ("batch_size", "instances", "candidates", "warmup", "data_root")
    # Loading comes first, since its files may be broken.
    modes = {"data": measure_loading, "infer": measure_inference, "train": measure_training}
    with _explained_memory_errors(config.name):
        # loading has no operations to compare with a peak
        peak = None if mode == "data" else convolution_peak(compute)
        report: dict[str, Any] = {
            "environment": environment(compute.device),
            "settings": {"model": config.name, "mode": mode, "size": [*workload.size], "precision": compute.precision}
            | {name: getattr(workload, name) for name in names},
            "model": config.to_dict()["model"],
            "peak": peak,
            "parts": {},
        }
        show(format_header(report))
        for name, part in chain.from_iterable(modes[key](workload) for key in modes if mode in (key, "all")):
            report["parts"][name] = part
            show(format_part(name, part, peak))
    return report


@contextlib.contextmanager
def _explained_memory_errors(name: str) -> Iterator[None]:
    """Turn out-of-memory errors into an InputError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise InputError(f"{name} does not fit into memory; lower --batch-size or --size") from error


def measure_inference(workload: Workload) -> Parts:
    """From images in memory to masks, and to segments of a panoptic model, as built and after `SOLOv2.optimize`."""
    model, compute = _model(workload), workload.compute
    yield "inference", _measure_predictor(model, workload)
    half = compute.precision == "bf16"  # then the weights themselves are cast, so autocast is not needed
    compute = replace(compute, memory_format=torch.channels_last, precision="float32" if half else compute.precision)
    model = model.optimize(precision="bf16" if half else "float32")
    yield "optimized_inference", _measure_predictor(model, replace(workload, compute=compute))


def _measure_predictor(model: SOLOv2, workload: Workload) -> dict[str, Any]:
    compute, generator = workload.compute, torch.Generator().manual_seed(SEED)
    scale = min(1, MAX_IMAGE_EDGE / max(workload.size))
    shape = (workload.batch_size, *(max(1, round(scale * side)) for side in workload.size), 3)
    originals = list(torch.randint(256, shape, dtype=torch.uint8, generator=generator).numpy())
    panoptic = model.semantic_head is not None
    predictor = Predictor(model, compute, panoptic=panoptic, mask_format="bool")

    def step() -> list[dict[str, Any]]:
        predictor.launch(model.load_batch(originals))
        return predictor.collect()

    with torch.no_grad(), compute.autocast():
        images = compute.images(model, compute.move(model.load_batch(originals)))
        raw = synthetic_raw(model(images), workload.candidates, generator)
    # Random weights find nothing, so synthetic outputs replace those of the network after it has run.
    hook = model.register_forward_hook(lambda *_: raw)
    results = step()
    part = measure(step, workload)
    hook.remove()  # otherwise the copy that `optimize` makes would have it too
    counted = {"instances_per_image": "scores"} | ({"segments_per_image": "segments"} if panoptic else {})
    return part | {name: sum(len(each[key]) for each in results) / len(originals) for name, key in counted.items()}


def measure_training(workload: Workload) -> Parts:
    """An optimizer step on a batch with targets in host memory, as the loader returns it; several processes share
    gradients as in real training.

    Raises:
        InputError: non-finite loss in this precision.
    """
    config, recipe, compute = workload.config, workload.config.train, workload.compute
    model = add_auxiliary_head(_model(workload), config)
    model = prepare_for_training(model, config, compute).train()
    network, scaler, losses = wrap(model, compute.device), compute.scaler(), dict[str, Tensor]()
    semantic_weight = recipe.semantic_auxiliary or recipe.semantic_weight
    criterion = build_criterion(config.model, mask_weight=recipe.mask_weight, semantic_weight=semantic_weight)
    optimizer = build_optimizer(
        model,
        name=recipe.optimizer,
        learning_rate=LEARNING_RATE,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decay_norms=recipe.decay_norms,
    )
    kind = (workload.instances, workload.size, config.model.num_classes, torch.Generator().manual_seed(SEED))
    more = {"semantic": torch.zeros(workload.size, dtype=torch.uint8)} if config.model.num_stuff else {}
    more |= {"ignored": torch.zeros(0, *workload.size, dtype=torch.uint8)} if recipe.semantic_auxiliary else {}
    samples = [synthetic_sample(*kind) | more for _ in range(workload.batch_size)]
    batch = Collate(build_assigner(config.model))(samples)
    if compute.device.type != "cpu":
        batch = tree_map_only(Tensor, Tensor.pin_memory, batch)

    def step() -> None:
        found, _ = take_step(network, criterion, [batch], optimizer, scaler, compute, clip_norm=recipe.clip_norm)
        losses.update(found)

    part = measure(step, workload)
    values = {name: loss.item() for name, loss in losses.items()}
    if not all(map(math.isfinite, values.values())):
        raise InputError(f"the loss is not finite in {compute.precision} ({values}); use --precision bf16 or float32")
    yield "training", part | values


def measure_loading(workload: Workload) -> Parts:
    """Training batches from files, loaded by one thread of this process; worker_images_per_second is for a worker.

    Raises:
        InputError: files are missing or broken.
    """
    workload = replace(workload, compute=Compute(CPU), iterations=max(MIN_LOADED_BATCHES, workload.iterations))
    threads, side = torch.get_num_threads(), min(MAX_IMAGE_EDGE, max(workload.size))
    with tempfile.TemporaryDirectory() as folder:
        if workload.data_root is None:
            generate = generate_panoptic_shapes if workload.config.model.num_stuff else generate_shapes
            generate(folder, train_images=GENERATED_IMAGES, val_images=1, size=side, seed=SEED)
            workload = replace(workload, data_root=folder)
        batches = _batches(workload, workers=1)
        for _ in range(1 + workload.warmup):  # the first batch waits for the worker to start
            next(batches)
        rate = workload.batch_size / seconds_of(lambda: next(batches), CPU, workload.iterations)
        batches.close()
        torch.set_num_threads(1)  # as workers do
        batches = _batches(workload, workers=0)
        part = measure(lambda: next(batches), workload)
        torch.set_num_threads(threads)
    yield "loading", part | {"worker_images_per_second": rate}


def _batches(workload: Workload, *, workers: int) -> Generator[dict[str, Any]]:
    """Batches of the real training loader, epoch after epoch."""
    overrides = {"data.workers": workers, "train.batch_size": workload.batch_size}
    config = override_config(locate_data(workload.config, workload.data_root), overrides)
    dataset = training_dataset(config)
    loader, sampler = training_loader(config, dataset, build_assigner(with_classes(config, dataset).model))
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from loader


def _model(workload: Workload) -> SOLOv2:
    """The model on its device and in its layout, with random weights that keep activations finite."""
    torch.manual_seed(SEED)
    compute, (height, width) = workload.compute, workload.size
    model = build_model(workload.config, device=compute.device, input_scale=(max(height, width), min(height, width)))
    compute.place(model)
    pixels = torch.randint(256, (workload.batch_size, 3, height, width), dtype=torch.uint8)
    sizes = torch.tensor([workload.size] * workload.batch_size)
    calibrate(model, compute.images(model, compute.move({"pixels": pixels, "sizes": sizes})))
    return model
