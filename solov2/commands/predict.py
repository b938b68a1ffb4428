"""solov2 predict SOURCE... --weights FILE: segment images and draw the results."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from solov2.commands.arguments import LIMITS, Parser, add_shared_arguments, given, model_settings, text_stream
from solov2.commands.exit import run_command
from solov2.config import parse_overrides
from solov2.errors import InputError
from solov2.outputs import check_outputs, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from solov2.models.solov2 import SOLOv2
    from solov2.predict import Predictor

SCORE_THRESHOLD = 0.3
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")  # pictures of other inputs are written as PNG


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0; 1 if some images could not be read (the others are done); 2 for a user error; 130 after Ctrl-C.
    """
    return run_command(
        "predict", build_parser, _run, argv, interrupted="interrupted; the pictures written so far are complete"
    )


def build_parser(typed: str = "solov2 predict") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(prog=typed, description="Segment images and draw the results.")
    parser.add_argument("images", nargs="+", metavar="SOURCE", help="image file or folder of images")
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), metavar="DIR", help="folder for the pictures"
    )
    add_shared_arguments(
        parser,
        "--config",
        "--weights",
        "--results",
        "--score-threshold",
        "--max-instances",
        "--device",
        "--precision",
        "--batch-size",
        "--set",
        "--overwrite",
        notes={
            "--config": "default: from the checkpoint",
            "--max-instances": "default: the model's",
            "--score-threshold": f"default: model.score_threshold of --set, else {SCORE_THRESHOLD}",
        },
        required=("--weights",),
    )
    parser.set_defaults(batch_size=1, precision="float32")
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2.build import build_model, resolve_config
    from solov2.compute import Compute, select_device
    from solov2.predict import Predictor
    from solov2.weights import find_checkpoint

    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; name a folder for the pictures")
    jobs = plan_outputs(find_images(args.images), args.output, overwrite=args.overwrite)
    files = [args.weights, *(path for job in jobs for path in job)]
    check_outputs([("--results", args.results)], overwrite=args.overwrite, inputs=files)
    checkpoint = find_checkpoint(args.weights, args.model)
    overrides = parse_overrides(args.set)
    if args.score_threshold is None and "model.score_threshold" not in overrides:
        args.score_threshold = SCORE_THRESHOLD
    config = resolve_config(args.model, checkpoint, overrides)
    device = select_device(args.device)
    changes = model_settings(overrides) | given(args, LIMITS)
    model = build_model(config if args.model else None, weights=checkpoint, device=device, **changes)
    return _predict_all(model, Predictor(model, Compute(device, args.precision)), jobs, args)


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """List image files, given by paths and folders; those of a folder are sorted by name. Duplicates are dropped.

    Raises:
        InputError: a path does not exist, or a folder contains no images.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, inputs):
        if not path.exists():
            raise InputError(f"{path} does not exist; give image files or folders of images")
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if _is_image(file))
            if not files:
                raise InputError(f"folder {path} contains no images ({' '.join(IMAGE_SUFFIXES)})")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def plan_outputs(images: Sequence[Path], folder: str | Path, *, overwrite: bool = False) -> list[tuple[Path, Path]]:
    """Pair each image with the picture to write: the same name in `folder`, with _2, _3, ... added to duplicate names.

    Raises:
        InputError: a picture would replace an input, or an existing file without `overwrite`.
    """
    inputs = {image.resolve() for image in images}
    jobs, taken = [], set()
    for image in images:
        suffix = image.suffix if image.suffix.lower() in PICTURE_SUFFIXES else ".png"
        number, name = 1, f"{image.stem}{suffix}"
        while name.casefold() in taken:  # some file systems ignore case
            number += 1
            name = f"{image.stem}_{number}{suffix}"
        taken.add(name.casefold())
        picture = Path(folder) / name
        if picture.resolve() in inputs:
            raise InputError(f"the picture of {image} would replace the input {picture}; give another --output")
        if picture.exists() and not overwrite:
            raise InputError(f"{picture} already exists; give another --output or --overwrite")
        jobs.append((image, picture))
    return jobs


def coco_entries(image_id: int, file_name: str, result: Mapping[str, Any], model: SOLOv2) -> list[dict]:
    """The result of one image in COCO's results format, ready for JSON, with file and class names added.

    Args:
        image_id: number of the image in this run.
        file_name: path of the image, as given.
        result: `scores` float32 [N], `labels` int64 [N], `masks` N RLE, `boxes` float32 [N, 4] xyxy.
        model: has the class name and the category id of each label.
    """
    rows = zip(*(result[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    return [
        {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": model.category_ids[label],
            "category_name": model.class_names[label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": rle,
            "score": score,
        }
        for (label, score, (x0, y0, x1, y1)), rle in zip(rows, result["masks"], strict=True)
    ]


def _predict_all(
    model: SOLOv2, predictor: Predictor, jobs: Sequence[tuple[Path, Path]], args: argparse.Namespace
) -> int:
    from solov2.visualize import draw_instances

    args.output.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    unreadable = 0
    with tqdm(total=len(jobs), unit="image", disable=len(jobs) == 1) as progress:
        for batch in _batches(jobs, args.batch_size):
            readable = list(_read(jobs, batch))
            unreadable += len(batch) - len(readable)
            if readable:
                predictor.launch(model.load_batch([pixels for _, pixels in readable]))
            for (number, pixels), result in zip(readable, predictor.collect() if readable else [], strict=True):
                image, picture = jobs[number]
                drawn = draw_instances(pixels, result, model.class_names, score_threshold=0.0)
                drawn.save(picture, quality=95, subsampling=0)  # chroma subsampling would blur the labels
                entries += coco_entries(number + 1, str(image), result, model)
                line = _report(image, picture, result["labels"].tolist(), model)
                progress.write(line, file=text_stream(args.results))
            progress.update(len(batch))
    if args.results is not None:
        write_json(args.results, entries)
    return 1 if unreadable else 0


def _batches(jobs: Sequence[Any], size: int) -> list[range]:
    return [range(start, min(start + size, len(jobs))) for start in range(0, len(jobs), size)]


def _read(jobs: Sequence[tuple[Path, Path]], batch: range) -> Iterator[tuple[int, Tensor]]:
    """Yield (number, uint8 [3, H, W], upright by EXIF) for each readable image; report the others on stderr."""
    from solov2.ops.images import read_image

    for number in batch:
        try:
            yield number, read_image(jobs[number][0], apply_exif=True)
        except (InputError, OSError) as error:
            tqdm.write(f"error: {error}", file=sys.stderr)


def _report(image: Path, picture: Path, labels: Sequence[int], model: SOLOv2) -> str:
    if not labels:
        threshold = model.settings.score_threshold
        return f"{image}: nothing found at score {threshold:g} or above, picture unchanged -> {picture}"
    counts = Counter(model.class_names[label] for label in labels)
    found = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{image}: {found} -> {picture}"
