"""solov2 predict SOURCE... --weights FILE: segment images and draw the results."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from solov2.commands.arguments import LIMITS, Parser, add_shared_arguments, given, model_settings, text_stream
from solov2.commands.exit import run_command
from solov2.config import parse_overrides
from solov2.errors import InputError, printable
from solov2.outputs import check_outputs, fold_name, write_json, write_picture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from solov2.data.panoptic_results import PanopticWriter
    from solov2.models.solov2 import SOLOv2

Item = TypeVar("Item")
Made = TypeVar("Made")

SCORE_THRESHOLD = 0.3
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")  # pictures of other inputs are written as PNG


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        0; 1 if some images could not be read (the others are done); 2 for a user error; 130 after Ctrl-C.
    """
    return run_command(
        "predict",
        build_parser,
        _run,
        argv,
        interrupted="interrupted; the pictures written so far are complete",
        save_memory="lower --batch-size, use --precision bf16 or smaller images; the pictures so far are complete",
    )


def build_parser(typed: str = "solov2 predict") -> Parser:
    """Build the parser; `typed` is the command as the user typed it."""
    parser = Parser(prog=typed, description="Segment images and draw the results.")
    parser.add_argument(
        "images", nargs="+", metavar="SOURCE", help="image file, or folder of images with its subfolders"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("predictions"), metavar="DIR", help="folder for the pictures"
    )
    parser.add_argument(
        "--panoptic",
        action="store_true",
        help="with a panoptic model: draw things and stuff, and write them in COCO's panoptic format, as panoptic.json "
        "and panoptic/ in DIR; things need a score of model.panoptic_score_threshold (see --set)",
    )
    add_shared_arguments(
        parser,
        "--config",
        "--weights",
        "--classes",
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
            "--score-threshold": f"default: model.score_threshold of --set, else {SCORE_THRESHOLD}, or with --panoptic "
            "model.panoptic_score_threshold if that is lower",
        },
        required=("--weights",),
    )
    parser.set_defaults(batch_size=1, precision="tf32")
    return parser


def _run(args: argparse.Namespace) -> int:
    from solov2.build import build_model, resolve_config
    from solov2.class_rows import restrict_classes
    from solov2.compute import reuse_freed_memory, select_device
    from solov2.weights import find_checkpoint

    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; name a folder for the pictures")
    jobs = plan_outputs(find_sources(args.images, args.output), args.output, panoptic=args.panoptic)
    files = [picture for _, picture in jobs]
    if args.panoptic:
        segments = args.output / "panoptic"
        files += [segments.with_suffix(".json")]
        files += [(segments / picture.relative_to(args.output)).with_suffix(".png") for _, picture in jobs]
    outputs = [*(("--output", file) for file in files), ("--results", args.results)]
    check_outputs(outputs, overwrite=args.overwrite, inputs=[args.weights, args.model, *(image for image, _ in jobs)])
    checkpoint = find_checkpoint(args.weights, args.model)
    overrides = parse_overrides(args.set)
    config = resolve_config(args.model, checkpoint, overrides)
    if args.panoptic and not config.model.num_stuff:
        raise InputError(
            "--panoptic needs the weights of a panoptic model, such as solov2_panoptic_r50_fpn_3x; this model has no "
            "semantic head"
        )
    if args.score_threshold is None and "model.score_threshold" not in overrides:
        lowest = config.model.panoptic_score_threshold if args.panoptic else SCORE_THRESHOLD
        args.score_threshold = min(SCORE_THRESHOLD, lowest)
    reuse_freed_memory()
    device = select_device(args.device)
    changes = model_settings(overrides) | given(args, LIMITS)
    model = build_model(config if args.model else None, weights=checkpoint, device=device, **changes)
    if args.classes:
        restrict_classes(model, args.classes, str(args.weights))
    return _predict_all(model, jobs, args, config.data.max_image_pixels)


def find_sources(inputs: Sequence[str | Path], output: Path) -> list[tuple[Path, Path]]:
    """List the images to predict: the files given, and those in the folders given and their subfolders.

    Pictures that an earlier run wrote to `output` are left out, if it is inside one of the folders; so are duplicates.

    Returns:
        (image, folder of its picture relative to `output`): the subfolders are kept.

    Raises:
        InputError: a path does not exist or is no file or folder, or a folder contains no images.
    """
    from solov2.ops.image_files import check_file, find_images

    found: dict[Path, tuple[Path, Path]] = {}
    for path in map(Path, inputs):
        if not path.is_dir():
            check_file(path)
            found.setdefault(path.resolve(), (path, Path()))
            continue
        earlier = output.resolve()
        nested = path.resolve() in earlier.parents
        for file in find_images(path):
            if not (nested and earlier in file.resolve().parents):
                found.setdefault(file.resolve(), (file, file.parent.relative_to(path)))
    if not found:
        raise InputError(f"the only images are those in --output {output}, which are not predicted again")
    return list(found.values())


def plan_outputs(
    sources: Sequence[tuple[Path, Path]], folder: str | Path, *, panoptic: bool = False
) -> list[tuple[Path, Path]]:
    """Pair each image with the picture to write: the same name in `folder`, with _2, _3, ... added to duplicate names.

    Args:
        sources: see `find_sources`.
        folder: of the pictures.
        panoptic: names that differ only in their suffix are duplicates, too, since the segments of both are PNGs.
    """

    def key(picture: Path) -> str:  # some file systems ignore case
        return fold_name(str(picture.with_suffix("") if panoptic else picture))

    jobs, taken = [], set()
    for image, subfolder in sources:
        suffix = image.suffix if image.suffix.lower() in PICTURE_SUFFIXES else ".png"
        number, picture = 1, Path(folder, subfolder, f"{image.stem}{suffix}")
        while key(picture) in taken:
            number += 1
            picture = picture.with_name(f"{image.stem}_{number}{suffix}")
        taken.add(key(picture))
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


def _predict_all(model: SOLOv2, jobs: Sequence[tuple[Path, Path]], args: argparse.Namespace, max_pixels: int) -> int:
    """Predict the images; while an accelerator computes a batch, two threads read the next and draw the last."""
    from solov2.ops.images import to_rgb_tensor
    from solov2.predict import predict_images
    from solov2.visualize import draw_instances
    from solov2.visualize_panoptic import draw_panoptic

    def read(job: tuple[Path, Path]) -> Tensor:
        return to_rgb_tensor(job[0], max_pixels=max_pixels)

    def draw(found: tuple[int, Tensor, Mapping[str, Any]]) -> None:
        number, pixels, result = found
        picture = jobs[number][1]
        if segments is None:
            drawn = draw_instances(pixels, result, model.class_names, score_threshold=0.0)
        else:
            segments.add(number + 1, picture.relative_to(args.output).as_posix(), result)
            drawn = draw_panoptic(pixels, result, model)
        write_picture(picture, drawn)

    segments = _panoptic_writer(args.output, model) if args.panoptic else None
    args.output.mkdir(parents=True, exist_ok=True)
    ahead = _images_ahead(model.device, args.batch_size)
    entries: list[dict[str, Any]] = []
    done = 0
    waiting: deque[tuple[int, Tensor]] = deque()  # images whose results have not arrived: one batch at most
    with (
        contextlib.nullcontext() if segments is None else contextlib.closing(segments),  # after Ctrl-C as well
        _thread() as reader,
        _thread() as writer,
        tqdm(total=len(jobs), unit="image", disable=len(jobs) == 1) as progress,
    ):
        images = _readable(_ahead(reader, read, jobs, ahead), waiting)
        results = predict_images(model, images, args.batch_size, "rle", args.precision, {}, panoptic=args.panoptic)
        found = ((*waiting.popleft(), _on_host(result)) for result in results)
        for (number, _, result), written in _ahead(writer, draw, found, ahead):
            written.result()
            done += 1
            image, picture = jobs[number]
            entries += coco_entries(number + 1, str(image), result, model)
            line = printable(_report(image, picture, result, model))
            progress.write(line, file=text_stream(args.results))
            progress.update(number + 1 - progress.n)  # also past images that could not be read
    if args.results is not None:
        write_json(args.results, entries)
    return 0 if done == len(jobs) else 1


def _panoptic_writer(folder: Path, model: SOLOv2) -> PanopticWriter:
    """Writes panoptic results under the model's own category ids and names."""
    from solov2.data.panoptic_annotations import Category
    from solov2.data.panoptic_results import PanopticWriter

    things = zip(model.category_ids, model.class_names, strict=True)
    stuff = zip(model.stuff_category_ids, model.stuff_names, strict=True)
    categories = [*(Category(*named, True) for named in things), *(Category(*named, False) for named in stuff)]
    return PanopticWriter(folder, categories, model.category_ids, model.stuff_category_ids)


def _images_ahead(device: torch.device, batch_size: int) -> int:
    """How many images each thread works ahead. On a CPU none, because all would compete for the same cores."""
    return 0 if device.type == "cpu" else batch_size


@contextlib.contextmanager
def _thread() -> Iterator[ThreadPoolExecutor]:
    """A thread that in the end completes what it has begun, such as writing a file, and drops everything else."""
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


def _ahead(
    thread: ThreadPoolExecutor, function: Callable[[Item], Made], items: Iterable[Item], count: int
) -> Iterator[tuple[Item, Future[Made]]]:
    """Each item, in order, with the future of function(item), which the thread computes while the caller does other
    work; the items are taken at most `count` ahead of the caller, so that memory is bounded.
    """
    begun: deque[tuple[Item, Future[Made]]] = deque()
    for item in items:
        begun.append((item, thread.submit(function, item)))
        if len(begun) > count:
            yield begun.popleft()
    while begun:
        yield begun.popleft()


def _readable(
    images: Iterable[tuple[tuple[Path, Path], Future[Tensor]]], waiting: deque[tuple[int, Tensor]]
) -> Iterator[Tensor]:
    """Yield each readable image, uint8 [3, H, W], upright by EXIF, and append it to `waiting` with its number; report
    the others on stderr.
    """
    for number, (_, reading) in enumerate(images):
        try:
            pixels = reading.result()
        except InputError as error:
            tqdm.write(f"error: {printable(str(error))}", file=sys.stderr)
            continue
        waiting.append((number, pixels))
        yield pixels


def _on_host(result: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the tensors of a result to the host now: later, a copy would wait for the network of the next batch."""
    lists = ("masks", "segments")  # the masks are RLEs
    return {key: value if key in lists else value.cpu() for key, value in result.items()}


def _report(image: Path, picture: Path, result: Mapping[str, Any], model: SOLOv2) -> str:
    """The line for an image: how many instances or things of each class, and which stuff."""
    labels, stuff, nothing = result["labels"].tolist(), [], f"at score {model.settings.score_threshold:g} or above"
    if "segments" in result:
        labels = [segment["label"] for segment in result["segments"] if segment["is_thing"]]
        stuff = [model.stuff_names[segment["label"]] for segment in result["segments"] if not segment["is_thing"]]
        nothing = "that becomes a segment"
    counts = Counter(model.class_names[label] for label in labels)
    found = ", ".join([*(f"{count} {name}" for name, count in counts.most_common()), *stuff])
    return f"{image}: {found or f'nothing found {nothing}, picture unchanged'} -> {picture}"
