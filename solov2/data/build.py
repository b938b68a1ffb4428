"""Data sets and loaders of a configuration, for training and for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from solov2 import distributed
from solov2.config import Config, DataConfig, override_config
from solov2.data.coco import CocoInstances
from solov2.data.loader import Collate, EvalSampler, TrainBatchSampler, build_loader
from solov2.data.shapes import generate_shapes
from solov2.data.transforms import EvalTransform, TrainTransform, TransformedDataset
from solov2.errors import InputError

CPU = torch.device("cpu")
PATHS = ("train_annotations", "train_images", "val_annotations", "val_images")

AssignTargets = Callable[[list[dict[str, torch.Tensor]], tuple[int, int]], dict[str, Any]]


def locate_data(
    config: Config, data: str | Path | Mapping[str, str | Path] | None, *, chosen: Iterable[str] = ()
) -> Config:
    """The configuration with its data in another place.

    Args:
        config: what to start from.
        data: a folder with annotations/, train2017/ and val2017/, or some of {"root", "train_annotations",
            "train_images", "val_annotations", "val_images"}; None changes nothing.
        chosen: settings that were asked for beside it and therefore stay, with or without their section.

    Raises:
        InputError: another key.
    """
    if data is None:
        return config
    places = dict(data) if isinstance(data, Mapping) else {"root": data}
    unknown = sorted(places.keys() - {"root", *PATHS})
    if unknown:
        raise InputError(f"data: unknown key '{unknown[0]}'; it takes a folder or some of root, {', '.join(PATHS)}")
    overrides = {f"data.{key}": os.path.abspath(places[key]) for key in PATHS if key in places}
    if "root" in places:
        overrides["data.root"] = str(places["root"])
        # A checkpoint remembers the absolute paths it was trained with; another root asks for the files below it.
        kept = {*places, *(name.rpartition(".")[2] for name in chosen)}
        stale = [key for key in PATHS if key not in kept and os.path.isabs(getattr(config.data, key))]
        overrides |= {f"data.{key}": getattr(DataConfig, key) for key in stale}
    return override_config(config, overrides)


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
                    "another folder with --data; training and evaluation take your own data by --train-annotations, "
                    "--train-images, --val-annotations and --val-images; the model quickstart generates its own"
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
    assigner: AssignTargets,
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


def validation_loader(
    config: Config,
    dataset: CocoInstances,
    *,
    device: torch.device = CPU,
    batch_size: int = 1,
    assigner: AssignTargets | None = None,
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
