"""solov2 import SOURCE --output FILE.json: read annotations of another tool and write them in COCO's format."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solov2.commands.arguments import Parser, add_shared_arguments
from solov2.commands.exit import run_command
from solov2.commands.screen import show
from solov2.errors import InputError, count
from solov2.outputs import check_outputs, write_json

if TYPE_CHECKING:
    from solov2.formats.annotated import AnnotatedImage, Reading

FORMATS = ("coco", "labelme", "yolo", "voc", "cityscapes", "masks", "cvat", "label-studio", "via")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0 done, 2 for a user error, 130 after Ctrl-C.
    """
    return run_command("import", build_parser, _run, argv, interrupted="interrupted; nothing was written")


def build_parser(typed: str = "solov2 import") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(
        prog=typed,
        description="Read annotations of other tools and write them in COCO's format. A source that is divided into "
        "training and validation gives FILE_train.json and FILE_val.json (and FILE_test.json), and so does "
        "--val-split; any other gives FILE.json.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or file of annotations")
    parser.add_argument("--format", choices=FORMATS, help="format of SOURCE (default: recognized by its content)")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the images (default: where the format expects them)"
    )
    parser.add_argument(
        "--val-split",
        type=_share,
        metavar="X",
        help="share of the images for validation, stratified by class; images of one folder and name prefix stay "
        "together; replaces the split of the source; 0: one file (default: the split of the source)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="file to write")
    add_shared_arguments(parser, "--overwrite")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def _run(args: argparse.Namespace) -> int:
    from solov2.formats.annotated import to_coco
    from solov2.formats.recognize import read
    from solov2.formats.split import split

    if args.output.suffix.lower() != ".json":
        raise InputError(f"--output {args.output}: name a file that ends in .json")
    check_outputs([("--output", args.output)], overwrite=True, inputs=[args.source])
    reading = read(args.source, args.images, args.format)
    parts: dict[str, list[AnnotatedImage]] = {}
    notes: list[str] = []
    if args.val_split is None:
        for image in reading.images:
            parts.setdefault(image.split or "train", []).append(image)
    elif args.val_split:
        parts["train"], parts["val"], groups = split(reading.images, args.val_split)
        notes = [f"split into parts of {count(groups, 'group')} of related images, by folder and name prefix"]
    else:
        parts["train"] = reading.images
    whole = len(parts) == 1
    paths = {name: args.output if whole else args.output.with_stem(f"{args.output.stem}_{name}") for name in parts}
    inputs = [args.source, *args.source.rglob("*.json"), *(reading.root / image.file_name for image in reading.images)]
    check_outputs([("--output", path) for path in paths.values()], overwrite=args.overwrite, inputs=inputs)
    contents = {name: to_coco(reading, images) for name, images in parts.items()}
    for name, path in paths.items():
        write_json(path, contents[name])
    show(
        *_summary(reading, contents),
        *notes,
        *(f"wrote {paths[name]}: {_size(content)}" for name, content in contents.items()),
        *_next_steps(reading, paths),
    )
    return 0


def _summary(reading: Reading, contents: dict[str, dict[str, Any]]) -> list[str]:
    """What was read, the number of instances of each class in each part, and what was left out."""
    names = {category["id"]: category["name"] for content in contents.values() for category in content["categories"]}
    table = {
        part: Counter(annotation["category_id"] for annotation in content["annotations"])
        for part, content in contents.items()
    }
    width = max(5, *(len(name) for name in names.values()))
    head = "".join(f"{part if len(table) > 1 else 'instances':>12}" for part in table)
    rows = [
        f"{name:<{width}}{''.join(f'{found[key]:>12,}' for found in table.values())}" for key, name in names.items()
    ]
    lost = reading.losses.lines()
    return [
        f"{reading.source}: {count(len(reading.images), 'image')}",
        f"{'class':<{width}}{head}",
        *rows,
        *([f"left out or changed: {line}" for line in lost] or ["nothing was left out or changed"]),
    ]


def _size(content: dict[str, Any]) -> str:
    empty = len(content["images"]) - len({annotation["image_id"] for annotation in content["annotations"]})
    crowds = sum(annotation["iscrowd"] for annotation in content["annotations"])
    bare = f" ({empty:,} without an instance)" if empty else ""
    regions = f" ({count(crowds, 'crowd')} among them)" if crowds else ""
    return f"{count(len(content['images']), 'image')}{bare}, {count(len(content['annotations']), 'instance')}{regions}"


def _next_steps(reading: Reading, paths: dict[str, Path]) -> list[str]:
    """The commands that use the files."""
    images = shlex.quote(str(reading.root))
    train = shlex.quote(str(paths.get("train", next(iter(paths.values())))))
    words = f"solov2 train --train-annotations {train} --train-images {images}"
    if "val" in paths and "train" in paths:
        words += f" --val-annotations {shlex.quote(str(paths['val']))} --val-images {images}"
    else:
        words += " --evaluate-every 0"
    return [f"to check: solov2 check-data {train} --images {images}", f"to train: {words}"]
