"""solov2 check-data ANNOTATIONS --images DIR: what is wrong with a COCO data set, and a repaired copy."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from solov2.commands.arguments import add_shared_arguments
from solov2.commands.exit import run_command
from solov2.config import load_config
from solov2.data.annotations import load_json
from solov2.data_check.check import Report, check_data
from solov2.data_check.repair import repair
from solov2.data_check.report import report_lines, to_json
from solov2.errors import InputError
from solov2.outputs import check_output, write_json

UNUSABLE_FILES = ("missing file", "unreadable file", "wrong size")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process where None.

    Returns:
        0 without errors in the data, 1 with some, 2 for a mistake in what was asked for, 130 after Ctrl-C.
    """
    return run_command(_run, argv, interrupted="interrupted; nothing was written")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `solov2 check-data`."""
    parser = argparse.ArgumentParser(prog="solov2 check-data", description="Check a COCO data set before training.")
    parser.add_argument("annotations", type=Path, help="annotation file in COCO's JSON format")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    parser.add_argument("--config", default="solov2_r50_fpn_1x", metavar="NAME", help="what to check sizes against")
    add_shared_arguments(parser, "--set", "--overwrite")
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help=f"processes, default {workers}")
    parser.add_argument("--show", type=int, default=20, metavar="N", help="findings of a kind to print, default 20")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings and figures")
    parser.add_argument(
        "--fix", type=Path, metavar="OUT", help="write a repaired annotation file, and what changed to OUT.changes.json"
    )
    return parser.parse_args(argv)


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    config = load_config(args.config, args.set)
    changes_file = None if args.fix is None else args.fix.with_name(f"{args.fix.name}.changes.json")
    if args.json is not None and args.json.resolve() == args.annotations.resolve():
        raise InputError(f"--json {args.json} would replace the annotations; name another file")
    check_output(args.json, "--json", overwrite=args.overwrite)
    for path in (args.fix, changes_file):
        if path is not None and path.exists():
            raise InputError(f"{path} exists already and is not overwritten; name another file")
        check_output(path, "--fix", overwrite=False)
    content = load_json(args.annotations)
    report = check_data(content, args.images, config, workers=args.workers)
    print("\n".join(report_lines(report, args.annotations, config, show=args.show)))
    if args.json is not None:
        write_json(args.json, to_json(report, args.annotations, config), indent=1)
    if changes_file is not None:
        print(_write_repaired(content, report, args.fix, changes_file))
    return 1 if report.counts()["error"] else 0


def _write_repaired(content: dict[str, Any], report: Report, path: Path, changes_file: Path) -> str:
    unusable = {f.image_id: f.message for f in report.findings if f.kind in UNUSABLE_FILES and f.image_id is not None}
    repaired, changes = repair(content, unusable)
    if not repaired["images"] or not repaired["annotations"] or not repaired["categories"]:
        raise InputError(f"nothing usable would be left in {path}, so it is not written")
    write_json(changes_file, changes, indent=1)
    write_json(path, repaired)
    removed = Counter(change["section"] for change in changes if change["action"] == "removed")
    parts = ", ".join(f"{count} {section}" for section, count in removed.items()) or "nothing"
    return f"wrote {path}: {len(changes)} changes, {parts} removed; {changes_file} lists them"


if __name__ == "__main__":
    sys.exit(main())
