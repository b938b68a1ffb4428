"""solov2 export --weights FILE --size H W --output FILE: write a model as one graph from pixels to instances."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solov2.commands.arguments import (
    LIMITS,
    Parser,
    add_model_argument,
    add_shared_arguments,
    at_least,
    given,
    model_settings,
)
from solov2.commands.exit import run_command
from solov2.commands.screen import show
from solov2.config import parse_overrides
from solov2.errors import InputError, RunFailed, printable
from solov2.outputs import check_outputs

if TYPE_CHECKING:
    from solov2.models.solov2 import SOLOv2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0; 1 if --check finds that a float32 file differs from the model; 2 for a user error; 130 after Ctrl-C.
    """
    return run_command("export", build_parser, _run, argv, save_memory="lower --size or --cells")


def build_parser(typed: str = "solov2 export") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(prog=typed, description="Write a model as one graph from pixels to instances.")
    add_model_argument(parser, default="from the checkpoint")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="file to write: .pt2 for torch.export.load, or .onnx"
    )
    parser.add_argument("--raw", action="store_true", help="export only the network, up to its raw outputs")
    parser.add_argument(
        "--cells", type=at_least(1), default=512, metavar="N", help="maximum number of cells to compute masks for"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16", "fp16", "int8"),
        default="float32",
        help="precision of the network (bf16 only in a .pt2, fp16 and int8 only in an .onnx)",
    )
    parser.add_argument(
        "--calibrate",
        nargs="+",
        metavar="IMAGES",
        help="some dozens of images like those to be segmented, or a folder of them; int8 measures the ranges of "
        "activations on them (default: none)",
    )
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGES",
        help="run the file and the model on these images, or those in a folder, and compare what they find "
        "(default: none)",
    )
    add_shared_arguments(
        parser,
        "--weights",
        "--size",
        "--score-threshold",
        "--max-instances",
        "--device",
        "--set",
        "--overwrite",
        notes={
            "--size": "of the padded image",
            "--score-threshold": "default: the model's",
            "--max-instances": "also the number of rows in the result; default: the model's",
            "--device": "of the model in --check; a file is made on the CPU and names no device",
        },
        required=("--weights", "--size"),
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    import torch

    from solov2.build import build_model, resolve_config
    from solov2.compute import select_device
    from solov2.export.check import list_images, load_image
    from solov2.export.files import NETWORK_TYPES, check_format, file_metadata, save_program
    from solov2.export.graph import export_program
    from solov2.weights import find_checkpoint

    _check_arguments(args)
    check_format(args.output, args.precision)
    calibrated, checked = (list_images(paths or []) for paths in (args.calibrate, args.check))
    inputs = [args.weights, args.model, *calibrated, *checked]
    check_outputs([("--output", args.output)], overwrite=args.overwrite, inputs=inputs)
    checkpoint = find_checkpoint(args.weights, args.model)
    overrides = parse_overrides(args.set)
    config = resolve_config(args.model, checkpoint, overrides)
    changes = model_settings(overrides) | given(args, LIMITS)
    device = select_device(args.device or "cpu")
    model = build_model(config if args.model else None, weights=checkpoint, device=device, **changes)
    size = height, width = tuple(args.size)
    dtype = NETWORK_TYPES.get(args.precision, torch.float32)
    program = export_program(model, size, raw=args.raw, num_cells=args.cells, dtype=dtype)
    calibration = (load_image(image, size, model.input_scale) for image in calibrated) if calibrated else None
    save_program(program, args.output, file_metadata(model), calibration)
    limits = (model.settings.max_instances, model.settings.max_candidates)
    rows = min((limit for limit in limits if limit), default="all")
    semantic = ", semantic logits" if model.semantic_head is not None else ""
    found = "raw outputs" if args.raw else f"scores, labels, masks of {rows} instances{semantic}"
    show(
        f"{args.output} ({args.output.stat().st_size / 1e6:.0f} MB): pixels uint8 [B, 3, {height}, {width}], "
        f"sizes int64 [B, 2] -> {found}"
    )
    if checked:
        _check(args, model, checked, size)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and a check without a runtime."""
    from solov2.export.runtimes import find_runtimes

    if args.precision == "int8" and not args.calibrate:
        raise InputError("--precision int8 needs images to measure the ranges of activations on: --calibrate IMAGES")
    if args.calibrate and args.precision != "int8":
        raise InputError(f"--calibrate is for --precision int8, not for {args.precision}")
    if args.check:
        if args.raw:
            raise InputError("--check compares instances, which a file with --raw does not have")
        find_runtimes(args.output)


def _check(args: argparse.Namespace, model: SOLOv2, images: Sequence[Path], size: tuple[int, int]) -> None:
    """Compare the file with the model in every runtime that has all its operators, and print the figures."""
    from solov2.export.check import compare
    from solov2.export.runtimes import find_runtimes, open_file

    differing, reasons = [], []
    for runtime in find_runtimes(args.output):
        try:
            run = open_file(args.output, runtime)
        except InputError as error:
            reasons.append(printable(str(error)))
            show(reasons[-1])
            continue
        comparison = compare(run, runtime, model, images, size)
        show(str(comparison))
        if args.precision == "float32" and not comparison.within_tolerance:
            differing.append(runtime)
    if differing:
        raise RunFailed(
            f"{args.output} finds other instances than the model in {' and '.join(differing)}; raise --cells if more "
            f"than {args.cells} cells of an image are above model.category_threshold"
        )
    if len(reasons) == len(find_runtimes(args.output)):
        raise RunFailed(f"{args.output} runs in none of the runtimes installed here")
