"""solov2 predict SOURCE... --weights FILE: segment images and draw the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solov2.commands.arguments import (
    LIMITS,
    Parser,
    add_shared_arguments,
    at_least,
    given,
    model_settings,
    text_stream,
)
from solov2.commands.exit import own_command, run_command
from solov2.commands.screen import show
from solov2.config import Config, parse_overrides
from solov2.errors import InputError
from solov2.outputs import check_outputs

if TYPE_CHECKING:
    from solov2.data.panoptic_results import PanopticWriter
    from solov2.models.solov2 import SOLOv2
    from solov2.prediction.sources import Job
    from solov2.prediction.writers import ResultWriter

SCORE_THRESHOLD = 0.3
FORMATS = ("pictures", "coco", "labelme", "yolo", "geojson", "png", "csv")
AGE = 7 * 24 * 3600.0  # seconds that a process waits for the share of another
# Arguments that the results depend on: a run with others cannot resume this one.
SETTINGS = (
    "weights",
    "model",
    "set",
    "classes",
    "panoptic",
    "format",
    "score_threshold",
    "max_instances",
    "precision",
    "tile",
    "tta",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0; 1 if some images could not be read (the others are done); 2 for a user error; 130 after Ctrl-C.
    """
    return run_command(
        "predict",
        build_parser,
        _run,
        argv,
        interrupted="interrupted; the pictures written so far are complete",
        save_memory="lower --batch-size, use --precision bf16 or smaller images; the pictures so far are complete",
    )


def build_parser(typed: str = "solov2 predict") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(prog=typed, description="Segment images and draw or write the results.")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="SOURCE",
        help="image file, folder of images with its subfolders, pattern such as 'photos/**/*.jpg', http(s) URL, - "
        "for an image on standard input, video file, or number of a camera",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), metavar="DIR", help="folder for the outputs"
    )
    parser.add_argument(
        "--format",
        type=_formats,
        default=["pictures"],
        metavar="A,B",
        help=f"what to write in DIR, a list of {', '.join(FORMATS)} (default: pictures)",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="annotation file in COCO's format, from which COCO's results take the image ids (default: the number of "
        "the image in this run)",
    )
    parser.add_argument(
        "--continue",
        dest="resume",
        action="store_true",
        help="continue a run in DIR that was killed, with the same arguments",
    )
    parser.add_argument(
        "--tile",
        type=at_least(32),
        metavar="SIZE",
        help="predict large photographs in tiles of SIZE x SIZE pixels that overlap by a quarter, and join instances "
        "across their borders (default: none)",
    )
    add_shared_arguments(parser, "--tta")
    parser.add_argument(
        "--panoptic",
        action="store_true",
        help="with a panoptic model: draw things and stuff, and write them in COCO's panoptic format, as panoptic.json "
        "and panoptic/ in DIR; things need a score of model.panoptic_score_threshold (see --set)",
    )
    add_shared_arguments(
        parser,
        "--config",
        "--weights",
        "--classes",
        "--results",
        "--score-threshold",
        "--max-instances",
        "--nproc",
        "--device",
        "--precision",
        "--batch-size",
        "--set",
        "--overwrite",
        notes={
            "--config": "default: from the checkpoint",
            "--max-instances": "default: the model's",
            "--score-threshold": f"default: model.score_threshold of --set, else {SCORE_THRESHOLD}, or with --panoptic "
            "model.panoptic_score_threshold if that is lower",
        },
        required=("--weights",),
    )
    parser.set_defaults(batch_size=1, precision="tf32")
    return parser


def _formats(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in FORMATS), None)
    if unknown is not None or not names:
        raise argparse.ArgumentTypeError(f"must be a list of {', '.join(FORMATS)}, got {unknown or text}")
    return list(dict.fromkeys(names))


def _run(args: argparse.Namespace) -> int:
    from solov2 import distributed
    from solov2.compute import reuse_freed_memory, select_device
    from solov2.prediction.finished import read_finished
    from solov2.prediction.outcome import annotated_ids
    from solov2.weights import find_checkpoint

    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; name a folder for the pictures")
    jobs = _plan(args)
    ids = None if args.annotations is None else annotated_ids(args.annotations, jobs)
    settings = {key: None if (value := getattr(args, key)) is None else str(value) for key in SETTINGS}
    finished = read_finished(args.output, settings if args.resume else None)
    _check_outputs(args, jobs, finished)
    checkpoint = find_checkpoint(args.weights, args.model)
    config = _configuration(args, checkpoint)
    if args.nproc is not None:
        distributed.relaunch(args.nproc, [*own_command("predict"), *distributed.without_nproc(args.words)], args.device)
    reuse_freed_memory()
    device = select_device(args.device)
    model = _model(args, config, checkpoint, device)
    del checkpoint
    with distributed.process_group(device, timeout=AGE):  # all processes have looked for existing files
        return _predict_all(args, model, jobs, finished or {}, settings, ids, config.data.max_image_pixels)


def _plan(args: argparse.Namespace) -> list[Job]:
    from solov2 import distributed
    from solov2.prediction.sources import find_sources, plan_jobs

    jobs = plan_jobs(find_sources(args.images, args.output), unique_stems=args.panoptic or args.format != ["pictures"])
    if (args.panoptic or args.annotations is not None) and any(job.source.has_frames for job in jobs):
        raise InputError("--panoptic and --annotations are about images; leave them out for videos and cameras")
    processes = args.nproc or distributed.launched_world_size()
    if processes > 1 and any(job.source.kind == "stdin" for job in jobs):
        raise InputError("standard input cannot be shared by several processes; leave out --nproc")
    return jobs


def _check_outputs(args: argparse.Namespace, jobs: Sequence[Job], finished: dict[str, Any] | None) -> None:
    """Check all outputs but those that a killed run has finished, and clear what it has left otherwise."""
    from solov2 import distributed
    from solov2.prediction.finished import remove_temporary_files
    from solov2.prediction.writers import planned_files, planned_tables

    goes_on = args.resume and finished is not None
    if finished and not args.resume and not args.overwrite:
        raise InputError(
            f"{args.output} has a run that was not completed; add --continue, or --overwrite to start again"
        )
    left = [job for job in jobs if not (goes_on and finished and job.name.as_posix() in finished)]
    names = [(job.name / "000001.png" if job.source.has_frames else job.name, job.picture) for job in left]
    files = [file for name in names for file in planned_files(args.output, args.format, *name)]
    files += planned_tables(args.output, args.format)
    if args.panoptic:
        segments = args.output / "panoptic"
        files += [segments.with_suffix(".json"), *((segments / job.picture).with_suffix(".png") for job in left)]
    inputs = [args.weights, args.model, args.annotations, *(job.source.name for job in jobs)]
    outputs = [*(("--output", file) for file in files), ("--results", args.results)]
    check_outputs(outputs, overwrite=args.overwrite or goes_on, inputs=inputs)
    if goes_on and distributed.launched_world_size() == 1:  # before other processes start
        remove_temporary_files(files)


def _configuration(args: argparse.Namespace, checkpoint: Any) -> Config:
    """The configuration; sets the default of --score-threshold."""
    from solov2.build import resolve_config

    overrides = parse_overrides(args.set)
    config = resolve_config(args.model, checkpoint, overrides)
    if args.panoptic and not config.model.num_stuff:
        raise InputError(
            "--panoptic needs the weights of a panoptic model, such as solov2_panoptic_r50_fpn_3x; this model has no "
            "semantic head"
        )
    if config.model.num_stuff and (args.tile is not None or args.tta is not None):
        raise InputError("--tile and --tta merge instances, so they do not work with panoptic models; leave them out")
    if args.score_threshold is None and "model.score_threshold" not in overrides:
        lowest = config.model.panoptic_score_threshold if args.panoptic else SCORE_THRESHOLD
        args.score_threshold = min(SCORE_THRESHOLD, lowest)
    return config


def _model(args: argparse.Namespace, config: Config, checkpoint: Any, device: Any) -> SOLOv2:
    from solov2.build import build_model
    from solov2.class_rows import restrict_classes
    from solov2.prediction.writers import check_formats

    changes = model_settings(parse_overrides(args.set)) | given(args, LIMITS)
    model = build_model(config if args.model else None, weights=checkpoint, device=device, **changes)
    if args.classes:
        restrict_classes(model, args.classes, str(args.weights))
    check_formats(args.format, model.class_names)
    return model


def _predict_all(
    args: argparse.Namespace,
    model: SOLOv2,
    jobs: Sequence[Job],
    finished: dict[str, Any],
    settings: dict[str, Any],
    ids: dict[str, Any] | None,
    max_pixels: int,
) -> int:
    """Predict this process's share of what is left, and on the first one write the files about all images."""
    from solov2 import distributed
    from solov2.prediction.finished import FinishedLog, read_finished, remove_logs
    from solov2.prediction.outcome import ordered_lines, summary, write_outcome
    from solov2.prediction.run import ImagePredictor, predict_jobs, predict_video, report_unreadable
    from solov2.prediction.writers import ResultWriter
    from solov2.views import parse_views

    stream = text_stream(args.results)
    main = distributed.is_main()
    if main and not args.resume:
        remove_logs(args.output)
    distributed.barrier()
    left = [job for job in jobs if not (args.resume and job.name.as_posix() in finished)]
    share = left[distributed.rank() :: distributed.world_size()]
    panoptic = _panoptic_writer(args.output, model) if args.panoptic else None
    writer = ResultWriter(args.output, args.format, model, panoptic)
    predictor = ImagePredictor(
        model,
        args.batch_size,
        args.precision,
        args.panoptic,
        args.tile,
        () if args.tta is None else parse_views(args.tta),
    )
    log = FinishedLog(args.output, distributed.rank(), settings)
    images = [job for job in share if not job.source.has_frames]
    try:
        unreadable = predict_jobs(
            images, predictor, writer, log, max_pixels=max_pixels, stream=stream, show_progress=main
        )
        for job in (job for job in share if job.source.has_frames):
            try:
                predict_video(job, predictor, writer, log, max_pixels=max_pixels, stream=stream)
            except InputError as error:
                report_unreadable(job, error, unreadable)
    except BaseException:
        if panoptic is not None and distributed.world_size() == 1:  # after Ctrl-C, what there is
            _close_panoptic(writer, read_finished(args.output) or {})
        raise
    finally:
        log.close()
    not_read = [name for names in distributed.all_gather_objects(unreadable) for name in names]
    if main:
        lines, image_ids = ordered_lines(jobs, read_finished(args.output) or {}, ids)
        write_outcome(writer, lines, image_ids, args.results)
        remove_logs(args.output)
        text = summary(lines, not_read, len(jobs))
        if text:
            show(*text, file=sys.stderr)
    return 1 if not_read else 0


def _panoptic_writer(folder: Path, model: SOLOv2) -> PanopticWriter:
    """Writes panoptic results under the model's own category ids and names."""
    from solov2.data.panoptic_annotations import Category
    from solov2.data.panoptic_results import PanopticWriter

    things = zip(model.category_ids, model.class_names, strict=True)
    stuff = zip(model.stuff_category_ids, model.stuff_names, strict=True)
    categories = [*(Category(*named, True) for named in things), *(Category(*named, False) for named in stuff)]
    return PanopticWriter(folder, categories, model.category_ids, model.stuff_category_ids)


def _close_panoptic(writer: ResultWriter, finished: dict[str, Any]) -> None:
    """Write panoptic.json for the images that are finished."""
    if writer.panoptic is not None:
        lines = [line for lines in finished.values() for line in lines]
        writer.panoptic.merge([{line["panoptic"][0]["id"]: line["panoptic"] for line in lines}])
        writer.panoptic.close()
