"""solov2 panoptic-quality GT.json PRED.json: compare two files in COCO's panoptic format; no model is needed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from solov2.commands.arguments import Parser, add_shared_arguments, text_stream
from solov2.commands.exit import run_command
from solov2.commands.screen import show
from solov2.outputs import check_outputs, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0 done, 2 for a user error, 130 after Ctrl-C.
    """
    return run_command("panoptic-quality", build_parser, _run, argv)


def build_parser(typed: str = "solov2 panoptic-quality") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(prog=typed, description="Compute the panoptic quality of predictions in COCO's panoptic format.")
    parser.add_argument("ground_truth", type=Path, metavar="GT.json", help="annotation file in COCO's panoptic format")
    parser.add_argument("predictions", type=Path, metavar="PRED.json", help="predictions in the same format")
    for side in ("GT", "PRED"):
        parser.add_argument(
            f"--{side.lower()}-segments",
            type=Path,
            metavar="DIR",
            help=f"folder of the PNGs of {side}.json (default: its path without .json)",
        )
    add_shared_arguments(parser, "--per-class", "--json", "--overwrite")
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2.data.panoptic_file import open_annotations, open_predictions
    from solov2.evaluation.panoptic import compare_files, format_table

    outputs = [("--json", args.json)]
    check_outputs(outputs, overwrite=args.overwrite, inputs=[args.ground_truth, args.predictions])
    truth = open_annotations(args.ground_truth, args.gt_segments)
    found = open_predictions(args.predictions, truth, args.pred_segments)
    pngs = (file.folder / file[image_id].png for file in (truth, found) for image_id in file.image_ids)
    check_outputs(outputs, overwrite=args.overwrite, inputs=pngs)
    summary = compare_files(truth, found, progress=True).summarize(per_class=args.per_class)
    try:
        if args.json is not None:
            write_json(args.json, summary, indent=2)
    finally:  # the figures are not lost with a file that cannot be written
        show(*format_table(summary).split("\n"), file=text_stream(args.json))
    return 0
