"""solov2 predict SOURCE... --weights FILE: segment photographs and draw what was found."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from solov2.build import build_model
from solov2.commands.arguments import add_shared_arguments
from solov2.commands.exit import run_command
from solov2.compute import select_device
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.ops.images import read_image
from solov2.outputs import check_output, write_json
from solov2.visualize import draw_instances

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")  # other inputs are drawn as PNG


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process where None.

    Returns:
        0; 1 if some images could not be read (the others are done); 2 for a mistake in what was asked for; 130 after
        Ctrl-C.
    """
    return run_command(_run, argv, interrupted="interrupted; the pictures written so far are complete")


def _run(argv: Sequence[str]) -> int:
    args = parse_arguments(argv)
    jobs = plan_outputs(find_images(args.images), args.output, overwrite=args.overwrite)
    check_output(args.json, "--json", overwrite=args.overwrite)
    model = build_model(args.model, weights=args.weights, device=select_device(args.device))
    return _predict_all(model, jobs, args)


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """Image files named by paths and folders; those of a folder in order of name. A file named twice counts once.

    Raises:
        InputError: a path that does not exist, or a folder without images.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, inputs):
        if not path.exists():
            raise InputError(f"{path} does not exist; name image files or folders with images")
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if _is_image(file))
            if not files:
                raise InputError(f"folder {path} holds no images ({' '.join(IMAGE_SUFFIXES)})")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def plan_outputs(images: Sequence[Path], folder: str | Path, *, overwrite: bool = False) -> list[tuple[Path, Path]]:
    """Pair each image with the picture to write: same name, in `folder`; a name that is taken gets _2, _3 and so on.

    Raises:
        InputError: a picture would replace an input, or an existing file without `overwrite`.
    """
    inputs = {image.resolve() for image in images}
    jobs, taken = [], set()
    for image in images:
        suffix = image.suffix if image.suffix.lower() in PICTURE_SUFFIXES else ".png"
        number, name = 1, f"{image.stem}{suffix}"
        while name.casefold() in taken:  # some file systems do not tell a.jpg from A.jpg
            number += 1
            name = f"{image.stem}_{number}{suffix}"
        taken.add(name.casefold())
        picture = Path(folder) / name
        if picture.resolve() in inputs:
            raise InputError(f"the picture of {image} would replace the input {picture}; give another --output")
        if picture.exists() and not overwrite:
            raise InputError(f"{picture} exists already; give another --output or --overwrite")
        jobs.append((image, picture))
    return jobs


def coco_entries(image_id: int, file_name: str, result: Mapping[str, Any], model: SOLOv2) -> list[dict]:
    """One image's result as JSON-ready entries of COCO results format, with the names of file and class added.

    Args:
        image_id: number of the image in this run.
        file_name: path of the image as it was given.
        result: `scores` float32 [N], `labels` int64 [N], `masks` N RLE, `boxes` float32 [N, 4] xyxy.
        model: has the name and the category id of each label.
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


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `solov2 predict`."""
    parser = argparse.ArgumentParser(prog="solov2 predict", description="Segment photographs and draw what was found.")
    parser.add_argument("images", nargs="+", help="image files, and folders with images")
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="checkpoint; official: the published one of --model"
    )
    parser.add_argument("--model", metavar="NAME", help="model name; default: what the checkpoint says")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="default: predictions/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the instances in COCO results format too")
    parser.add_argument("--score-threshold", type=_share, default=0.3, metavar="X", help="minimum score, default 0.3")
    parser.add_argument("--max-instances", type=_positive, metavar="N", help="maximum instances per image")
    parser.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="images at a time, default 1")
    add_shared_arguments(parser, "--device", "--overwrite")
    return parser.parse_args(argv)


def _predict_all(model: SOLOv2, jobs: Sequence[tuple[Path, Path]], args: argparse.Namespace) -> int:
    args.output.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    unreadable = 0
    with tqdm(total=len(jobs), unit="image", disable=len(jobs) == 1) as progress:
        for batch in _batches(jobs, args.batch_size):
            readable = list(_read(jobs, batch))
            unreadable += len(batch) - len(readable)
            results = model.predict(
                [pixels for _, pixels in readable],
                score_threshold=args.score_threshold,
                max_instances=args.max_instances,
                batch_size=args.batch_size,
                mask_format="rle",
            )
            for (number, pixels), result in zip(readable, results, strict=True):
                image, picture = jobs[number]
                drawn = draw_instances(pixels, result, model.class_names, score_threshold=0.0)
                drawn.save(picture, quality=95, subsampling=0)  # JPEG's usual half-resolution color blurs the labels
                entries += coco_entries(number + 1, str(image), result, model)
                progress.write(_report(image, picture, result["labels"].tolist(), model.class_names, args))
            progress.update(len(batch))
    if args.json is not None:
        write_json(args.json, entries)
    return 1 if unreadable else 0


def _batches(jobs: Sequence[Any], size: int) -> list[range]:
    return [range(start, min(start + size, len(jobs))) for start in range(0, len(jobs), size)]


def _read(jobs: Sequence[tuple[Path, Path]], batch: range) -> Iterator[tuple[int, Tensor]]:
    """The readable images of a batch, uint8 [3, H, W], turned upright; the others are named on stderr."""
    for number in batch:
        try:
            yield number, read_image(jobs[number][0], apply_exif=True)
        except (InputError, OSError) as error:
            tqdm.write(f"error: {error}", file=sys.stderr)


def _report(
    image: Path, picture: Path, labels: Sequence[int], class_names: Sequence[str], args: argparse.Namespace
) -> str:
    if not labels:
        return f"{image}: nothing found at score {args.score_threshold:g} or above, picture unchanged -> {picture}"
    counts = Counter(class_names[label] for label in labels)
    found = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"{image}: {found} -> {picture}"


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
