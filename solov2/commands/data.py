"""Data sets and loaders of a configuration, for training and for evaluation."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from solov2 import distributed
from solov2.config import Config, DataConfig, InputError, load_config, override_config
from solov2.data.coco import CocoInstances
from solov2.data.loader import Collate, EvalSampler, TrainBatchSampler, build_loader
from solov2.data.shapes import generate_shapes
from solov2.data.transforms import EvalTransform, TrainTransform, TransformedDataset
from solov2.errors import RunFailed, kill_children
from solov2.targets import TargetAssigner

CPU = torch.device("cpu")
FROZEN_SECONDS = 5  # after torch should have said that a loading process is silent
TIMED_OUT = "timed out after"
LOADER_FAILURES = {  # what torch's message contains -> what it means
    TIMED_OUT: "was silent for longer than train.stall_seconds: slow or hanging storage is the usual cause",
    "exited unexpectedly": "ended unexpectedly: memory that ran out is the usual cause, fewer --workers help",
    "is killed by signal": "was killed by a signal: memory that ran out is the usual cause, fewer --workers help",
}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the data lies; they win over the configuration."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder with annotations/, train2017/, val2017/ (default: the configuration's, data/coco)",
    )
    for split in ("train", "val"):
        group.add_argument(f"--{split}-annotations", metavar="FILE", help=f"{split} annotations in COCO's JSON format")
        group.add_argument(f"--{split}-images", metavar="DIR", help=f"folder of the {split} images")
    group.add_argument("--workers", type=int, metavar="N", help="loading processes per process")


def resolve_config(args: argparse.Namespace, flags: dict[str, str]) -> Config:
    """Configuration named on the command line with `--set` and the given flags applied.

    Args:
        args: parsed arguments with `config` (name, path or Config), `set` and those of `add_data_arguments`.
        flags: attribute of `args` -> configuration key; attributes that are None change nothing.

    Raises:
        InputError: name, key or value is wrong.
    """
    config = args.config if isinstance(args.config, Config) else load_config(args.config)
    overrides = {key: getattr(args, flag) for flag, key in flags.items()}
    overrides |= {"data.root": args.data_root, "data.workers": args.workers}
    for key in ("train_annotations", "train_images", "val_annotations", "val_images"):
        path = getattr(args, key)
        if path is None and args.data_root is not None and os.path.isabs(getattr(config.data, key)):
            # A checkpoint remembers the absolute paths it was trained with; another root asks for the files below it.
            overrides[f"data.{key}"] = getattr(DataConfig, key)
            continue
        overrides[f"data.{key}"] = None if path is None else os.path.abspath(path)
    config = override_config(config, args.set)
    return override_config(config, {key: value for key, value in overrides.items() if value is not None})


def prepare_data(config: Config, *, splits: Sequence[str]) -> None:
    """Generate the data set where the configuration says so, then check that the files of the splits are there.

    Raises:
        InputError: a missing data set, or a folder that holds other data.
    """
    data = config.data
    if data.shapes and distributed.is_main():
        written = generate_shapes(
            data.root,
            train_images=data.shapes_train,
            val_images=data.shapes_val,
            size=data.shapes_size,
            seed=data.shapes_seed,
            progress=True,
        )
        if written:
            print(f"generated {data.shapes_train} + {data.shapes_val} images of shapes in {data.root}", flush=True)
    distributed.barrier()
    require_data(data, splits=splits)


def require_data(data: DataConfig, *, splits: Sequence[str]) -> None:
    """Check that annotation file and image folder of each split exist.

    Raises:
        InputError: the sentences say where was looked, how to get COCO, and how to go on without.
    """
    for split in splits:
        for path in split_paths(data, split):
            if not path.exists():
                raise InputError(
                    f"no data: {path} does not exist. "
                    "For COCO, unpack http://images.cocodataset.org/zips/train2017.zip, "
                    ".../zips/val2017.zip and .../annotations/annotations_trainval2017.zip below data/coco or name "
                    "another folder with --data-root; for your own data give --train-annotations, --train-images, "
                    "--val-annotations and --val-images; to see training work without any data, run: python train.py "
                    "configs/quickstart.yaml"
                )


def split_paths(data: DataConfig, split: str) -> tuple[Path, Path]:
    """(annotation file, image folder) of "train" or "val"."""
    root = Path(data.root)
    return root / getattr(data, f"{split}_annotations"), root / getattr(data, f"{split}_images")


def training_dataset(data: DataConfig) -> CocoInstances:
    """The training split, images without instances left out unless the configuration keeps them.

    Raises:
        InputError: files or annotations are broken.
    """
    annotations, images = split_paths(data, "train")
    return CocoInstances(
        annotations,
        images,
        training=True,
        keep_empty=data.keep_empty,
        min_size=data.min_image_size,
        skip_broken_images=data.skip_broken_images,
    )


def validation_dataset(data: DataConfig, split: str = "val") -> CocoInstances:
    """Every image of a split, without its instances.

    Raises:
        InputError: files or annotations are broken.
    """
    annotations, images = split_paths(data, split)
    return CocoInstances(annotations, images, training=False)


def oracle_dataset(data: DataConfig, split: str) -> CocoInstances:
    """Every image of a split with the instances that training would see."""
    annotations, images = split_paths(data, split)
    return CocoInstances(annotations, images, training=True, keep_empty=True, min_size=0)


def training_loader(
    config: Config,
    dataset: CocoInstances,
    assigner: TargetAssigner,
    *,
    device: torch.device = CPU,
    processes: int | None = None,
) -> tuple[DataLoader, TrainBatchSampler]:
    """This process's batches, padded and with targets, and the sampler whose epoch has to be set.

    `device` is where they will go; `processes` is how many share an epoch, default those that are running.
    """
    data, train = config.data, config.train
    transform = TrainTransform(
        scales=data.train_scales,
        max_size=data.train_long_edge,
        flip_probability=data.flip_probability,
        dihedral=data.dihedral,
    )
    sampler = TrainBatchSampler(
        dataset.aspect_ratios,
        batch_size=train.batch_size,
        rank=distributed.rank(),
        world_size=processes or distributed.world_size(),
        seed=train.seed,
    )
    loader = build_loader(
        TransformedDataset(dataset, transform, seed=train.seed),
        batch_sampler=sampler,
        collate=Collate(assigner),
        workers=data.workers,
        timeout=train.stall_seconds,
        pin_memory=device.type != "cpu",
    )
    return loader, sampler


def watched(loader: DataLoader, dataset: CocoInstances) -> Iterator[dict[str, Any]]:
    """The loader's batches; a loading process that is silent or gone is an error that names the images it was at.

    For the main thread, which alone can be told by a signal that it waits in vain.

    Args:
        loader: made by `training_loader` or `validation_loader`.
        dataset: what it loads from.

    Raises:
        RunFailed: the sentence says what usually helps.
    """
    delivered = 0
    try:
        with _losing_patience(loader):
            batches = iter(loader)
        while True:
            with _losing_patience(loader):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            delivered += 1
    except (RuntimeError, TimeoutError) as error:
        reason = next((text for text in LOADER_FAILURES if text in str(error)), None)
        if reason is None:
            raise
        kill_children()
        batch = next(itertools.islice(loader.batch_sampler, delivered, None), [])
        indices = [entry if isinstance(entry, int) else entry[0] for entry in batch]
        names = ", ".join(dataset.file_name(dataset.image_ids[index]) for index in indices)
        raise RunFailed(f"a loading process {LOADER_FAILURES[reason]}; it was at or near the images {names}") from error


@contextlib.contextmanager
def _losing_patience(loader: DataLoader) -> Iterator[None]:
    """Within it, the main thread waits for loading processes no longer than their timeout and a little more.

    torch gives up waiting for a batch by itself, but not for a tensor of one that was already announced, which it
    fetches from the process: a process frozen as a whole (SIGSTOP, a frozen container) never hands it over.

    Raises:
        TimeoutError: it took longer.
    """

    def give_up(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(TIMED_OUT)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, loader.timeout + FROZEN_SECONDS if loader.num_workers else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def validation_loader(
    config: Config,
    dataset: CocoInstances,
    *,
    device: torch.device = CPU,
    batch_size: int = 1,
    assigner: TargetAssigner | None = None,
) -> DataLoader:
    """This process's share of the images at test size; targets only where an assigner is given."""
    long, short = config.model.input_scale
    transformed = TransformedDataset(dataset, EvalTransform(short=short, long=long), seed=0)
    sampler = EvalSampler(len(dataset), rank=distributed.rank(), world_size=distributed.world_size())
    return build_loader(
        transformed,
        sampler=sampler,
        batch_size=batch_size,
        collate=Collate(assigner),
        workers=config.data.workers,
        timeout=config.train.stall_seconds,
        pin_memory=device.type != "cpu",
    )


def with_classes(config: Config, dataset: CocoInstances) -> Config:
    """The configuration with the class count of an annotation file."""
    return replace(config, model=replace(config.model, num_classes=len(dataset.class_names)))
