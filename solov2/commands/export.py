"""solov2 export --weights FILE --size H W --output FILE: a model as one graph from pixels to instances."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from solov2.build import build_model
from solov2.commands.arguments import add_shared_arguments
from solov2.commands.exit import run_command
from solov2.compute import select_device
from solov2.errors import InputError
from solov2.export import NUM_CELLS, check_format, export_program, save_program
from solov2.outputs import check_output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process where None.

    Returns:
        0; 2 for a mistake in what was asked for; 130 after Ctrl-C.
    """
    return run_command(_run, argv)


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    check_format(args.output)
    check_output(args.output, "--output", overwrite=args.overwrite)
    if args.cells < 1:
        raise InputError(f"--cells {args.cells}: must be 1 or more")
    overrides = {"max_instances": args.max_instances, "score_threshold": args.score_threshold}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    model = build_model(args.config, weights=args.weights, device=select_device(args.device), **overrides)
    size = tuple(args.size)
    program = export_program(model, size, raw=args.raw, num_cells=args.cells)
    save_program(program, args.output, model.class_names)
    found = "raw outputs" if args.raw else f"scores, labels, masks of {model.settings.max_instances} instances"
    print(
        f"{args.output} ({args.output.stat().st_size / 1e6:.0f} MB): pixels uint8 [B, 3, {size[0]}, {size[1]}], "
        f"sizes int64 [B, 2] -> {found}"
    )
    return 0


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `solov2 export`."""
    parser = argparse.ArgumentParser(
        prog="solov2 export", description="Write a model as one graph from pixels to instances."
    )
    parser.add_argument("--config", metavar="NAME", help="model name or YAML file; default: what the checkpoint says")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint; official: the published one")
    parser.add_argument(
        "--size", required=True, nargs=2, type=int, metavar=("H", "W"), help="of the padded input, multiples of 32"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help=".pt2 for torch.export.load, or .onnx"
    )
    parser.add_argument("--raw", action="store_true", help="stop at the raw outputs of the network")
    parser.add_argument("--max-instances", type=int, metavar="K", help="rows of the result; default: the model's own")
    parser.add_argument("--score-threshold", type=float, metavar="X", help="least score; default: the model's own")
    parser.add_argument(
        "--cells", type=int, default=NUM_CELLS, metavar="N", help=f"cells that masks are computed for ({NUM_CELLS})"
    )
    add_shared_arguments(parser, "--overwrite", "--device")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
