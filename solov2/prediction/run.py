"""The loop of `solov2 predict`: read, predict and write many images, and log each that is finished."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from solov2.errors import InputError, printable
from solov2.models.solov2 import SOLOv2
from solov2.predict import predict_images
from solov2.prediction.finished import FinishedLog
from solov2.prediction.sources import Job, read_source
from solov2.prediction.video import open_video, video_writer
from solov2.prediction.writers import Item, ResultWriter
from solov2.tiles import predict_tiles
from solov2.views import View, predict_views

Made = TypeVar("Made")
Given = TypeVar("Given")


@dataclass(frozen=True)
class ImagePredictor:
    """How images are predicted: by batches, in a given precision, or tile by tile.

    Attributes:
        model: in any mode, which it keeps.
        batch_size: images per forward pass.
        precision: of the network, see `SOLOv2.predict`.
        panoptic: results have the panoptic segments, too.
        tile: side of the tiles of large photographs, see `solov2.tiles.predict_tiles`; None: each image as a whole.
        views: of test-time augmentation, see `solov2.views.parse_views`; none: only the image itself.
    """

    model: SOLOv2
    batch_size: int = 1
    precision: str = "tf32"
    panoptic: bool = False
    tile: int | None = None
    views: Sequence[View] = ()

    def predict(self, images: Iterable[Tensor]) -> Iterator[dict[str, Any]]:
        """The result of each image, uint8 [3, H, W], with masks as RLEs; images are taken one batch ahead."""
        model, size, precision = self.model, self.batch_size, self.precision
        if self.tile is not None:
            for image in images:
                yield predict_tiles(model, image, self.tile, views=self.views, batch_size=size, precision=precision)
        elif self.views:
            yield from predict_views(model, images, self.views, batch_size=size, precision=precision)
        else:
            yield from predict_images(model, images, size, "rle", precision, {}, panoptic=self.panoptic)


def predict_jobs(
    jobs: Sequence[Job],
    predictor: ImagePredictor,
    writer: ResultWriter,
    log: FinishedLog,
    *,
    max_pixels: int,
    stream: TextIO,
    show_progress: bool = True,
) -> list[str]:
    """Predict images; while an accelerator computes a batch, two threads read the next and write the last.

    Args:
        jobs: the images.
        predictor: of their instances.
        writer: of their files.
        log: receives a line for each image once its files are complete.
        max_pixels: maximum width x height of an image.
        stream: for a line about each image.
        show_progress: with a bar on standard error.

    Returns:
        The names of the images that could not be read; each was reported on standard error.
    """
    model, unreadable = predictor.model, list[str]()

    def read(job: Job) -> Tensor:
        return read_source(job.source, max_pixels)

    def write(found: tuple[Job, Tensor, Mapping[str, Any]]) -> None:
        job, pixels, result = found
        line = writer.write(Item(job.name, job.source.name, job.picture), job.number, pixels, result)
        log.add({"name": job.name.as_posix(), **line})

    ahead = _images_ahead(model.device, predictor.batch_size)
    waiting: deque[tuple[Job, Tensor]] = deque()  # images whose results have not arrived: one batch at most
    with (
        _thread() as reading,
        _thread() as writing,
        tqdm(total=len(jobs), unit="image", disable=len(jobs) == 1 or not show_progress) as progress,
    ):
        images = _readable(_ahead(reading, read, jobs, ahead), waiting, unreadable)
        found = ((*waiting.popleft(), on_host(result)) for result in predictor.predict(images))
        places = {job.number: place for place, job in enumerate(jobs, start=1)}
        for (job, _, result), written in _ahead(writing, write, found, ahead):
            written.result()
            progress.write(printable(report(job, result, writer)), file=stream)
            progress.update(places[job.number] - progress.n)  # also past images that could not be read
    return unreadable


def predict_video(
    job: Job, predictor: ImagePredictor, writer: ResultWriter, log: FinishedLog, *, max_pixels: int, stream: TextIO
) -> None:
    """Predict the frames of a video, or of a camera until Ctrl-C, and write each like an image and their pictures as a
    video.

    The arguments are those of `predict_jobs`. The log gets a line for each frame, and at the end one with their number.

    Raises:
        InputError: the video cannot be read; the frames before a damaged one are lost as well.
    """
    counts, number = Counter[str](), 0
    with contextlib.ExitStack() as stack:
        video = stack.enter_context(open_video(job.source, max_pixels))
        drawn = None
        if "pictures" in writer.formats:
            drawn = stack.enter_context(video_writer(writer.folder / job.picture, video.rate))
        waiting: deque[Tensor] = deque()
        frames = tqdm(_kept(video.frames, waiting), desc=job.source.name, unit="frame", leave=False, disable=None)
        with contextlib.suppress(*([KeyboardInterrupt] if job.source.kind == "camera" else [])):
            for number, result in enumerate(map(on_host, predictor.predict(frames)), start=1):
                pixels = waiting.popleft()
                name = job.name / f"{number:06d}.png"
                line = writer.write(Item(name, f"{job.source.name}/{number:06d}", None), job.number, pixels, result)
                log.add({"name": job.name.as_posix(), "frame": number, **line})
                counts.update(writer.model.class_names[label] for label in result["labels"].tolist())
                if drawn is not None:
                    drawn.add(writer.draw(pixels, result))
        if number == 0:
            raise InputError(f"{job.source.name} has no pictures")
    log.add({"name": job.name.as_posix(), "frames": number})
    found = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "nothing found"
    place = writer.folder / job.picture if "pictures" in writer.formats else writer.folder
    tqdm.write(printable(f"{job.source.name}: {number} frames, {found} -> {place}"), file=stream)


def _kept(frames: Iterable[Tensor], waiting: deque[Tensor]) -> Iterator[Tensor]:
    """The frames, each also appended to `waiting`."""
    for frame in frames:
        waiting.append(frame)
        yield frame


def _images_ahead(device: torch.device, batch_size: int) -> int:
    """How many images each thread works ahead. On a CPU none, because all would compete for the same cores."""
    return 0 if device.type == "cpu" else batch_size


@contextlib.contextmanager
def _thread() -> Iterator[ThreadPoolExecutor]:
    """A thread that on exit completes the call that is running, such as writing a file, and drops all others."""
    thread = ThreadPoolExecutor(max_workers=1)
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


def _ahead(
    thread: ThreadPoolExecutor, function: Callable[[Given], Made], items: Iterable[Given], count: int
) -> Iterator[tuple[Given, Future[Made]]]:
    """Each item, in order, with the future of function(item), which the thread computes while the caller does other
    work; the items are taken at most `count` ahead of the caller, so that memory is bounded.
    """
    begun: deque[tuple[Given, Future[Made]]] = deque()
    for item in items:
        begun.append((item, thread.submit(function, item)))
        if len(begun) > count:
            yield begun.popleft()
    while begun:
        yield begun.popleft()


def _readable(
    images: Iterable[tuple[Job, Future[Tensor]]], waiting: deque[tuple[Job, Tensor]], unreadable: list[str]
) -> Iterator[Tensor]:
    """Yield each readable image, uint8 [3, H, W], and append it to `waiting` with its job; report the others on stderr
    and append their names to `unreadable`.
    """
    for job, reading in images:
        try:
            pixels = reading.result()
        except InputError as error:
            report_unreadable(job, error, unreadable)
            continue
        waiting.append((job, pixels))
        yield pixels


def report_unreadable(job: Job, error: InputError, unreadable: list[str]) -> None:
    """Print why a source cannot be read, and append its name to `unreadable`."""
    unreadable.append(job.source.name)
    tqdm.write(f"error: {printable(str(error))}", file=sys.stderr)


def on_host(result: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the tensors of a result to the host now: later, a copy would wait for the network of the next batch."""
    lists = ("masks", "segments")  # the masks are RLEs
    return {key: value if key in lists else value.cpu() for key, value in result.items()}


def report(job: Job, result: Mapping[str, Any], writer: ResultWriter) -> str:
    """The line for an image: how many instances or things of each class, and which stuff."""
    model = writer.model
    labels, stuff, nothing = result["labels"].tolist(), [], f"at score {model.settings.score_threshold:g} or above"
    if "segments" in result:
        labels = [segment["label"] for segment in result["segments"] if segment["is_thing"]]
        stuff = [model.stuff_names[segment["label"]] for segment in result["segments"] if not segment["is_thing"]]
        nothing = "that becomes a segment"
    counts = Counter(model.class_names[label] for label in labels)
    found = ", ".join([*(f"{count} {name}" for name, count in counts.most_common()), *stuff])
    is_drawn = "pictures" in writer.formats
    empty = f"nothing found {nothing}{', picture unchanged' if is_drawn else ''}"
    return f"{job.source.name}: {found or empty} -> {writer.folder / job.picture if is_drawn else writer.folder}"
