"""solov2 check-data ANNOTATIONS --images DIR: check a COCO dataset and, with --fix, write a repaired copy.

A panoptic annotation file is recognized by its `segments_info`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solov2.commands.arguments import Parser, add_shared_arguments, at_least, text_stream
from solov2.commands.exit import run_command
from solov2.commands.screen import show
from solov2.config import DEFAULT_MODEL, load_config
from solov2.errors import InputError, count
from solov2.outputs import check_outputs, write_json

if TYPE_CHECKING:
    from solov2.data_check.check import Report


DEFAULT_PANOPTIC = "solov2_panoptic_r50_fpn_1x"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0 if the data has no errors, 1 if it has, 2 for a user error, 130 after Ctrl-C.
    """
    return run_command("check-data", build_parser, _run, argv, interrupted="interrupted; nothing was written")


def build_parser(typed: str = "solov2 check-data") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(prog=typed, description="Check a dataset in COCO's format before training.")
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS", help="annotation file in COCO's JSON format")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    parser.add_argument(
        "--segments",
        type=Path,
        metavar="DIR",
        help="folder of the PNGs of panoptic annotations (default: the path of ANNOTATIONS without .json)",
    )
    parser.add_argument(
        "--fix",
        metavar="FILE",
        help="write a repaired annotation file, and the changes to FILE.changes.json (default: none)",
    )
    parser.add_argument(
        "--show", type=at_least(0), default=20, metavar="N", help="maximum number of findings of each kind to print"
    )
    notes = {
        "--config": f"for checking the sizes; default: {DEFAULT_MODEL}, or {DEFAULT_PANOPTIC} for panoptic files",
        "--workers": "default: one per core, at most 8",
    }
    add_shared_arguments(parser, "--config", "--json", "--workers", "--set", "--overwrite", notes=notes)
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2.data.annotations import parse_json, require_instances
    from solov2.data.build import worker_count
    from solov2.data.panoptic_annotations import require_panoptic
    from solov2.data.panoptic_file import segments_folder
    from solov2.data.recognize import is_panoptic
    from solov2.data_check.check import check_data
    from solov2.data_check.panoptic import check_panoptic_data
    from solov2.data_check.report import report_lines, to_json

    config = load_config(args.model or DEFAULT_MODEL, args.set)  # a mistake in it is reported before data is read
    fixed = None if args.fix is None else Path(args.fix)
    changes_file = None if fixed is None else fixed.with_name(f"{fixed.name}.changes.json")
    outputs = (("--json", args.json), ("--fix", fixed), ("--fix", changes_file))
    check_outputs(outputs, overwrite=args.overwrite, inputs=[args.annotations, args.model])
    content = parse_json(args.annotations)
    panoptic = is_panoptic(content)
    model = args.model or (DEFAULT_PANOPTIC if panoptic else DEFAULT_MODEL)
    config = load_config(model, args.set)
    content = (require_panoptic if panoptic else require_instances)(content, args.annotations)
    check_outputs(outputs, overwrite=args.overwrite, inputs=_files(content["images"], args.images))
    workers = worker_count("auto" if args.workers is None else args.workers)
    if panoptic:
        folder = segments_folder(args.annotations, args.segments)
        check_outputs(outputs, overwrite=args.overwrite, inputs=_files(content["annotations"], folder))
        report = check_panoptic_data(content, args.images, folder, config, workers=workers)
    else:
        report = check_data(content, args.images, config, workers=workers)
    lines = report_lines(report, args.annotations, config, model=model, show=args.show)
    try:
        if args.json is not None:
            write_json(args.json, to_json(report, args.annotations, config), indent=1)
        if fixed is not None and changes_file is not None:
            lines.append(_write_repaired(report, fixed, changes_file))
            lines += [f"its PNGs are still in {folder}; name that folder together with the file"] if panoptic else []
    finally:  # the findings are not lost with a file that cannot be written
        show(*lines, file=text_stream(args.json))
    return 1 if report.counts()["error"] else 0


def _files(entries: Sequence[Any], folder: Path) -> Iterator[Path]:
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str):
            yield folder / entry["file_name"]


def _write_repaired(report: Report, path: Path, changes_file: Path) -> str:
    repaired, changes = report.repaired, report.changes
    if not repaired["images"] or not repaired["annotations"] or not repaired["categories"]:
        raise InputError(f"nothing usable would be left in {path}, so it was not written")
    write_json(changes_file, changes, indent=1)
    write_json(path, repaired)
    removed = Counter(change["section"] for change in changes if change["action"] == "removed")
    parts = ", ".join(f"{number} {section}" for section, number in removed.items()) or "nothing"
    return f"wrote {path}: {count(len(changes), 'change')}, {parts} removed; {changes_file} lists them"
