"""solov2 convert IN OUT: rewrite a checkpoint with the names of another family."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from solov2.commands.arguments import Parser, add_shared_arguments
from solov2.commands.exit import run_command
from solov2.commands.screen import show


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a file; returns the exit code (0 done, 2 user error, 130 after Ctrl-C)."""
    return run_command("convert", build_parser, _run, argv)


def build_parser(typed: str = "solov2 convert") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(
        prog=typed,
        description="Convert a SOLOv2 checkpoint of WXinlong/SOLO, mmdetection or AdelaiDet, or one of this library.",
    )
    parser.add_argument("source", metavar="IN", help="checkpoint file of any family")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument("--to", choices=("solov2", "mmdet"), default="solov2", help="family of the names to write")
    add_shared_arguments(parser, "--overwrite")
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2.weights import convert_file

    show(convert_file(args.source, args.target, to=args.to, overwrite=args.overwrite))
    return 0
