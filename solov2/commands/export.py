"""solov2 export --weights FILE --size H W --output FILE: write a model as one graph from pixels to instances."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

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
from solov2.outputs import check_outputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0; 2 for a user error; 130 after Ctrl-C.
    """
    return run_command("export", build_parser, _run, argv, save_memory="lower --size or --cells")


def build_parser(typed: str = "solov2 export") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(prog=typed, description="Write a model as one graph from pixels to instances.")
    add_model_argument(parser, default="from the checkpoint")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=".pt2 for torch.export.load, or .onnx"
    )
    parser.add_argument("--raw", action="store_true", help="export only the network, up to its raw outputs")
    parser.add_argument(
        "--cells", type=at_least(1), default=512, metavar="N", help="maximum number of cells to compute masks for"
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
        },
        required=("--weights", "--size"),
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2.build import build_model, resolve_config
    from solov2.compute import select_device
    from solov2.export import check_format, export_program, save_program
    from solov2.weights import find_checkpoint

    check_format(args.output)
    check_outputs([("--output", args.output)], overwrite=args.overwrite, inputs=[args.weights, args.model])
    checkpoint = find_checkpoint(args.weights, args.model)
    overrides = parse_overrides(args.set)
    config = resolve_config(args.model, checkpoint, overrides)
    changes = model_settings(overrides) | given(args, LIMITS)
    device = select_device(args.device)
    model = build_model(config if args.model else None, weights=checkpoint, device=device, **changes)
    height, width = args.size
    program = export_program(model, (height, width), raw=args.raw, num_cells=args.cells)
    save_program(program, args.output, model.class_names, model.stuff_names)
    limits = (model.settings.max_instances, model.settings.max_candidates)
    rows = min((limit for limit in limits if limit), default="all")
    semantic = ", semantic logits" if model.semantic_head is not None else ""
    found = "raw outputs" if args.raw else f"scores, labels, masks of {rows} instances{semantic}"
    show(
        f"{args.output} ({args.output.stat().st_size / 1e6:.0f} MB): pixels uint8 [B, 3, {height}, {width}], "
        f"sizes int64 [B, 2] -> {found}"
    )
    return 0
