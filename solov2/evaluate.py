"""Evaluate a model, or the training targets themselves, on the images of a configuration: what `solov2 eval` runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from solov2 import distributed
from solov2.build import build_assigner, build_model
from solov2.checkpoint import Checkpoint
from solov2.class_rows import restrict_classes
from solov2.compute import Compute
from solov2.config import Config
from solov2.data.annotations import ImageId
from solov2.data.build import oracle_dataset, validation_dataset, validation_loader, with_classes
from solov2.data.class_matching import can_match, check_categories, match_names
from solov2.data.coco import CocoInstances
from solov2.data.image_dataset import ImageDataset
from solov2.data.watch import watched
from solov2.errors import InputError
from solov2.evaluation.coco import CocoEvaluator, limit_warning
from solov2.evaluation.loop import LaunchAndCollect, evaluate
from solov2.evaluation.lvis import LVIS_DETECTIONS
from solov2.evaluation.oracle import Oracle
from solov2.evaluation.panoptic import PanopticEvaluator
from solov2.evaluation.summary import build_evaluator
from solov2.models.solov2 import SOLOv2
from solov2.predict import Predictor
from solov2.targets import TargetAssigner
from solov2.views import ViewPredictor, parse_views

LOG = logging.getLogger(__name__)


@dataclass
class Subject:
    """What is evaluated, and on what.

    Attributes:
        config: with the data.
        dataset: the images to evaluate.
        predictor: the model or the oracle.
        category_ids, stuff_category_ids: the annotation file's category id of each label; None for a class that the
            file lacks.
        assigner: of the oracle's training targets.
        model: None for the oracle.
    """

    config: Config
    dataset: ImageDataset
    predictor: LaunchAndCollect
    category_ids: list[int | None]
    stuff_category_ids: list[int | None]
    assigner: TargetAssigner | None = None
    model: SOLOv2 | None = None


def oracle_subject(config: Config, split: str) -> Subject:
    """The training targets of a split ("val" or "train"), as if a network predicted them exactly.

    Raises:
        InputError: the data cannot be used.
    """
    dataset = oracle_dataset(config, split)
    config = with_classes(config, dataset)
    architecture = config.model
    oracle = Oracle(
        architecture.grid_sizes,
        architecture.num_classes,
        architecture.postprocess_settings,
        num_stuff=architecture.num_stuff,
        panoptic=architecture.panoptic_settings,
    )
    _warn_of_limits(config, dataset, architecture.max_instances)
    return Subject(
        config, dataset, oracle, [*dataset.category_ids], [*dataset.stuff_category_ids], build_assigner(architecture)
    )


def model_subject(
    checkpoint: Checkpoint,
    config: Config,
    split: str,
    compute: Compute,
    *,
    named: bool = False,
    changes: Mapping[str, Any] | None = None,
    views: str | None = None,
) -> Subject:
    """A trained model with the images of a split ("val" or "train"), whose classes are matched by name.

    Args:
        checkpoint: of any family.
        config: its own or a named one, with the data.
        split: "val" or "train".
        compute: where and how to compute.
        named: whether the model is built as `config` says, and not as the checkpoint does.
        changes: model settings, as `solov2.build.build_model` takes them.
        views: test-time augmentation, as `solov2.views.parse_views` takes it; None for none.

    Raises:
        InputError: the data cannot be used, or its classes or the configuration do not suit the checkpoint.
    """
    dataset = validation_dataset(config, split)
    model = build_model(config if named else None, weights=checkpoint, device=compute.device, **(changes or {}))
    if config.data.classes:
        restrict_classes(model, config.data.classes, checkpoint.source)
    ids, stuff_ids = _category_ids(model, checkpoint, dataset)
    compute.place(model)
    single = Predictor(model, compute, panoptic=model.semantic_head is not None)
    predictor = single if views is None else ViewPredictor(single, parse_views(views))
    _warn_of_limits(config, dataset, model.settings.max_instances)
    return Subject(config, dataset, predictor, ids, stuff_ids, model=model)


def evaluate_subject(
    subject: Subject,
    compute: Compute,
    *,
    batch_size: int = 1,
    backend: str = "pycocotools",
    boundary: bool = False,
    lvis: bool = False,
    per_class: bool = False,
    write: Callable[[Sequence[ImageId], Sequence[Mapping[str, Any]]], None] | None = None,
) -> tuple[CocoEvaluator | PanopticEvaluator, dict[str, Any]]:
    """Predict this process' share of the images and compare with the annotations.

    Args:
        subject: what is evaluated.
        compute: where and how to compute.
        batch_size: images per batch.
        backend, boundary, lvis: of `solov2.evaluation.coco.CocoEvaluator`.
        per_class: add the figures of each class.
        write: called with the image ids and results of each batch.

    Returns:
        The evaluator, which holds all results on rank 0, and its summary, the same on every rank.
    """
    config, dataset, device = subject.config, subject.dataset, compute.device
    limit = 0 if subject.model is None else subject.model.settings.max_instances
    if lvis and 0 < limit < LVIS_DETECTIONS:
        LOG.warning(
            f"LVIS counts {LVIS_DETECTIONS} instances per image, but the model gives {limit} at most: "
            f"--set model.max_instances={LVIS_DETECTIONS}"
        )
    evaluator = build_evaluator(
        dataset,
        subject.category_ids,
        subject.stuff_category_ids,
        backend=backend,
        boundary=boundary,
        lvis=lvis,
        max_detections=config.data.max_detections,
    )
    loader = validation_loader(config, dataset, device=device, batch_size=batch_size, assigner=subject.assigner)
    with compute.arithmetic():  # for both threads of the evaluation
        summary = evaluate(
            subject.predictor,
            watched(loader, dataset, stall_seconds=config.train.stall_seconds),
            evaluator,
            overlap=device.type != "cpu",
            progress=len(loader) if distributed.is_main() else None,
            per_class=per_class,
            write=write,
        )
    return evaluator, summary


def _warn_of_limits(config: Config, dataset: ImageDataset, max_instances: int) -> None:
    if isinstance(dataset, CocoInstances):
        warning = limit_warning(dataset.coco, config.data.max_detections, max_instances)
        if warning is not None:
            LOG.warning(warning)


def _category_ids(
    model: SOLOv2, checkpoint: Checkpoint, dataset: ImageDataset
) -> tuple[list[int | None], list[int | None]]:
    """The file's category id of each class of the model, and of its stuff: by name, or by position if the checkpoint
    has no names.
    """
    stored = checkpoint.class_names and [name for name in checkpoint.class_names if name in model.class_names]
    groups = (
        (model.class_names, stored, dataset.class_names, dataset.category_ids, "classes"),
        (model.stuff_names, checkpoint.stuff_names, dataset.stuff_names, dataset.stuff_category_ids, "stuff classes"),
    )
    known, ids = [], list[list[int | None]]()
    for names, known_names, found, category_ids, what in groups:
        if names == known_names and can_match(names, found):
            known.append(names)
            ids.append([None if i is None else category_ids[i] for i in match_names(names, found)])
        elif len(names) == len(found):
            known.append(found)
            ids.append([*category_ids])
        else:
            raise InputError(
                f"{checkpoint.source} has no class names to match by, and {len(names)} {what}, but "
                f"{dataset.annotation_file} {len(found)}; evaluate on the data it was trained on, or "
                "fine-tune it with train.py --weights"
            )
    check_categories(known[0], dataset, checkpoint.source, stuff_names=known[1])
    return ids[0], ids[1]
