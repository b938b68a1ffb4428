"""solov2 convert IN OUT: a checkpoint under the names of another family."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from solov2.commands.arguments import add_shared_arguments
from solov2.commands.exit import run_command
from solov2.weights import convert_file


def main(argv: Sequence[str] | None = None) -> int:
    """Convert a file; returns the exit code (0 done, 2 a user's mistake, 130 after Ctrl-C)."""
    return run_command(_run, argv)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `solov2 convert`."""
    parser = argparse.ArgumentParser(
        prog="solov2 convert",
        description="Convert a SOLOv2 checkpoint of WXinlong/SOLO, mmdetection or AdelaiDet, or one of ours.",
    )
    parser.add_argument("source", metavar="IN", help="checkpoint file of any family")
    parser.add_argument("target", metavar="OUT", help="file to write")
    parser.add_argument("--to", choices=("solov2", "mmdet"), default="solov2", help="names to write (default: solov2)")
    add_shared_arguments(parser, "--overwrite")
    return parser.parse_args(argv)


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    print(convert_file(args.source, args.target, to=args.to, overwrite=args.overwrite))
    return 0


if __name__ == "__main__":
    sys.exit(main())
