"""solov2 report RUN [RUN_B]: one HTML page about a run, or about two, that ends with what to fix first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solov2.commands.arguments import (
    Parser,
    add_data_arguments,
    add_shared_arguments,
    data_places,
    given,
    model_settings,
    text_stream,
)
from solov2.commands.exit import run_command
from solov2.commands.screen import show
from solov2.config import parse_overrides
from solov2.errors import InputError, printable
from solov2.outputs import check_outputs, write_json

if TYPE_CHECKING:
    from solov2.config import Config
    from solov2.report.facts import RunFacts
    from solov2.report.gather import Evaluated


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0 done, 1 failed, 2 for a user error, 130 after Ctrl-C.
    """
    return run_command("report", build_parser, _run, argv, save_memory="lower --batch-size or use --precision bf16")


def build_parser(typed: str = "solov2 report") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(
        prog=typed,
        description="Evaluate the best checkpoint of a run and write one HTML page: curves, figures, errors, images, "
        "and what to fix first. With two runs, the page shows them side by side.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or checkpoint file")
    parser.add_argument("run_b", type=Path, nargs="?", metavar="RUN_B", help="another one, to compare (default: none)")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="the page (default: report.html in RUN)")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="which images to evaluate")
    add_shared_arguments(
        parser,
        "--json",
        "--device",
        "--precision",
        "--batch-size",
        "--workers",
        "--set",
        "--overwrite",
        notes={
            "--batch-size": "default: 1, so that the padding of an image does not depend on others",
            "--workers": "default: from the configuration",
        },
    )
    parser.set_defaults(precision="tf32", batch_size=1)
    add_data_arguments(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2.compute import reuse_freed_memory
    from solov2.evaluation.summary import format_table
    from solov2.report.build import report_values, require_comparable, write_page

    first: Path = args.run
    runs = [first] if args.run_b is None else [first, args.run_b]
    output = args.output or (first if first.is_dir() else first.parent) / "report.html"
    check_outputs([("--output", output), ("--json", args.json)], overwrite=args.overwrite, inputs=runs)
    reuse_freed_memory()
    evaluated, facts = [], []
    for run, name in zip(runs, _names(runs), strict=True):
        one, own = _evaluate(args, run, name)
        evaluated.append(one)
        facts.append(own)
    require_comparable(facts)
    write_page(output, evaluated, facts)
    if args.json is not None:
        write_json(args.json, {"runs": [report_values(own) for own in facts]}, indent=2)
    stream = text_stream(args.json)
    for own in facts:
        show(own.name, *format_table(own.summary).split("\n"), *finding_lines(own), file=stream)
    show(f"report written to {output}", file=stream)
    return 0


def _names(runs: Sequence[Path]) -> list[str]:
    """What the page calls the runs: the last parts of their paths, as many as tell them apart."""
    parts = [run.resolve().parts for run in runs]
    fewest = 2 if any(run.is_file() for run in runs) else 1  # files of different runs have the same name
    for number in range(fewest, max(map(len, parts))):
        names = ["/".join(own[-number:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run) for run in runs]


def _evaluate(args: argparse.Namespace, run: Path, name: str) -> tuple[Evaluated, RunFacts]:
    from solov2 import distributed
    from solov2.build import build_compute, resolve_config
    from solov2.compute import select_device
    from solov2.data.build import locate_data, prepare_data
    from solov2.evaluate import model_subject
    from solov2.report.gather import evaluate_for_report, gather_facts
    from solov2.report.run_files import read_run

    checkpoint, log = read_run(run)
    if checkpoint.config is None:
        raise InputError(
            f"{checkpoint.source} carries no configuration; report on it with solov2 eval MODEL --weights "
            f"{checkpoint.source} --report FILE.html"
        )
    overrides = parse_overrides(args.set) | given(args, {"workers": "data.workers"})
    if data_places(args):  # as in eval: a mistyped folder must not be filled with generated shapes
        overrides = {"data.shapes": False, **overrides}
    config: Config = locate_data(resolve_config(None, checkpoint, overrides), data_places(args), chosen=overrides)
    device = select_device(args.device)
    with distributed.process_group(device, timeout=config.train.stall_seconds):
        prepare_data(config, splits=[args.split])
        compute = build_compute(config, device, args.precision)
        changes = model_settings(parse_overrides(args.set))
        subject = model_subject(checkpoint, config, args.split, compute, changes=changes)
        del checkpoint  # frees its large training state
        evaluated = evaluate_for_report(subject, args.split, compute, batch_size=args.batch_size)
        return evaluated, gather_facts(evaluated, compute, name=name, log=log)


def finding_lines(facts: RunFacts) -> list[str]:
    """The ranked list as text."""
    if not sum(facts.evaluated.values()):
        return ["", "no annotation counts in this evaluation, so there are no losses to rank"]
    if not facts.findings:
        return ["", "nothing to fix costs more than half a point"]
    lines = ["", "what to fix first:"]
    for number, finding in enumerate(facts.findings, 1):
        text = f"{finding.area}, {100 * finding.gain:.1f} points: {finding.what} {finding.remedy}"
        lines.append(f"{number}. {printable(text)}")
    return lines
