"""Evaluate COCO mask AP and box AP of a model, or panoptic quality: `python eval.py CONFIG --weights FILE`.

Or of a file of results, without a model: `python eval.py --predictions FILE`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from solov2.config import DEFAULT_MODEL, Config, parse_overrides
from solov2.errors import InputError
from solov2.outputs import STDOUT, check_outputs, write_json

if TYPE_CHECKING:
    from solov2.checkpoint import Checkpoint
    from solov2.compute import Compute
    from solov2.data.annotations import ImageId
    from solov2.data.panoptic_results import PanopticWriter
    from solov2.evaluate import Subject
    from solov2.evaluation.coco import CocoEvaluator
    from solov2.evaluation.panoptic import PanopticEvaluator
    from solov2.report.gather import Evaluated


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 failed, 2 user error, 130 interrupted)."""
    return run_command("eval", build_parser, _run, argv, save_memory="lower --batch-size or use --precision bf16")


def build_parser(typed: str = "solov2 eval") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(
        prog=typed,
        description="Evaluate COCO mask AP, and the AP of the boxes around the masks; of panoptic models, panoptic "
        "quality (PQ).",
    )
    add_model_argument(parser, default="from the checkpoint")
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="evaluate the training targets themselves: the highest AP or PQ that this resolution and these grids "
        "allow",
    )
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="evaluate a file in COCO's results format, without a model, weights or images (default: none)",
    )
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which images to evaluate")
    add_shared_arguments(parser, "--per-class")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="compute AP with faster-coco-eval (pip install 'solov2[fast]'): faster, and equal to 15 decimals",
    )
    parser.add_argument(
        "--boundary", action="store_true", help="also report the AP of boundaries (Boundary IoU; needs solov2[fast])"
    )
    parser.add_argument(
        "--lvis",
        action="store_true",
        help="also report figures by the rules of LVIS, whose images are annotated for some classes only (needs "
        "solov2[fast])",
    )
    parser.add_argument(
        "--report",
        metavar="FILE.html",
        help="write the page of solov2 report, which shows the figures of each class too (default: none)",
    )
    add_shared_arguments(
        parser,
        "--weights",
        "--classes",
        "--json",
        "--results",
        "--tta",
        *RUN_FLAGS,
        notes={
            "--weights": "required unless --oracle or --predictions is given; default: none",
            "--results": "panoptic models: a folder, for panoptic.json and the PNGs in COCO's panoptic format",
            "--batch-size": "default: 1, so that the padding of an image does not depend on others",
            "--workers": "per process; default: from the configuration",
        },
    )
    parser.set_defaults(precision="tf32", batch_size=1)
    add_data_arguments(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2 import distributed
    from solov2.build import build_compute
    from solov2.compute import reuse_freed_memory, select_device
    from solov2.data.build import prepare_data
    from solov2.evaluate import model_subject, oracle_subject
    from solov2.weights import find_checkpoint

    if args.predictions is not None:
        return _evaluate_file(args)
    if args.weights is None and not args.oracle:
        raise InputError(
            "give the weights to evaluate: --weights FILE (a checkpoint of this library needs no model name); the data "
            "is expected in data/coco or --data-root"
        )
    for flag in ("--tta", "--report"):
        if args.oracle and getattr(args, flag.removeprefix("--")) is not None:
            raise InputError(f"{flag} is about a network, which --oracle does not use; leave one of them out")
    outputs = [("--json", args.json), ("--report", args.report)]
    if args.results is None or not Path(args.results).is_dir():  # which panoptic models take: known later
        outputs.append(("--results", args.results))
    check_outputs(outputs, overwrite=args.overwrite, inputs=[args.weights, args.model])
    checkpoint = find_checkpoint(args.weights, args.model)
    config = _configuration(args, checkpoint)
    _check_outputs(args, config, inputs=[args.weights, args.model])
    if args.nproc is not None:
        distributed.relaunch(args.nproc, [*own_command("eval"), *distributed.without_nproc(args.words)], args.device)
    reuse_freed_memory()
    device = select_device(args.device)
    with distributed.process_group(device, timeout=config.train.stall_seconds):
        prepare_data(config, splits=[args.split])
        compute = build_compute(config, device, args.precision)
        if args.oracle or checkpoint is None:
            subject = oracle_subject(config, args.split)
        else:
            changes = model_settings(parse_overrides(args.set))
            subject = model_subject(
                checkpoint, config, args.split, compute, named=bool(args.model), changes=changes, views=args.tta
            )
        source = None if checkpoint is None else checkpoint.source
        checkpoint = None  # frees its large training state
        evaluator, summary, evaluated = _evaluate(args, subject, compute)
        if distributed.is_main():
            head = {
                "config": subject.config.name,
                "weights": source,
                "oracle": args.oracle,
                "split": args.split,
                "images": len(subject.dataset),
            }
            _report(head, summary, evaluator, args)
            if evaluated is not None:
                _write_page(args, evaluated, compute)
    return 0


def _write_page(args: argparse.Namespace, evaluated: Evaluated, compute: Compute) -> None:
    """--report: of a run's checkpoint, the page has the curves of its log."""
    from solov2.report.build import write_page
    from solov2.report.gather import gather_facts
    from solov2.report.run_files import read_log

    weights = Path(args.weights)
    name = f"{evaluated.subject.config.name}, {weights.name}"
    facts = gather_facts(evaluated, compute, name=name, log=read_log(weights.parent) if weights.is_file() else [])
    write_page(args.report, [evaluated], [facts])


def _evaluate_file(args: argparse.Namespace) -> int:
    """--predictions: the figures of a file of results."""
    from solov2.data.build import split_paths
    from solov2.evaluation.coco import summarize
    from solov2.evaluation.results_file import read_results
    from solov2.report.build import write_report
    from solov2.report.gather import complete_truth, has_boundaries, instance_facts

    for flag in ("--weights", "--oracle", "--tta", "--results", "--nproc"):
        if getattr(args, flag.removeprefix("--")):
            raise InputError(f"--predictions evaluates a file, without a model; leave {flag} out")
    config = _configuration(args, None)
    if config.model.num_stuff:
        raise InputError(f"{config.name} is panoptic: use solov2 panoptic-quality GT.json {args.predictions}")
    data = config.data
    annotations, _ = split_paths(data, args.split)
    for path, flag in ((args.predictions, "--predictions"), (annotations, f"--{args.split}-annotations")):
        if not Path(path).exists():
            raise InputError(f"{path} does not exist; name the file with {flag}")
    outputs = [("--json", args.json), ("--report", args.report)]
    check_outputs(outputs, overwrite=args.overwrite, inputs=[args.predictions, annotations, args.model])
    truth, found = read_results(
        args.predictions,
        annotations,
        classes=data.classes,
        crowd=data.crowd,
        max_pixels=data.max_image_pixels,
        lvis=args.lvis,
    )
    summary = summarize(
        truth,
        found,
        max_detections=data.max_detections,
        backend=_backend(args),
        boundary=args.boundary or (args.report is not None and has_boundaries()),
        lvis=args.lvis,
        per_class=args.per_class or args.report is not None,
    )
    head = {"predictions": args.predictions, "annotations": str(annotations), "images": len(truth.images)}
    _report(head, summary, None, args)
    if args.report is not None:
        name, most = Path(args.predictions).name, data.max_detections
        facts = instance_facts(name, complete_truth(truth), found.results(), summary, max_detections=most)
        write_report(args.report, [facts])
    return 0


def _evaluate(
    args: argparse.Namespace, subject: Subject, compute: Compute
) -> tuple[CocoEvaluator | PanopticEvaluator, dict[str, Any], Evaluated | None]:
    """The evaluator, with all results, the figures, and what --report needs; panoptic results are written meanwhile."""
    from solov2 import distributed
    from solov2.evaluate import evaluate_subject
    from solov2.report.gather import evaluate_for_report

    config, dataset = subject.config, subject.dataset
    names = {record.image_id: record.file_name for record in map(dataset.record, range(len(dataset)))}
    images = [dataset.image_root / name for name in names.values()]
    writer = _panoptic_writer(args, subject)
    written = [] if writer is None else [writer.path(name) for name in names.values()]
    _check_outputs(args, config, inputs=[dataset.annotation_file, *images], pngs=written)
    distributed.barrier()  # no process writes a PNG while another still looks for existing ones

    def write(image_ids: Sequence[ImageId], results: Sequence[Mapping[str, Any]]) -> None:
        if writer is not None:
            for image_id, result in zip(image_ids, results, strict=True):
                writer.add(image_id, names[image_id], result)

    evaluated = None
    if args.report is not None:
        evaluated = evaluate_for_report(
            subject,
            args.split,
            compute,
            batch_size=args.batch_size,
            backend=_backend(args),
            boundary=args.boundary,
            lvis=args.lvis,
            write=write,
        )
        evaluator, summary = evaluated.evaluator, evaluated.summary
    else:
        evaluator, summary = evaluate_subject(
            subject,
            compute,
            batch_size=args.batch_size,
            backend=_backend(args),
            boundary=args.boundary,
            lvis=args.lvis,
            per_class=args.per_class,
            write=write,
        )
    if writer is not None:
        writer.merge(distributed.gather_objects(writer.entries))
        if distributed.is_main():
            writer.close(names)
    return evaluator, summary, evaluated


def _backend(args: argparse.Namespace) -> str:
    return "faster-coco-eval" if args.fast else "pycocotools"


def _check_outputs(
    args: argparse.Namespace, config: Config, *, inputs: Sequence[str | Path | None], pngs: Sequence[Path] = ()
) -> None:
    """Check --json and --results, which is a folder for panoptic models."""
    results = args.results
    if config.model.num_stuff:
        for flag in ("--fast", "--boundary", "--lvis"):
            if getattr(args, flag.removeprefix("--")):
                raise InputError(f"{flag} is for AP, and {config.name} is evaluated by PQ; leave it out")
        if results == STDOUT or results is not None and Path(results).is_file():
            raise InputError(f"--results {results}: panoptic results are several files; name a folder")
        results = None if results is None else Path(results, "panoptic.json")
    outputs = [("--json", args.json), ("--report", args.report), ("--results", results)]
    outputs += [("--results", png) for png in pngs]
    check_outputs(outputs, overwrite=args.overwrite, inputs=inputs)


def _panoptic_writer(args: argparse.Namespace, subject: Subject) -> PanopticWriter | None:
    from solov2.data.panoptic import CocoPanoptic
    from solov2.data.panoptic_results import PanopticWriter

    if args.results is None or not isinstance(subject.dataset, CocoPanoptic):
        return None
    categories = subject.dataset.panoptic.categories
    return PanopticWriter(args.results, categories, subject.category_ids, subject.stuff_category_ids)


def _configuration(args: argparse.Namespace, checkpoint: Checkpoint | None) -> Config:
    """The named configuration, or else the checkpoint's, or for --predictions the default, with the flags applied."""
    from solov2.build import resolve_config
    from solov2.data.build import locate_data

    overrides = parse_overrides(args.set) | given(args, {"workers": "data.workers", "classes": "data.classes"})
    if data_places(args):  # evaluate what is there: a mistyped folder must not be filled with generated shapes
        overrides = {"data.shapes": False, **overrides}
    model = args.model or (DEFAULT_MODEL if args.predictions else None)
    config = resolve_config(model, checkpoint, overrides)
    return locate_data(config, data_places(args), chosen=overrides)


def _report(
    head: dict[str, Any],
    summary: dict[str, Any],
    evaluator: CocoEvaluator | PanopticEvaluator | None,
    args: argparse.Namespace,
) -> None:
    from solov2.evaluation.coco import CocoEvaluator
    from solov2.evaluation.summary import format_table

    try:
        if args.json is not None:
            write_json(args.json, {**head, **summary}, indent=2)
        if args.results is not None and isinstance(evaluator, CocoEvaluator):
            write_json(args.results, evaluator.results())
    finally:  # the figures are not lost with a file that cannot be written
        show(*format_table(summary).split("\n"), file=text_stream(args.json, args.results))
