"""What a training run would do, without doing it: `train --dry-run`.

Nothing is written, downloaded or generated, and no other process is started.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from solov2.build import build_assigner, build_compute, build_criterion, construct
from solov2.config import Config, DataConfig, ModelConfig, TrainConfig
from solov2.data.build import require_data, training_dataset, training_loader, with_classes
from solov2.data.categories import default_class_names
from solov2.data.coco import CocoInstances
from solov2.data.loader import TrainBatchSampler
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.ops.resize import padded_size, resized_size
from solov2.training.plan import Plan, announcement, config_text

BATCHES = 4  # of the first epoch that are read
PHOTOGRAPH = (480, 640)  # (height, width) in pixels of the usual COCO image
INSTANCES = 8  # per image, assumed for the memory of the losses
CELLS = 9  # positive cells per instance, the most that one level gives
STATES = {"sgd": 1, "adamw": 2}  # tensors per trainable parameter that the optimizer keeps

Rate = tuple[str, str, float]  # step, epoch, learning rate


def describe(config: Config, *, device: torch.device, processes: int, splits: Sequence[str]) -> None:
    """Print the recipe section by section, each as soon as it is known.

    Args:
        config: resolved; the class count is taken from the training annotations where they exist.
        device: what would be trained on.
        processes: how many would train together; this one is seen as the first of them.
        splits: "train", and "val" where the run would evaluate.

    Raises:
        InputError: a data set that is there but broken, or a configuration that makes no network or no step.
    """
    missing = missing_data(config.data, splits)
    dataset = training_dataset(config.data) if missing_data(config.data, ("train",)) is None else None
    if dataset is not None:
        config = with_classes(config, dataset)
    model = empty_model(config.model)
    images = batches = None
    if dataset is not None:
        images, batches = len(dataset), len(_loader(config, dataset, processes)[1])
    plan = Plan.of(config.train, images=images, batches=batches, processes=processes)

    _print(config_text(config).splitlines())
    _print([*summary(config, plan, model, images=images, device=device), *([missing] if missing else [])])
    _print(rate_lines(config.train, plan))
    _print(photograph_lines(config.data) if dataset is None else batch_lines(config, dataset, processes))
    _print(memory_lines(config, model, device))


def missing_data(data: DataConfig, splits: Sequence[str]) -> str | None:
    """Which file of the splits does not exist and what to do about it, in one line; None where all are there."""
    try:
        require_data(data, splits=splits)
    except InputError as error:
        if not data.shapes:
            return str(error)
        return f"{str(error).partition('. ')[0]}; a run without --dry-run generates the shapes in {data.root}"
    return None


def empty_model(config: ModelConfig) -> SOLOv2:
    """The network without storage.

    Raises:
        InputError: values that no network can be made of.
    """
    with torch.device("meta"):
        return construct(config, default_class_names(config.num_classes))


def summary(config: Config, plan: Plan, model: nn.Module, *, images: int | None, device: torch.device) -> list[str]:
    """Parameters, images, steps, batch and learning rate, in the words of a real run."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in _trainable(model))
    lines = announcement(config, plan, parameters=total, images=images, device=device)
    return [*lines, f"{trainable:,} of the {total:,} parameters are trainable"]


def learning_rates(train: TrainConfig, plan: Plan) -> list[Rate]:
    """The learning rate in the steps where something happens: in the warm-up, around each decay, in the last step.

    A cosine has its quarters instead of decays. Steps and epochs count from 1, as in the log. Without the number of
    steps per epoch only what does not depend on it: the warm-up by step, and the decays of a step schedule by epoch.
    """
    if not plan.steps_per_epoch:
        return _rates_by_epoch(plan)
    total = plan.total_steps
    steps = {*_warmup_steps(train), total - 1}
    if train.schedule == "cosine":
        steps |= {total * quarter // 4 for quarter in (1, 2, 3)}
    else:
        steps |= {epoch * plan.steps_per_epoch + offset for epoch in train.step_epochs for offset in (-1, 0)}
    return [
        (str(step + 1), str(step // plan.steps_per_epoch + 1), plan.rate(step))
        for step in sorted(steps)
        if 0 <= step < total
    ]


def rate_lines(train: TrainConfig, plan: Plan) -> list[str]:
    """`learning_rates` as a table."""
    lines = _table(
        ("step", "epoch", "learning rate"), [(*row[:2], f"{row[2]:g}") for row in learning_rates(train, plan)]
    )
    if plan.steps_per_epoch:
        return lines
    if train.schedule == "cosine":
        return [*lines, "the cosine that follows depends on the steps per epoch, which are unknown without the data"]
    return [*lines, "steps per epoch are unknown without the data; the warm-up is taken to end before the first decay"]


def first_batches(config: Config, dataset: CocoInstances, processes: int) -> list[tuple[int, int, int, int, int]]:
    """(padded height, padded width, images, instances, positive cells) of the first process's first batches."""
    loader, sampler = _loader(config, dataset, processes)
    sampler.set_epoch(0)
    rows = []
    for _, batch in zip(range(BATCHES), loader):
        targets = batch["targets"]
        positive = int((targets["category"] < config.model.num_classes).sum())
        rows.append((*batch["pixels"].shape[2:], len(batch["image_ids"]), len(targets["masks"]), positive))
    return rows


def batch_lines(config: Config, dataset: CocoInstances, processes: int) -> list[str]:
    """`first_batches` as a table."""
    rows = [
        (str(number), f"{height} x {width}", *map(str, counts))
        for number, (height, width, *counts) in enumerate(first_batches(config, dataset, processes), start=1)
    ]
    return _table(("batch", "height x width", "images", "instances", "positive cells"), rows)


def photograph_sizes(data: DataConfig) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """(short edge, landscape size, portrait size): padded (h, w) of a 640 x 480 photograph at every training scale."""

    def padded(size: tuple[int, int], short: int) -> tuple[int, int]:
        return padded_size(resized_size(size, long=data.train_long_edge, short=short))

    return [(short, padded(PHOTOGRAPH, short), padded(PHOTOGRAPH[::-1], short)) for short in data.train_scales]


def photograph_lines(data: DataConfig) -> list[str]:
    """`photograph_sizes` as a table."""
    rows = [
        (str(short), *(f"{height} x {width}" for height, width in sizes)) for short, *sizes in photograph_sizes(data)
    ]
    title = f"padded height x width of a {PHOTOGRAPH[1]} x {PHOTOGRAPH[0]} photograph:"
    return [title, *_table(("scale", "landscape", "portrait"), rows)]


def largest_size(config: Config) -> tuple[int, int]:
    """Largest padded (h, w) of a training batch; a batch of landscape images, where the two differ."""
    long = config.data.train_long_edge
    short = min(long, max(config.data.train_scales))
    # Turned images may share a batch with those that were not.
    return padded_size((long if config.data.dihedral and config.train.batch_size > 1 else short, long))


def memory_lines(config: Config, model: nn.Module, device: torch.device) -> list[str]:
    """Memory of one training step at `largest_size`; the activations are counted by `saved_activation_bytes`."""
    train, size = config.train, largest_size(config)
    trainable = _bytes(_trainable(model))
    states = STATES[train.optimizer] if train.optimizer != "sgd" or train.momentum else 0
    parts = {
        "parameters and buffers": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": trainable,
        f"state of {train.optimizer}": states * trainable,
    }
    try:
        activations = estimate_activation_bytes(config, size, device)
        counted = _mebibytes(activations)
    except Exception as error:  # whatever this torch cannot do without data, the rest of the recipe stays of use
        activations = None
        counted = f"not counted ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    total = sum(parts.values()) + (activations or 0)
    rows = [(name, _mebibytes(count)) for name, count in parts.items()]
    rows += [("activations kept for backward", counted)]
    rows += [("total" if activations is not None else "total without activations", _mebibytes(total))]
    width = max(len(name) for name, _ in rows)
    images = f"{train.batch_size} image{'s' if train.batch_size > 1 else ''}"
    return [
        f"memory of a training step at the largest size, {images} of {size[0]} x {size[1]}, {train.precision}, per "
        "process:",
        *(f"{name:<{width}}  {value}" for name, value in rows),
        f"counted with {INSTANCES} instances of {CELLS} positive cells in every image; the batch, workspaces and "
        "temporary tensors come on top, while the first gradients of a step appear only as activations go",
    ]


def estimate_activation_bytes(config: Config, size: tuple[int, int], device: torch.device) -> int:
    """`saved_activation_bytes` without computing or allocating anything.

    Fake tensors carry the type of the device that they stand for, which autocast asks for; those of the meta device do
    not. Their module is not public, so it is imported where a failure can be told.

    Raises:
        Exception: of any kind, where this torch cannot do it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return saved_activation_bytes(config, size, device)


def saved_activation_bytes(config: Config, size: tuple[int, int], device: torch.device) -> int:
    """Bytes of the storages that forward pass and losses of one batch keep for backward, each counted once.

    Parameters and buffers do not count; their copies in the types of mixed precision do.

    Args:
        config: model, batch size, precision and layout.
        size: padded (height, width) in pixels.
        device: where; it decides which tensors the kernels keep.
    """
    train = config.train
    with device:
        model = construct(config.model, default_class_names(config.model.num_classes)).train()
        pixels = torch.zeros(train.batch_size, 3, *size, dtype=torch.uint8)
        sizes = torch.tensor([size] * train.batch_size)
        targets = assumed_targets(config.model, train.batch_size, size)
    own = {id_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # tensors, not only numbers: a freed storage's identity would be given to another

    def keep(tensor: Tensor) -> None:
        if id_of(tensor) not in own:
            kept.setdefault(id_of(tensor), tensor.detach())

    compute = build_compute(config, device)
    criterion = build_criterion(config.model, mask_weight=train.mask_weight)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):  # there is no backward
        images = compute.images(model, {"pixels": pixels, "sizes": sizes})
        with compute.autocast():
            raw = model(images)
        criterion(raw, targets)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def assumed_targets(config: ModelConfig, images: int, size: tuple[int, int]) -> dict[str, object]:
    """Targets (solov2/targets.py) of `INSTANCES` instances of `CELLS` positive cells in every image, on the current
    device; as to their number and size, not their content.
    """
    cells = sum(side * side for side in config.grid_sizes)
    pairs = torch.arange(images * INSTANCES * CELLS)
    return {
        "category": torch.full((images, cells), config.num_classes),
        "positives": torch.stack([pairs // (INSTANCES * CELLS), pairs % cells, pairs // CELLS], dim=1),
        "masks": torch.zeros(images * INSTANCES, size[0] // 4, size[1] // 4, dtype=torch.uint8),
        "positives_per_image": [INSTANCES * CELLS] * images,
        "instances_per_image": [INSTANCES] * images,
    }


def id_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage, which views share."""
    return tensor.untyped_storage()._cdata


def _rates_by_epoch(plan: Plan) -> list[Rate]:
    train = plan.train
    # Any epoch that is no shorter than the warm-up gives the same rates.
    plan = replace(plan, steps_per_epoch=max(1, train.warmup_steps))
    rows = [(str(step + 1), "1" if step == 0 else "?", plan.rate(step)) for step in _warmup_steps(train)]
    if train.schedule == "cosine":
        return rows
    for epoch in sorted({epoch for epoch in train.step_epochs if 0 < epoch < train.epochs}):
        first = epoch * plan.steps_per_epoch
        rows.append(("last", str(epoch), plan.rate(first - 1)))
        rows.append(("first", str(epoch + 1), plan.rate(first)))
    rows.append(("last", str(train.epochs), plan.rate(plan.total_steps - 1)))
    return rows


def _warmup_steps(train: TrainConfig) -> list[int]:
    """First, middle and last step of the warm-up, counted from 0; the first step where there is none."""
    last = max(0, train.warmup_steps - 1)
    return sorted({0, last // 2, last})


def _loader(config: Config, dataset: CocoInstances, processes: int) -> tuple[DataLoader, TrainBatchSampler]:
    """The first process's loader and sampler of a run of `processes`, loading in this process."""
    config = replace(config, data=replace(config.data, workers=0))
    return training_loader(config, dataset, build_assigner(config.model), processes=processes)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Right-aligned columns, two blanks between them."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (head, *rows)]


def _print(lines: Iterable[str]) -> None:
    """A section and the empty line after it."""
    print("\n".join(lines), end="\n\n", flush=True)
