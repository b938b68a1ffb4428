"""COCO mask AP and box AP of a model: `python eval.py CONFIG --weights FILE`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from solov2 import distributed
from solov2.build import build_assigner, build_model, choose_memory_format, construct, default_class_names, find_weights
from solov2.checkpoint import is_own, load_file
from solov2.commands.data import (
    add_data_arguments,
    oracle_dataset,
    prepare_data,
    resolve_config,
    validation_dataset,
    validation_loader,
    watched,
    with_classes,
)
from solov2.commands.run import class_difference
from solov2.config import Config, InputError
from solov2.data.coco import CocoInstances
from solov2.engine import Predictor, evaluate, predictor
from solov2.errors import run_command
from solov2.evaluation.coco import CocoEvaluator, format_table
from solov2.evaluation.oracle import oracle_raw
from solov2.models.postprocess import postprocess
from solov2.outputs import check_output, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed, 2 a user's mistake, 130 interrupted)."""
    return run_command(_run, argv)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of eval.py."""
    parser = argparse.ArgumentParser(prog="eval.py", description="COCO mask AP, and box AP from the masks.")
    parser.add_argument(
        "config", nargs="?", help="model name or YAML file; may be left out for a checkpoint of train.py"
    )
    parser.add_argument("--weights", metavar="FILE", help="checkpoint to evaluate; official: the published one")
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="evaluate the training targets themselves: the AP this resolution and these grids allow",
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="processes on this machine, one per GPU")
    parser.add_argument("--device", help="e.g. cpu (default: the accelerator, if there is one)")
    parser.add_argument("--precision", choices=("float32", "bf16", "fp16"), default="float32")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        help="images per forward pass (default 1, at which an image has its own padding)",
    )
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which images to evaluate")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="compute the figures by faster-coco-eval (pip install 'solov2[fast]'): the same to 15 decimals, sooner",
    )
    parser.add_argument("--per-class", action="store_true", help="AP of each class too")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    parser.add_argument("--results", metavar="FILE", help="write the instances in COCO results format")
    parser.add_argument("--overwrite", action="store_true", help="replace these files of an earlier run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any entry of the configuration, e.g. model.score_threshold=0.01",
    )
    add_data_arguments(parser)
    return parser.parse_args(argv)


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    if args.weights is None and not args.oracle:
        raise InputError(
            "name the weights to evaluate: python eval.py solov2_r50_fpn_1x --weights FILE (a checkpoint of "
            "train.py needs no model name); the data is looked for in data/coco or --data-root"
        )
    args.weights = find_weights(args.weights, args.config)
    if args.nproc is not None:
        distributed.relaunch(args.nproc, [sys.argv[0], *distributed.without_nproc(argv)], args.device)
    check_output(args.json, "--json", overwrite=args.overwrite)
    check_output(args.results, "--results", overwrite=args.overwrite)
    device = distributed.select_device(args.device)
    config = _configuration(args)
    with distributed.process_group(device, timeout=config.train.stall_seconds):
        prepare_data(config, splits=[args.split])
        if args.oracle:
            dataset = oracle_dataset(config.data, args.split)
            config = with_classes(config, dataset)
            predict, assigner = _oracle_predictor(config, dataset.class_names), build_assigner(config.model)
        else:
            dataset = validation_dataset(config.data, args.split)
            predict, assigner = _model_predictor(config, args, dataset, device), None
        evaluator = CocoEvaluator(
            dataset.coco, dataset.category_ids, backend="faster-coco-eval" if args.fast else "pycocotools"
        )
        loader = validation_loader(config, dataset, device=device, batch_size=args.batch_size, assigner=assigner)
        summary = evaluate(
            predict,
            watched(loader, dataset),
            evaluator,
            overlap=device.type != "cpu",
            progress=len(loader) if distributed.is_main() else None,
            per_class=args.per_class,
        )
        if distributed.is_main():
            _report(summary, evaluator, args, config)
    return 0


def _configuration(args: argparse.Namespace) -> Config:
    """The named configuration, or the one that the checkpoint carries, with the flags applied."""
    if args.config is not None:
        return resolve_config(args, {})
    if args.weights is None:
        raise InputError("name a model for the oracle: python eval.py solov2_r50_fpn_1x --oracle")
    content = load_file(args.weights)
    if not is_own(content) or "config" not in content:
        raise InputError(
            f"{args.weights} does not say which model it is; name it: python eval.py NAME --weights {args.weights}"
        )
    args.config = Config.from_checkpoint(content["config"], source=args.weights)
    return resolve_config(args, {})


def _model_predictor(
    config: Config, args: argparse.Namespace, dataset: CocoInstances, device: torch.device
) -> Predictor:
    model = build_model(config, weights=args.weights, device=device)
    if len(model.class_names) != len(dataset.class_names):
        raise InputError(
            f"{args.weights} has {len(model.class_names)} classes and {dataset.annotation_file} "
            f"{len(dataset.class_names)}; evaluate on the data it was trained for, or fine-tune it with "
            "train.py --weights"
        )
    if model.class_names not in (dataset.class_names, default_class_names(len(model.class_names))):
        warnings.warn(
            f"{args.weights} was trained on other classes than {dataset.annotation_file} has: "
            f"{class_difference(model.class_names, dataset.class_names)}; label by label they count as the same",
            stacklevel=1,
        )
    memory_format = choose_memory_format(config, device)
    model = model.to(memory_format=memory_format)
    return predictor(model, device=device, precision=args.precision, memory_format=memory_format)


def _oracle_predictor(config: Config, class_names: Sequence[str]) -> Predictor:
    """The training targets of a batch, as if a network had predicted them."""
    settings = construct(config.model, class_names).settings

    def predict(batch: dict[str, Any]) -> Callable[[], list[dict[str, Any]]]:
        raw = oracle_raw(
            batch["targets"],
            batch_size=len(batch["sizes"]),
            grid_sizes=config.model.grid_sizes,
            num_classes=config.model.num_classes,
        )
        return partial(postprocess, raw, batch["sizes"], batch["original_sizes"], settings, mask_format="rle")

    return predict


def _report(summary: dict[str, Any], evaluator: CocoEvaluator, args: argparse.Namespace, config: Config) -> None:
    print(format_table(summary))
    if args.json is not None:
        content = {
            "config": config.name,
            "weights": None if args.weights is None else str(args.weights),
            "oracle": args.oracle,
            "split": args.split,
            "images": len(evaluator.coco.imgs),
            **summary,
        }
        write_json(args.json, content, indent=2)
    if args.results is not None:
        write_json(args.results, evaluator.results())


if __name__ == "__main__":
    sys.exit(main())
