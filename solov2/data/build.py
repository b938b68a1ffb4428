"""Datasets and data loaders built from a configuration, for training and evaluation."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from solov2 import distributed
from solov2.config import Config, DataConfig, override_config
from solov2.data.annotations import is_file
from solov2.data.coco import CocoInstances
from solov2.data.image_dataset import ImageDataset
from solov2.data.loader import AssignTargets, Collate, EvalSampler, TrainBatchSampler, build_loader
from solov2.data.panoptic import CocoPanoptic
from solov2.data.panoptic_shapes import generate_panoptic_shapes
from solov2.data.recognize import describe_folder
from solov2.data.shapes import generate_shapes
from solov2.data.transforms import EvalTransform, TrainTransform, TransformedDataset
from solov2.errors import InputError, count

LOG = logging.getLogger(__name__)
CPU = torch.device("cpu")
MAX_AUTOMATIC_WORKERS = 8
PATHS = tuple(f"{split}_{kind}" for split in ("train", "val") for kind in ("annotations", "images", "segments"))
ARCHIVES = {False: "annotations_trainval2017.zip", True: "panoptic_annotations_trainval2017.zip"}  # by: is panoptic


def locate_data(
    config: Config, data: str | Path | Mapping[str, str | Path] | None, *, chosen: Iterable[str] = ()
) -> Config:
    """The configuration with its data paths replaced.

    Args:
        config: the configuration to start from.
        data: a folder with annotations/, train2017/ and val2017/, or some of {"root", "train_annotations",
            "train_images", "train_segments", "val_annotations", "val_images", "val_segments"}; None changes nothing.
        chosen: names of settings that the user set explicitly, with or without their section; these are kept.

    Raises:
        InputError: `data` has an unknown key.
    """
    if data is None:
        return config
    paths = dict(data) if isinstance(data, Mapping) else {"root": data}
    unknown = sorted(paths.keys() - {"root", *PATHS})
    if unknown:
        raise InputError(f"data: unknown key '{unknown[0]}'; pass a folder or some of root, {', '.join(PATHS)}")
    overrides = {f"data.{key}": os.path.abspath(paths[key]) for key in PATHS if key in paths}
    if "root" in paths:
        overrides["data.root"] = str(paths["root"])
        # A checkpoint stores the absolute paths of its training data; they must not outlive a change of root.
        kept = {*paths, *(name.rpartition(".")[2] for name in chosen)}
        stale = [key for key in PATHS if key not in kept and os.path.isabs(getattr(config.data, key))]
        overrides |= {f"data.{key}": _default_path(config, key) for key in stale}
    return override_config(config, overrides)


def _default_path(config: Config, key: str) -> str:
    """The default of one of PATHS, for the kind of model."""
    default: str = getattr(DataConfig, key)
    return default.replace("instances_", "panoptic_") if config.model.num_stuff else default


def prepare_data(config: Config, *, splits: Sequence[str]) -> None:
    """Generate the dataset if the configuration asks for it, then check that the files of the splits exist.

    Raises:
        InputError: a file or folder is missing, or the folder for the generated dataset holds other data.
    """
    data = config.data
    if data.shapes and distributed.is_main():
        generate = generate_panoptic_shapes if config.model.num_stuff else generate_shapes
        written = generate(
            data.root,
            train_images=data.shapes_train,
            val_images=data.shapes_val,
            size=data.shapes_size,
            seed=data.shapes_seed,
            progress=True,
        )
        if written:
            LOG.info("generated %d + %d images of shapes in %s", data.shapes_train, data.shapes_val, data.root)
    distributed.barrier()
    require_data(config, splits=splits)


def require_data(config: Config, *, splits: Sequence[str]) -> None:
    """Check that the annotation file and image folder of each split exist.

    Raises:
        InputError: the message names the missing path, says what the data folder holds instead, and what to do.
    """
    missing = missing_path(config.data, splits)
    if missing is not None:
        split, key, path = missing
        what = "validation data" if split == "val" and "train" in splits else "data"
        raise InputError(f"no {what}: {path} does not exist{_advice(config, splits, split, key)}")


def missing_path(data: DataConfig, splits: Sequence[str]) -> tuple[str, str, Path] | None:
    """The first file or folder of the splits that does not exist, as (split, setting, path); None if all exist."""
    for split in splits:
        for kind, path in zip(("annotations", "images"), split_paths(data, split)):
            if not path.exists():
                return split, f"{split}_{kind}", path
    return None


def _advice(config: Config, splits: Sequence[str], split: str, key: str) -> str:
    """What to do about a missing path, as the end of the sentence that names it."""
    data = config.data
    root, flags = Path(data.root), f"--{split}-annotations and --{split}-images"
    if split == "val" and "train" in splits:  # what training needs is there
        return f"; name validation data with {flags}, or train without: --evaluate-every 0"
    if any(getattr(data, name) != _default_path(config, name) for name in PATHS if name.startswith(split)):
        return f"; name it with --{key.replace('_', '-')}"
    if root.is_file():
        return f": {root} is a file; name the folder of the data with --data, or an annotation file with {flags}"
    if root.is_dir() and key.endswith("images"):  # the annotations are there
        return f"; put the images there, or name their folder with --{split}-images"
    if root.is_dir():
        return f"; {describe_folder(root)}"
    if data.root != DataConfig.root:
        return f": there is no folder {root}; name the folder of the data with --data, or use {flags}"
    return (
        ". For COCO, unpack http://images.cocodataset.org/zips/train2017.zip, "
        f".../zips/val2017.zip and .../annotations/{ARCHIVES[config.model.num_stuff > 0]} into data/coco or name "
        "another folder with --data; for your own data use --train-annotations, --train-images, "
        "--val-annotations and --val-images; the models quickstart and quickstart_panoptic generate their own data"
    )


def require_evaluable(validation: ImageDataset) -> None:
    """Check before training that a validation set gives an AP or a PQ and that its images and PNGs exist.

    Raises:
        InputError: no annotation counts in evaluation, or a file is missing.
    """
    without = "train without validation with --evaluate-every 0"
    if not validation.has_ground_truth():
        raise InputError(
            f"{validation.annotation_file} has no annotations to evaluate against (crowds do not count); name another "
            f"file with --val-annotations, or {without}"
        )
    for what, folder, names, flag in validation.files():
        missing = [name for name in names if not is_file(folder / name)]
        if missing:
            raise InputError(
                f"{len(missing):,} of {count(len(names), what)} of {validation.annotation_file} are not in {folder}, "
                f"such as {missing[0]}; name their folder with {flag}, or {without}"
            )


def split_paths(data: DataConfig, split: str) -> tuple[Path, Path]:
    """(annotation file, image folder) of "train" or "val"."""
    root = Path(data.root)
    return root / getattr(data, f"{split}_annotations"), root / getattr(data, f"{split}_images")


def segments_of(data: DataConfig, split: str) -> Path | None:
    """The folder of the PNGs of a split's panoptic annotations, if it is named; None: beside the annotation file."""
    folder = getattr(data, f"{split}_segments")
    return None if folder == "auto" else Path(data.root) / folder


def training_dataset(config: Config, source: Dataset | None = None) -> ImageDataset:
    """The training split; images without anything to learn are left out unless `data.keep_empty` is set.

    It is panoptic if the model is (`model.num_stuff`), like the other two. For an auxiliary semantic loss, samples have
    the regions that it ignores. A user's dataset as `source` has the images in place of a folder.

    Raises:
        InputError: files are missing or annotations are broken.
    """
    data = config.data
    return _open(
        config,
        "train",
        training=True,
        keep_empty=data.keep_empty,
        min_size=data.min_image_size,
        skip_broken_images=data.skip_broken_images,
        ignored=config.train.semantic_auxiliary > 0,
        source=source,
    )


def validation_dataset(config: Config, split: str = "val", source: Dataset | None = None) -> ImageDataset:
    """Every image of a split, without instances; `source` as for `training_dataset`.

    Raises:
        InputError: files are missing or annotations are broken.
    """
    return _open(config, split, training=False, source=source)


def oracle_dataset(config: Config, split: str) -> ImageDataset:
    """Every image of a split, with the instances that training would use.

    Raises:
        InputError: files are missing or annotations are broken.
    """
    return _open(config, split, training=True, keep_empty=True)


def _open(
    config: Config,
    split: str,
    *,
    training: bool,
    keep_empty: bool = False,
    min_size: int = 0,
    skip_broken_images: bool = False,
    ignored: bool = False,
    source: Dataset | None = None,
) -> ImageDataset:
    data = config.data
    annotations, images = split_paths(data, split)
    options: dict[str, Any] = {
        "training": training,
        "keep_empty": keep_empty,
        "min_size": min_size,
        "crowd": data.crowd,
        "skip_broken_images": skip_broken_images,
        "max_pixels": data.max_image_pixels,
        "decode_masks": False,
    }
    if config.model.num_stuff:
        if data.classes:
            raise InputError(
                "data.classes (--classes) does not work with panoptic models; leave it out, or set model.num_stuff to 0"
            )
        return CocoPanoptic(annotations, images, segments=segments_of(data, split), **options)
    return CocoInstances(annotations, images, classes=data.classes, ignored=ignored, source=source, **options)


def training_loader(
    config: Config,
    dataset: ImageDataset,
    assigner: AssignTargets,
    *,
    device: torch.device = CPU,
    processes: int | None = None,
) -> tuple[DataLoader, TrainBatchSampler]:
    """This rank's padded batches with targets, and their sampler, whose epoch the caller has to set.

    `device` is where the batches will go; `processes` is the number of ranks that share an epoch, by default the
    world size.
    """
    data, train = config.data, config.train
    transform = TrainTransform(
        scales=data.train_scales,
        max_size=data.train_long_edge,
        flip_probability=data.flip_probability,
        dihedral=data.dihedral,
        color_jitter=data.color_jitter,
        crop_share=data.crop_share,
        scale_jitter=data.scale_jitter,
    )
    sampler = TrainBatchSampler(
        dataset.aspect_ratios,
        batch_size=train.batch_size,
        rank=distributed.rank(),
        world_size=processes or distributed.world_size(),
        seed=train.seed,
        aspect_groups=data.aspect_groups,
    )
    loader = build_loader(
        TransformedDataset(dataset, transform, seed=train.seed, copy_paste=data.copy_paste),
        batch_sampler=sampler,
        collate=Collate(assigner),
        workers=worker_count(data.workers),
        pin_memory=device.type != "cpu",
    )
    return loader, sampler


def validation_loader(
    config: Config,
    dataset: ImageDataset,
    *,
    device: torch.device = CPU,
    batch_size: int = 1,
    assigner: AssignTargets | None = None,
) -> DataLoader:
    """This rank's share of the images at the test size, with targets only if an assigner is given."""
    long, short = config.model.input_scale
    transformed = TransformedDataset(dataset, EvalTransform(short=short, long=long), seed=0)
    sampler = EvalSampler(len(dataset), rank=distributed.rank(), world_size=distributed.world_size())
    return build_loader(
        transformed,
        sampler=sampler,
        batch_size=batch_size,
        collate=Collate(assigner),
        workers=worker_count(config.data.workers),
        pin_memory=device.type != "cpu",
    )


def worker_count(workers: int | str) -> int:
    """Number of DataLoader workers that `data.workers` stands for, in each process."""
    if isinstance(workers, int):
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_AUTOMATIC_WORKERS, cores // distributed.local_world_size()))


def with_classes(config: Config, dataset: ImageDataset) -> Config:
    """The configuration with `num_classes` and `num_stuff` set to the numbers of classes in the annotation file."""
    num_classes, num_stuff = len(dataset.class_names), len(dataset.stuff_names)
    return replace(config, model=replace(config.model, num_classes=num_classes, num_stuff=num_stuff))
