"""solov2 models: list the named models, their parameters and the published AP of their weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from solov2.commands.arguments import Parser, add_shared_arguments, text_stream
from solov2.commands.exit import run_command
from solov2.commands.screen import show
from solov2.config import list_models, load_config
from solov2.outputs import check_outputs, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 2 user error)."""
    return run_command("models", build_parser, _run, argv)


def build_parser(typed: str = "solov2 models") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(
        prog=typed,
        description="List the models: name, parameters, input size, and the published mask AP on COCO val2017 of the "
        "weights that --weights official downloads.",
    )
    add_shared_arguments(parser, "--json", "--overwrite")
    return parser


def _run(args: argparse.Namespace) -> int:
    check_outputs([("--json", args.json)], overwrite=args.overwrite)
    rows = [_describe(name) for name in list_models()]
    lines = [f"{'model':<30}{'parameters':>12}{'input':>14}{'published mask AP':>20}"]
    for row in rows:
        long, short = row["input_scale"]
        published = "-" if row["mask_AP"] is None else f"{100 * row['mask_AP']:.1f}"
        parameters = f"{row['parameters'] / 1e6:.1f} M"
        lines.append(f"{row['model']:<30}{parameters:>12}{f'{long} x {short}':>14}{published:>20}")
    if args.json is not None:
        write_json(args.json, rows, indent=1)
    show(*lines, file=text_stream(args.json))
    return 0


def _describe(name: str) -> dict[str, Any]:
    """One row: model, parameters, input_scale (max long edge, max short edge), mask_AP as a fraction or None."""
    import torch

    from solov2.build import construct
    from solov2.data.categories import default_class_names
    from solov2.published import PUBLISHED_WEIGHTS

    config = load_config(name).model
    with torch.device("meta"):  # shapes only, without memory
        model = construct(config, default_class_names(config.num_classes))
    published = PUBLISHED_WEIGHTS.get(name)
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input_scale": list(config.input_scale),
        "mask_AP": None if published is None else round(published.mask_ap / 100, 4),
    }
