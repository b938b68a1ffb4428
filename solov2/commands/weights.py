"""solov2 weights list, fetch MODEL, verify FILE: published weights, and what a weights file is."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solov2.commands.arguments import Parser, add_shared_arguments, text_stream
from solov2.commands.exit import FAILED, run_command
from solov2.commands.screen import show
from solov2.errors import InputError, RunFailed, printable
from solov2.outputs import check_outputs, replace_file, write_json

if TYPE_CHECKING:
    from solov2.published import PublishedFile

NEEDS = {"list": None, "fetch": "the name of a model", "verify": "a file"}  # action -> its TARGET


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0 done, 1 download or verification failed, 2 user error)."""
    return run_command("weights", build_parser, _run, argv)


def build_parser(typed: str = "solov2 weights") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(
        prog=typed,
        description="list: the published weights, with the mask AP of each file on COCO val2017, its license, and its "
        "path if it has been downloaded. fetch: download a file, unless the cache has it, and print its path. "
        "verify: name the family, hash and model of a file; exit code 1 if it is damaged, fits no model, or has the "
        "name of a published file and another hash.",
    )
    parser.add_argument("action", choices=tuple(NEEDS), help="what to do")
    parser.add_argument(
        "target", nargs="?", metavar="TARGET", help="fetch: MODEL, or MODEL:FAMILY for another file; verify: a file"
    )
    parser.add_argument("--output", metavar="FILE", help="fetch: also copy the file there (default: the cache alone)")
    add_shared_arguments(parser, "--json", "--overwrite")
    return parser


def _run(args: argparse.Namespace) -> int:
    needed = NEEDS[args.action]
    if (args.target is None) != (needed is None):
        raise InputError(f"weights {args.action} takes {needed or 'no other argument'}")
    if args.output is not None and args.action != "fetch":
        raise InputError(f"weights {args.action} has no --output")
    outputs = [("--output", args.output), ("--json", args.json)]
    inputs = [args.target] if args.action == "verify" else []
    check_outputs(outputs, overwrite=args.overwrite, inputs=inputs)
    return {"list": _list, "fetch": _fetch, "verify": _verify}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from solov2.published import PUBLISHED_FILES

    rows = [_describe(file) for file in PUBLISHED_FILES]
    lines = [f"{'model':<30}{'family':<11}{'official':<10}{'mask AP':>7}  {'license':<14}{'size':>8}  cached"]
    for row in rows:
        official, size = "yes" if row["official"] else "-", row["bytes"]
        lines.append(
            f"{row['model']:<30}{row['family']:<11}{official:<10}{100 * row['mask_AP']:>7.1f}  {row['license']:<14}"
            f"{'-' if size is None else f'{size / 1e6:.0f} MB':>8}  {row['cached'] or '-'}"
        )
    if args.json is not None:
        write_json(args.json, rows, indent=1)
    show(*lines, file=text_stream(args.json))
    return 0


def _describe(file: PublishedFile) -> dict[str, Any]:
    """One row of the list; mask_AP is a fraction, and what is not known is None."""
    from solov2.published import PUBLISHED_WEIGHTS

    cached = file.cached if file.cached.is_file() else None
    return {
        "model": file.model,
        "family": file.family,
        "official": PUBLISHED_WEIGHTS[file.model] is file,
        "file": file.name,
        "mask_AP": round(file.mask_ap / 100, 4),
        "license": file.license,
        "bytes": file.size or (None if cached is None else cached.stat().st_size),
        "sha256": file.sha256 or None,
        "urls": list(file.urls),
        "cached": None if cached is None else str(cached),
    }


def _fetch(args: argparse.Namespace) -> int:
    from solov2.download import download
    from solov2.published import find_published

    model, _, family = args.target.partition(":")
    file = find_published(model, family)
    try:
        path = download(file)
    except InputError as error:  # no mistake in what was asked for
        raise RunFailed(str(error)) from error
    if args.output is not None:
        target = Path(args.output)
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, replace_file(target) as copy:
            shutil.copyfileobj(source, copy)
        path = target
    if args.json is not None:
        write_json(args.json, {**_describe(file), "path": str(path)}, indent=1)
    show(str(path), file=text_stream(args.json))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from solov2.identify import identify

    path = args.target
    if not os.path.isfile(path):
        raise InputError(f"weights file {path} does not exist")
    try:
        found = identify(path)
    except InputError as error:  # no mistake in what was asked for
        raise RunFailed(str(error)) from error
    published, models = found.published, found.models
    equals = "no file whose hash is known"
    if published is not None:
        equals = f"{published.name} of {published.family}, for {published.model} (license: {published.license})"
    elif found.expected:
        equals = f"not {' or '.join(f'{file.name} of {file.family}' for file in found.expected)}, despite its name"
    fits = [*([] if found.own_model is None else [f"its own configuration ({printable(found.own_model)})"]), *models]
    if args.json is not None:
        report = {
            "file": str(path),
            "sha256": found.sha256,
            "family": found.family,
            "published": None if published is None else _describe(published),
            "expected": [_describe(file) for file in found.expected],
            "models": models,
            "own_model": found.own_model,
        }
        write_json(args.json, report, indent=1)
    show(
        f"file       {path}",
        f"SHA-256    {found.sha256}",
        f"published  {equals}",
        f"family     {found.family}",
        f"fits       {', '.join(fits) or 'no model'}",
        file=text_stream(args.json),
    )
    return 0 if fits and not found.expected else FAILED
