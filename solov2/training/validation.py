"""The validation of a run: its data, its evaluations, and what is shown of the last one."""

from __future__ import annotations

import logging
from typing import Any

from torch.utils.data import Dataset

from solov2 import distributed
from solov2.config import Config
from solov2.data.build import require_evaluable, validation_dataset, validation_loader
from solov2.data.class_matching import check_categories, match_categories, match_stuff
from solov2.data.coco import CocoInstances
from solov2.data.image_dataset import ImageDataset
from solov2.data.watch import watched
from solov2.evaluation.coco import limit_warning
from solov2.evaluation.loop import evaluate
from solov2.evaluation.picture import draw_predictions
from solov2.evaluation.summary import build_evaluator, flatten, format_table, headline, main_figure
from solov2.outputs import write_picture
from solov2.predict import Predictor
from solov2.training.run import Run
from solov2.training.signals import StopSignal

LOG = logging.getLogger(__name__)


def open_validation(config: Config, dataset: ImageDataset, source: Dataset | None = None) -> ImageDataset | None:
    """The validation set of a run, checked; None if the run does not evaluate.

    Args:
        config: of the run.
        dataset: the training set, whose classes are those of the model.
        source: a user's dataset that has the images.

    Raises:
        InputError: files are missing, annotations are broken, or there is nothing to evaluate.
    """
    if not config.train.evaluate_every:
        return None
    validation = validation_dataset(config, source=source)
    names_from = str(dataset.annotation_file)
    check_categories(dataset.class_names, validation, names_from, stuff_names=dataset.stuff_names)
    require_evaluable(validation)
    if isinstance(validation, CocoInstances):
        warning = limit_warning(validation.coco, config.data.max_detections, config.model.max_instances)
        if warning is not None:
            LOG.warning(warning)
    return validation


def evaluate_run(run: Run, validation: ImageDataset, stop: StopSignal) -> dict[str, Any]:
    """Evaluate the model of a run, log the figures, and save it if it is the best so far; returns the summary.

    Raises:
        Stopped: a signal arrived.
    """
    loader = validation_loader(run.config, validation, device=run.compute.device)
    batches = watched(loader, validation, stall_seconds=run.config.train.stall_seconds, check=stop.check)
    model = run.evaluated_model
    with run.compute.arithmetic():  # for both threads: each of them alone would restore what the other needs
        summary = evaluate(
            Predictor(model, run.compute, panoptic=model.semantic_head is not None),
            stop.until_signaled(batches),  # a checkpoint was saved before
            build_evaluator(
                validation,
                match_categories(model.class_names, validation),
                match_stuff(model.stuff_names, validation),
                max_detections=run.config.data.max_detections,
            ),
            overlap=run.compute.device.type != "cpu",
            progress=len(loader) if distributed.is_main() else None,
        )
    run.evaluated = run.epoch
    limits = {name: summary[name] for name in ("max_detections",) if name in summary}
    step = run.epoch * run.plan.steps_per_epoch
    run.logger.write("evaluation", step, epoch=run.epoch, **limits, **flatten(summary))
    run.stale += 1
    if main_figure(summary) > run.best:
        run.best, run.stale = main_figure(summary), 0
        run.save_best()
    return summary


def show_summary(run: Run, validation: ImageDataset, summary: dict[str, Any]) -> None:
    """Print the table of the last evaluation and, unless `picture_images` is 0, save predictions.png."""
    train, path = run.config.train, run.folder / "predictions.png"
    run.logger.print(format_table(summary))
    if distributed.is_main() and train.picture_images:
        picture = draw_predictions(
            run.evaluated_model, validation, count=train.picture_images, score_threshold=train.picture_score
        )
        write_picture(path, picture)
    shown = f"; predictions beside ground truth in {path}" if train.picture_images else ""
    run.logger.print(f"{headline(summary)}{shown}")
