"""`train --dry-run`: report what a training run would do.

Nothing is downloaded or generated, no process is started, and only pictures are written, if they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from solov2.build import add_auxiliary_head, build_assigner, build_compute, build_criterion, construct
from solov2.compute import select_precision
from solov2.config import Config, DataConfig, ModelConfig, TrainConfig
from solov2.data.build import missing_path, require_data, training_dataset, training_loader, with_classes
from solov2.data.categories import default_class_names
from solov2.data.image_dataset import ImageDataset
from solov2.data.loader import TrainBatchSampler
from solov2.data_check.quick import quick_check
from solov2.errors import InputError, count
from solov2.models.solov2 import SOLOv2
from solov2.ops.resize import padded_size, resized_size
from solov2.outputs import check_outputs, write_picture
from solov2.training.pictures import draw_samples
from solov2.training.plan import Plan, announcement, config_text, hopeless_settings

NUM_BATCHES = 4  # read from the first epoch
NUM_PICTURES = 12  # training samples that are drawn
TYPICAL_SIZE = (480, 640)  # (height, width) of most COCO images, in pixels
INSTANCES_PER_IMAGE = 8  # assumed for the memory of the losses
CELLS_PER_INSTANCE = 9  # positive cells, the maximum for one level
STATE_TENSORS = {"sgd": 1, "adamw": 2}  # that the optimizer keeps per trainable parameter

Rate = tuple[str, str, float]  # step, epoch, learning rate


def describe(
    config: Config,
    *,
    device: torch.device,
    processes: int,
    splits: Sequence[str],
    weights: bool,
    pictures: str | Path | None = None,
) -> Iterator[list[str]]:
    """Yield the sections of the report as lists of lines, each as soon as it is ready.

    Args:
        config: resolved configuration; the number of classes is taken from the training annotations if they exist.
        device: the device to train on.
        processes: number of processes that would train together; the report is that of rank 0.
        splits: "train", and "val" if the run would evaluate.
        weights: whether the run would start from the weights of a file.
        pictures: file for a picture of the first training samples, which may exist; None: no picture.

    Raises:
        InputError: the dataset exists but is broken or too small for one step, or the model settings are invalid;
            there is nothing to draw, or `pictures` is one of the images.
    """
    missing = missing_data(config, splits)
    dataset = training_dataset(config) if missing_data(config, ("train",)) is None else None
    if dataset is None and pictures is not None:
        raise InputError(f"--pictures {pictures} needs the training images, but there is {missing}")
    if dataset is not None:
        config = with_classes(config, dataset)
        names = (folder / name for _, folder, names, _ in dataset.files() for name in names)
        check_outputs([("--pictures", pictures)], overwrite=True, inputs=names if pictures else ())
    model = add_auxiliary_head(empty_model(config.model), config)
    images = batches = None
    if dataset is not None:
        images, batches = len(dataset), len(_loader(config, dataset, processes)[1])
    plan = Plan.of(config.train, images=images, batches=batches, processes=processes)

    yield config_text(config).splitlines()
    yield [*summary(config, plan, model, images=images, device=device), *([missing] if missing else [])]
    yield rate_lines(config.train, plan)
    yield typical_size_lines(config.data) if dataset is None else batch_lines(config, dataset, processes)
    yield memory_lines(config, model, device)
    warnings = hopeless_settings(config, plan, weights=weights)
    warnings += [] if dataset is None else quick_check(dataset, config)
    if warnings:
        yield [f"warning: {text}" for text in warnings]
    if dataset is not None and pictures is not None:
        alone = _without_workers(config)
        sheet = draw_samples(alone, dataset, build_assigner(config.model), processes=processes, count=NUM_PICTURES)
        write_picture(pictures, sheet)
        yield [f"the first training samples are drawn in {pictures}"]


def missing_data(config: Config, splits: Sequence[str]) -> str | None:
    """One line that names a missing file of the splits and says what to do; None if no file is missing."""
    missing, root = missing_path(config.data, splits), config.data.root
    if missing is not None and config.data.shapes:
        return f"no data: {missing[2]} does not exist; a run without --dry-run generates the shapes in {root}"
    try:
        require_data(config, splits=splits)
    except InputError as error:
        return str(error)
    return None


def empty_model(config: ModelConfig) -> SOLOv2:
    """The model on the meta device, that is, without storage.

    Raises:
        InputError: invalid model settings.
    """
    with torch.device("meta"):
        return construct(config, default_class_names(config.num_classes))


def summary(config: Config, plan: Plan, model: nn.Module, *, images: int | None, device: torch.device) -> list[str]:
    """The lines that announce a real run (`plan.announcement`), and the number of trainable parameters."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in _trainable(model))
    lines = announcement(config, plan, parameters=total, images=images, compute=build_compute(config, device))
    return [*lines, f"{trainable:,} of the {total:,} parameters are trainable"]


def learning_rates(train: TrainConfig, plan: Plan) -> list[Rate]:
    """The learning rate at the start, middle and end of the warm-up, around each decay, and in the last step.

    For a cosine schedule, each quarter of the run replaces the decays. Steps and epochs count from 1, as in the log. If
    the number of steps per epoch is unknown, the warm-up is listed by step and the decays of a step schedule by epoch.
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
        return [*lines, "the cosine after the warm-up depends on the steps per epoch, unknown without the data"]
    return [
        *lines,
        "steps per epoch are unknown without the data; the warm-up is assumed to end before the first decay",
    ]


def first_batches(config: Config, dataset: ImageDataset, processes: int) -> list[tuple[int, int, int, int, int]]:
    """(padded height, padded width, images, instances, positive cells) of rank 0's first batches."""
    loader, sampler = _loader(config, dataset, processes)
    sampler.set_epoch(0)
    rows = []
    for _, batch in zip(range(NUM_BATCHES), loader):
        targets = batch["targets"]
        positive = int((targets["category"] < config.model.num_classes).sum())
        rows.append((*batch["pixels"].shape[2:], len(batch["image_ids"]), len(targets["masks"]), positive))
    return rows


def batch_lines(config: Config, dataset: ImageDataset, processes: int) -> list[str]:
    """`first_batches` as a table."""
    rows = [
        (str(number), f"{height} x {width}", *map(str, counts))
        for number, (height, width, *counts) in enumerate(first_batches(config, dataset, processes), start=1)
    ]
    return _table(("batch", "height x width", "images", "instances", "positive cells"), rows)


def typical_sizes(data: DataConfig) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """(short edge, landscape size, portrait size): padded (h, w) of a 640 x 480 image at every training scale."""

    def padded(size: tuple[int, int], short: int) -> tuple[int, int]:
        return padded_size(resized_size(size, long=data.train_long_edge, short=short))

    return [(short, padded(TYPICAL_SIZE, short), padded(TYPICAL_SIZE[::-1], short)) for short in data.train_scales]


def typical_size_lines(data: DataConfig) -> list[str]:
    """`typical_sizes` as a table."""
    rows = [(str(short), *(f"{height} x {width}" for height, width in sizes)) for short, *sizes in typical_sizes(data)]
    title = f"padded height x width of a {TYPICAL_SIZE[1]} x {TYPICAL_SIZE[0]} image:"
    return [title, *_table(("scale", "landscape", "portrait"), rows)]


def max_padded_size(config: Config) -> tuple[int, int]:
    """Maximum padded (h, w) of a training batch, for landscape images."""
    long = config.data.train_long_edge
    short = min(long, max(config.data.train_scales))
    # A batch may mix images that were rotated by 90 degrees with images that were not.
    return padded_size((long if config.data.dihedral and config.train.batch_size > 1 else short, long))


def memory_lines(config: Config, model: nn.Module, device: torch.device) -> list[str]:
    """Estimated memory of one training step at `max_padded_size`; see `saved_activation_bytes` for activations."""
    train, size = config.train, max_padded_size(config)
    trainable = _bytes(_trainable(model))
    states = STATE_TENSORS[train.optimizer] if train.optimizer != "sgd" or train.momentum else 0
    parts = {
        "parameters and buffers": _bytes([*model.parameters(), *model.buffers()]),
        "gradients": trainable,
        f"state of {train.optimizer}": states * trainable,
    }
    try:
        activations = estimate_activation_bytes(config, size, device)
        amount = _mebibytes(activations)
    except Exception as error:  # fake tensors may not support an operation; the rest of the report is still useful
        activations = None
        amount = f"not counted ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    total = sum(parts.values()) + (activations or 0)
    rows = [(name, _mebibytes(count)) for name, count in parts.items()]
    rows += [("activations saved for backward", amount)]
    rows += [("total" if activations is not None else "total without activations", _mebibytes(total))]
    width = max(len(name) for name, _ in rows)
    images, precision = count(train.batch_size, "image"), select_precision(train.precision, device)
    return [
        f"memory of a training step at the maximum size, {images} of {size[0]} x {size[1]}, {precision}, per process:",
        *(f"{name:<{width}}  {value}" for name, value in rows),
        f"assumes {INSTANCES_PER_IMAGE} instances of {CELLS_PER_INSTANCE} positive cells per image; the batch, "
        "workspaces and temporary tensors add to the total, but gradients appear only as activations are freed",
    ]


def estimate_activation_bytes(config: Config, size: tuple[int, int], device: torch.device) -> int:
    """Run `saved_activation_bytes` on fake tensors: nothing is computed or allocated.

    Fake tensors report the type of the device they stand for, which autocast needs; meta tensors do not. Their module
    is private to torch, so it is imported here, where the caller can report a failure.

    Raises:
        Exception: of any kind, if this version of torch does not support it.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return saved_activation_bytes(config, size, device)


def saved_activation_bytes(config: Config, size: tuple[int, int], device: torch.device) -> int:
    """Bytes of the storages that the forward pass and the losses of one batch save for backward, each counted once.

    Parameters and buffers are not counted; their copies in a lower precision are.

    Args:
        config: model, batch size, precision and memory format.
        size: padded (height, width) in pixels.
        device: determines which tensors the kernels save.
    """
    train = config.train
    with device:
        model = construct(config.model, default_class_names(config.model.num_classes))
        model = add_auxiliary_head(model, config).train()
        model.recompute_activations(train.recompute_activations)
        pixels = torch.zeros(train.batch_size, 3, *size, dtype=torch.uint8)
        sizes = torch.tensor([size] * train.batch_size)
        targets = synthetic_targets(config.model, train.batch_size, size, auxiliary=train.semantic_auxiliary > 0)
    own = {storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # keeps the tensors alive, because the id of a freed storage is reused

    def save(tensor: Tensor) -> None:
        if storage_id(tensor) not in own:
            saved.setdefault(storage_id(tensor), tensor.detach())

    compute = build_compute(config, device)
    criterion = build_criterion(config.model, mask_weight=train.mask_weight, semantic_weight=train.semantic_weight)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved):  # backward never runs
        images = compute.images(model, {"pixels": pixels, "sizes": sizes})
        with compute.autocast():
            raw = model(images)
        criterion(raw, targets)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def synthetic_targets(
    config: ModelConfig, images: int, size: tuple[int, int], *, auxiliary: bool = False
) -> dict[str, object]:
    """Targets (see solov2/targets.py) with realistic shapes but meaningless values, on the current device.

    Every image has `INSTANCES_PER_IMAGE` instances with `CELLS_PER_INSTANCE` positive cells each, and a semantic map if
    the model is panoptic or trained with the auxiliary loss.
    """
    cells = sum(side * side for side in config.grid_sizes)
    instances = images * INSTANCES_PER_IMAGE
    positives_per_image = INSTANCES_PER_IMAGE * CELLS_PER_INSTANCE
    positives = torch.arange(images * positives_per_image)
    quarter = (size[0] // 4, size[1] // 4)
    has_map = config.num_stuff > 0 or auxiliary
    semantic = {"semantic": torch.zeros(images, *quarter, dtype=torch.uint8)} if has_map else {}
    return {
        "category": torch.full((images, cells), config.num_classes),
        "positives": torch.stack(
            [positives // positives_per_image, positives % cells, positives // CELLS_PER_INSTANCE], dim=1
        ),
        "masks": torch.zeros(instances, *quarter, dtype=torch.uint8),
        "positives_per_image": [positives_per_image] * images,
        "instances_per_image": [INSTANCES_PER_IMAGE] * images,
        **semantic,
    }


def storage_id(tensor: Tensor) -> int:
    """Identity of a tensor's storage, which its views share."""
    return tensor.untyped_storage()._cdata


def _rates_by_epoch(plan: Plan) -> list[Rate]:
    train = plan.train
    # Every epoch length that is at least the warm-up gives the same rates.
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
    """First, middle and last step of the warm-up, counted from 0; only the first step if there is no warm-up."""
    last = max(0, train.warmup_steps - 1)
    return sorted({0, last // 2, last})


def _loader(config: Config, dataset: ImageDataset, processes: int) -> tuple[DataLoader, TrainBatchSampler]:
    """Rank 0's loader and sampler in a run with this many processes; it loads without workers."""
    return training_loader(_without_workers(config), dataset, build_assigner(config.model), processes=processes)


def _without_workers(config: Config) -> Config:
    return replace(config, data=replace(config.data, workers=0))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Right-aligned columns, separated by two spaces."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (head, *rows)]
