"""What `solov2 predict` reads: files, folders, patterns, URLs, standard input, videos and cameras; and what it names
the outputs of each.
"""

from __future__ import annotations

import glob
import http.client
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from solov2.errors import InputError
from solov2.ops import images
from solov2.ops.image_files import check_file, find_images
from solov2.outputs import fold_name

STDIN = "-"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")  # pictures of other images are written as PNG
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
WRITTEN_VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4")  # others are written as MP4
MAX_BYTES = 256 * 2**20  # of a download, and of standard input
TIMEOUT = 30.0  # seconds without an answer of a server
MAX_SECONDS = 300.0  # of a whole download


@dataclass(frozen=True)
class Source:
    """An image, a video or a camera.

    Attributes:
        name: as given: a path, a URL, "-" or the number of a camera.
        kind: "file", "url", "stdin", "video" or "camera".
        folder: of its outputs, relative to the output folder: the subfolders of a given folder are kept.
    """

    name: str
    kind: str = "file"
    folder: Path = Path()

    @property
    def has_frames(self) -> bool:
        """Whether it is a video or a camera."""
        return self.kind in ("video", "camera")

    @property
    def file_name(self) -> Path:
        """A name for its outputs, with the extension of the source."""
        if self.kind == "url":
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.name).path)
            name = re.sub(r"[\x00/\\]", "_", path.rstrip("/").rpartition("/")[2])
            return Path(name if name.strip(".") else "image.png")
        return Path({"stdin": "stdin.png", "camera": f"camera_{self.name}.mp4"}.get(self.kind, Path(self.name).name))


@dataclass(frozen=True)
class Job:
    """A source and the names of its outputs.

    Attributes:
        number: from 1 on, in the order of the sources: the image id in the results.
        source: what is read.
        name: for its outputs, relative to the output folder: the name of the source, unless another one has it.
    """

    number: int
    source: Source
    name: Path

    @property
    def picture(self) -> Path:
        """Name of its picture, relative to the output folder."""
        kept = WRITTEN_VIDEOS if self.source.has_frames else PICTURE_SUFFIXES
        other = ".mp4" if self.source.has_frames else ".png"
        return self.name if self.name.suffix.lower() in kept else self.name.with_suffix(other)


def find_sources(inputs: Sequence[str | Path], output: Path) -> list[Source]:
    """List what to predict: files, URLs, cameras, the images in folders and their subfolders, and what patterns match.

    Pictures that an earlier run wrote to `output` are left out, if it is inside one of the folders; so are duplicates.

    Args:
        inputs: paths, patterns such as "photos/**/*.jpg", http(s) URLs, "-" for standard input, numbers of cameras.
        output: folder of the pictures.

    Raises:
        InputError: a path does not exist or is no file or folder, a pattern matches nothing, or a folder contains no
            images.
    """
    found: dict[object, Source] = {}
    for text in map(str, inputs):
        if text == STDIN or re.match(r"https?://", text):
            found.setdefault(text, Source(text, "stdin" if text == STDIN else "url"))
        elif text.isdecimal() and not Path(text).exists():
            found.setdefault(text, Source(text, "camera"))
        else:
            for source in _local(text, output):
                found.setdefault(Path(source.name).resolve(), source)
    if not found:
        raise InputError(f"the only images are those in --output {output}, which are not predicted again")
    return list(found.values())


def _local(text: str, output: Path) -> Iterable[Source]:
    path = Path(text)
    if glob.has_magic(text) and not path.exists():
        root = Path(*_before_magic(path))
        matches = sorted(map(Path, glob.glob(text, recursive=True)))
        if not matches:
            raise InputError(f"no file matches {text}")
        for match in matches:
            if not match.is_dir():
                yield _file(match, match.parent.relative_to(root))
    elif path.is_dir():
        earlier = output.resolve()
        nested = path.resolve() in earlier.parents
        for file in find_images(path):
            if not (nested and earlier in file.resolve().parents):
                yield _file(file, file.parent.relative_to(path))
    else:
        yield _file(path, Path())


def _before_magic(path: Path) -> list[str]:
    """The folders of a pattern before the first that holds a wildcard."""
    magic = next(place for place, part in enumerate(path.parts) if glob.has_magic(part))
    return list(path.parts[:magic])


def _file(path: Path, folder: Path) -> Source:
    check_file(path)
    return Source(str(path), "video" if path.suffix.lower() in VIDEO_SUFFIXES else "file", folder)


def plan_jobs(sources: Sequence[Source], *, unique_stems: bool = False) -> list[Job]:
    """Name the outputs of each source: like it, with _2, _3, ... added to duplicate names.

    Args:
        sources: see `find_sources`.
        unique_stems: names that differ only in their suffix are duplicates, too: other outputs than pictures all have
            the suffix of their format.
    """

    def key(job: Job) -> str:  # some file systems ignore case
        return fold_name(str(job.picture.with_suffix("") if unique_stems else job.picture))

    jobs, taken = [], set()
    for number, source in enumerate(sources, start=1):
        own = source.folder / source.file_name
        count, job = 1, Job(number, source, own)
        while key(job) in taken:
            count += 1
            job = Job(number, source, own.with_stem(f"{own.stem}_{count}"))
        taken.add(key(job))
        jobs.append(job)
    return jobs


def read_source(source: Source, max_pixels: int) -> Tensor:
    """Read an image: uint8 [3, H, W], upright by EXIF.

    Raises:
        InputError: it cannot be read, fetched or decoded, or is too large; the message names it.
    """
    if source.kind == "file":
        return images.to_rgb_tensor(Path(source.name), max_pixels=max_pixels)
    name = "standard input" if source.kind == "stdin" else source.name
    data = _bounded(sys.stdin.buffer.read, name) if source.kind == "stdin" else download(source.name)
    try:
        return images.to_rgb_tensor(data, max_pixels=max_pixels)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def download(url: str) -> bytes:
    """The contents of an http(s) URL, at most `MAX_BYTES`.

    Raises:
        InputError: the server does not answer in time or with an error, or the file is too large.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:  # find_sources lets only http(s) through
            return _bounded(response.read1, url, seconds=MAX_SECONDS)
    except InputError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"{url} cannot be fetched: {getattr(error, 'reason', None) or error}") from None


def _bounded(read: Callable[[int], bytes], name: str, *, seconds: float = math.inf) -> bytes:
    """All bytes of a stream. Raises InputError if there are more than `MAX_BYTES`, or they take too long."""
    parts, total, start = [], 0, time.monotonic()
    while part := read(2**16):
        parts.append(part)
        total += len(part)
        if total > MAX_BYTES:
            raise InputError(f"{name} has more than {MAX_BYTES // 2**20} MiB, the maximum")
        if time.monotonic() - start > seconds:
            raise InputError(f"{name} was not received within {seconds:.0f} seconds")
    return b"".join(parts)
