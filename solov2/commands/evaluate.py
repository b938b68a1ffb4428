"""Evaluate COCO mask AP and box AP of a model: `python eval.py CONFIG --weights FILE`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from solov2.commands.arguments import (
    RUN_FLAGS,
    Parser,
    add_data_arguments,
    add_model_argument,
    add_shared_arguments,
    data_places,
    given,
    model_settings,
    text_stream,
)
from solov2.commands.exit import own_command, run_command
from solov2.commands.screen import show
from solov2.config import Config, parse_overrides
from solov2.errors import InputError
from solov2.outputs import check_outputs, write_json

if TYPE_CHECKING:
    import torch

    from solov2.checkpoint import Checkpoint
    from solov2.data.coco import CocoInstances
    from solov2.evaluation.coco import CocoEvaluator
    from solov2.evaluation.loop import LaunchAndCollect
    from solov2.models.solov2 import SOLOv2
    from solov2.targets import TargetAssigner

LOG = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed, 2 user error, 130 interrupted)."""
    return run_command("eval", build_parser, _run, argv, save_memory="lower --batch-size or use --precision bf16")


def build_parser(typed: str = "solov2 eval") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(prog=typed, description="Evaluate COCO mask AP, and the AP of the boxes around the masks.")
    add_model_argument(parser, default="from the checkpoint")
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="evaluate the training targets themselves: the highest AP that this resolution and these grids allow",
    )
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which images to evaluate")
    add_shared_arguments(parser, "--per-class")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="compute AP with faster-coco-eval (pip install 'solov2[fast]'): faster, and equal to 15 decimals",
    )
    add_shared_arguments(
        parser,
        "--weights",
        "--json",
        "--results",
        *RUN_FLAGS,
        notes={
            "--weights": "required unless --oracle is given; default: none",
            "--batch-size": "default: 1, so that the padding of an image does not depend on others",
            "--workers": "per process; default: from the configuration",
        },
    )
    parser.set_defaults(precision="tf32", batch_size=1)
    add_data_arguments(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2 import distributed
    from solov2.build import build_assigner, build_compute
    from solov2.compute import reuse_freed_memory, select_device
    from solov2.data.build import oracle_dataset, prepare_data, validation_dataset, validation_loader, with_classes
    from solov2.data.watch import watched
    from solov2.evaluation.coco import CocoEvaluator, limit_warning
    from solov2.evaluation.loop import evaluate
    from solov2.evaluation.oracle import Oracle
    from solov2.predict import Predictor
    from solov2.weights import find_checkpoint

    if args.weights is None and not args.oracle:
        raise InputError(
            "give the weights to evaluate: --weights FILE (a checkpoint of this library needs no model name); the data "
            "is expected in data/coco or --data-root"
        )
    outputs = (("--json", args.json), ("--results", args.results))
    check_outputs(outputs, overwrite=args.overwrite, inputs=[args.weights, args.model])
    checkpoint = find_checkpoint(args.weights, args.model)
    config = _configuration(args, checkpoint)
    if args.nproc is not None:
        distributed.relaunch(args.nproc, [*own_command("eval"), *distributed.without_nproc(args.words)], args.device)
    reuse_freed_memory()
    device = select_device(args.device)
    with distributed.process_group(device, timeout=config.train.stall_seconds):
        prepare_data(config, splits=[args.split])
        compute = build_compute(config, device, args.precision)
        if args.oracle or checkpoint is None:
            dataset = oracle_dataset(config.data, args.split)
            config = with_classes(config, dataset)
            category_ids: list[int | None] = [*dataset.category_ids]
            assigner: TargetAssigner | None = build_assigner(config.model)
            settings = config.model.postprocess_settings
            predictor: LaunchAndCollect = Oracle(config.model.grid_sizes, config.model.num_classes, settings)
        else:
            dataset, assigner = validation_dataset(config.data, args.split), None
            model = _model(args, config, checkpoint, device)
            category_ids = _category_ids(model, checkpoint, dataset)
            compute.place(model)
            predictor, settings = Predictor(model, compute), model.settings
        images = (dataset.image_root / image["file_name"] for image in dataset.coco.imgs.values())
        check_outputs(outputs, overwrite=args.overwrite, inputs=[dataset.annotation_file, *images])
        source = None if checkpoint is None else checkpoint.source
        checkpoint = None  # frees its large training state
        warning = limit_warning(dataset.coco, config.data.max_detections, settings.max_instances)
        if warning is not None:
            LOG.warning(warning)
        evaluator = CocoEvaluator(
            dataset.coco,
            category_ids,
            backend="faster-coco-eval" if args.fast else "pycocotools",
            max_detections=config.data.max_detections,
        )
        loader = validation_loader(config, dataset, device=device, batch_size=args.batch_size, assigner=assigner)
        with compute.arithmetic():  # for both threads of the evaluation
            summary = evaluate(
                predictor,
                watched(loader, dataset, stall_seconds=config.train.stall_seconds),
                evaluator,
                overlap=device.type != "cpu",
                progress=len(loader) if distributed.is_main() else None,
                per_class=args.per_class,
            )
        if distributed.is_main():
            _report(summary, evaluator, args, config, source)
    return 0


def _configuration(args: argparse.Namespace, checkpoint: Checkpoint | None) -> Config:
    """The named configuration, or else the checkpoint's, with the flags applied."""
    from solov2.build import resolve_config
    from solov2.data.build import locate_data

    overrides = parse_overrides(args.set) | given(args, {"workers": "data.workers"})
    if args.data_root is not None:  # evaluate what is there: a mistyped folder must not be filled with generated shapes
        overrides = {"data.shapes": False, **overrides}
    config = resolve_config(args.model, checkpoint, overrides)
    return locate_data(config, data_places(args), chosen=overrides)


def _model(args: argparse.Namespace, config: Config, checkpoint: Checkpoint, device: torch.device) -> SOLOv2:
    from solov2.build import build_model

    changes = model_settings(parse_overrides(args.set))
    return build_model(config if args.model else None, weights=checkpoint, device=device, **changes)


def _category_ids(model: SOLOv2, checkpoint: Checkpoint, dataset: CocoInstances) -> list[int | None]:
    """The file's category id of each class of the model: by name, or by position if the checkpoint has no names."""
    from solov2.data.class_matching import can_match, check_categories, match_categories

    if model.class_names == checkpoint.class_names and can_match(model.class_names, dataset.class_names):
        check_categories(model.class_names, dataset, checkpoint.source)
        return match_categories(model.class_names, dataset)
    if len(model.class_names) != len(dataset.class_names):
        raise InputError(
            f"{checkpoint.source} has no class names to match by, and {len(model.class_names)} classes, but "
            f"{dataset.annotation_file} {len(dataset.class_names)}; evaluate on the data it was trained on, or "
            "fine-tune it with train.py --weights"
        )
    return [*dataset.category_ids]


def _report(
    summary: dict[str, Any], evaluator: CocoEvaluator, args: argparse.Namespace, config: Config, source: str | None
) -> None:
    from solov2.evaluation.coco import format_table

    try:
        if args.json is not None:
            content = {
                "config": config.name,
                "weights": source,
                "oracle": args.oracle,
                "split": args.split,
                "images": len(evaluator.images),
                **summary,
            }
            write_json(args.json, content, indent=2)
        if args.results is not None:
            write_json(args.results, evaluator.results())
    finally:  # the figures are not lost with a file that cannot be written
        show(*format_table(summary).split("\n"), file=text_stream(args.json, args.results))
