"""Videos and cameras, read and written with PyAV (extra `video`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from solov2.errors import InputError
from solov2.outputs import replace_file
from solov2.prediction.sources import Source

CONTAINERS = {".mkv": "matroska", ".m4v": "mp4"}  # others are called like their extension
DEFAULT_RATE = Fraction(25)  # frames per second, where a camera does not say


@dataclass(frozen=True)
class Video:
    """An opened video: frames per second, and the frames, uint8 [3, H, W], which are decoded one at a time."""

    rate: Fraction
    frames: Iterator[Tensor]


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError("videos and cameras need PyAV: pip install 'solov2[video]'") from error
    return av


@contextlib.contextmanager
def open_video(source: Source, max_pixels: int) -> Iterator[Video]:
    """Open a video file or the camera of a number, which is /dev/videoN.

    Raises:
        InputError: it cannot be opened or decoded, has no frames or too large ones, or PyAV is missing.
    """
    av = _av()
    try:
        is_camera = source.kind == "camera"
        place = f"/dev/video{source.name}" if is_camera else source.name
        container = av.open(place, format="v4l2") if is_camera else av.open(place)
        with container:
            if not container.streams.video:
                raise InputError(f"{source.name} has no pictures")
            stream = container.streams.video[0]
            if stream.width * stream.height > max_pixels:
                raise InputError(
                    f"video {source.name} has frames of {stream.width} x {stream.height} pixels, more than the maximum "
                    f"of {max_pixels} set by data.max_image_pixels"
                )
            yield Video(stream.average_rate or DEFAULT_RATE, frames_of(container, stream))
    except av.error.FFmpegError as error:
        what = "camera" if source.kind == "camera" else "video"
        raise InputError(f"{what} {source.name} cannot be read: {error.strerror or error}") from error


def frames_of(container: Any, stream: Any) -> Iterator[Tensor]:
    """The frames of a stream, uint8 [3, H, W]."""
    for frame in container.decode(stream):
        yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)


class VideoWriter:
    """Writes pictures as the frames of a video; it replaces `path` when it is complete, see `video_writer`."""

    def __init__(self, container: Any, rate: Fraction) -> None:
        self._container, self._rate = container, rate
        self._stream: Any = None

    def add(self, picture: Image.Image) -> None:
        """Append a frame; all must have one size."""
        av = _av()
        if self._stream is None:
            # H.264 with 4:2:0 needs even sides, which 4:4:4 does not, and colors of masks stay sharp.
            self._stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": "18"})
            self._stream.width, self._stream.height = picture.size
            even = picture.width % 2 == 0 and picture.height % 2 == 0
            self._stream.pix_fmt = "yuv420p" if even else "yuv444p"
        self._container.mux(self._stream.encode(av.VideoFrame.from_image(picture)))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())


@contextlib.contextmanager
def video_writer(path: Path, rate: Fraction) -> Iterator[VideoWriter]:
    """Write a video (H.264) at `rate` frames per second; `path` is complete or absent.

    Raises:
        OSError: disk full or no permission.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    with replace_file(path) as file:
        with _av().open(file, "w", format=CONTAINERS.get(suffix, suffix[1:])) as container:
            writer = VideoWriter(container, rate)
            yield writer
            writer.finish()
