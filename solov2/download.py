"""Downloading a published file: from the first source that has it, resumed where it stopped, checked by its hash."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

from solov2 import distributed
from solov2.errors import InputError
from solov2.published import PublishedFile

try:
    import fcntl
except ImportError:  # Windows: processes that download the same file at the same time disturb each other
    fcntl = None  # type: ignore[assignment]

LOG = logging.getLogger(__name__)
MIRROR = "SOLOV2_WEIGHTS_MIRROR"  # environment variable: a folder or base URL that is tried first
TIMEOUT = 30.0  # seconds without an answer
ATTEMPTS = 5  # for each source, as long as every one of them brings more of the file
LARGEST = 2**31  # bytes of a file whose size is not known; the largest published one has about half a gigabyte
CHUNK = 2**20  # bytes
FAILURES = (OSError, http.client.HTTPException, ValueError)  # of a source; urllib's errors are OSErrors


def download(file: PublishedFile) -> Path:
    """Path of a published file in the cache; it is downloaded if it is not there yet.

    The sources are tried in turn, and the failure of each is logged. An interrupted download is resumed, by the same
    call or by a later one. The file gets its name only once its hash is right, and its SHA-256 is written beside it.
    If several processes want the file, one downloads it and the others wait.

    Raises:
        InputError: no source has the file, or the cache is not writable; the message says what to do.
    """
    path = file.cached
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.sha256")) as record:
            if path.is_file():  # another process had the lock, and downloaded it
                return path
            failures: list[str] = []
            for source in _sources(file):
                LOG.warning("downloading %s (license: %s)", source, file.license)
                try:
                    digest = _obtain(file, source, path)
                except FAILURES as error:
                    failures.append(f"{source} ({_reason(error)})")
                    LOG.warning("no weights from %s", failures[-1])
                    continue
                record.truncate(0)
                record.write(f"{digest}  {path.name}\n".encode())
                if not file.sha256:
                    LOG.warning("%s: no hash of it is published; its SHA-256 is %s", path, digest)
                return path
    except OSError as error:
        raise InputError(f"cannot write weights to {path.parent}: {error.strerror or error}") from error
    raise InputError(
        f"the published weights could not be downloaded from {', '.join(failures)}; put that file at {path}, give its "
        f"path as weights, or set {MIRROR} to a folder or URL that has it"
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in 64 digits.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that only one process, or thread, has open here; it is created if needed and stays."""
    with path.open("ab", buffering=0) as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _sources(file: PublishedFile) -> list[str]:
    """URLs and paths of a file: first those of the mirror, under its name in the cache and under its publisher's."""
    mirror = os.path.expanduser(os.environ.get(MIRROR, "")).rstrip("/")
    copies = [f"{mirror}/{name}" for name in (file.cache_name, file.name)] if mirror else []
    return [*copies, *file.urls]


def _obtain(file: PublishedFile, source: str, path: Path) -> str:
    """Put the file from one source at `path`; returns its SHA-256.

    Raises:
        OSError, HTTPException: it could not be read; what has arrived is kept for the next source or call.
        ValueError: it is not the published file; nothing is kept.
    """
    part = path.with_name(f".{path.name}.part")
    if not file.sha256:
        part.unlink(missing_ok=True)  # nothing would tell whether its beginning and the rest are of one file
    while True:
        kept = _size(part)
        _receive(source, part, file.size or LARGEST)
        digest = sha256_of(part)
        if digest.startswith(file.sha256):
            os.replace(part, path)
            return digest
        part.unlink()
        if not kept:
            raise ValueError(f"wrong file: its SHA-256 is {digest} and should be {file.sha256}")
        LOG.warning("%s: the rest of an earlier download does not belong to this file; downloading all of it", source)


def _receive(source: str, part: Path, limit: int) -> None:
    """Complete `part` from one source, with further attempts as long as each receives more of it."""
    for attempt in range(1, ATTEMPTS + 1):
        size = _size(part)
        try:
            return _continue(source, part, limit)
        except FAILURES as error:
            if attempt == ATTEMPTS or _size(part) <= size:
                raise
            LOG.warning("%s: %s; resuming at byte %d", source, _reason(error), _size(part))


def _continue(source: str, part: Path, limit: int) -> None:
    """Append the missing bytes to `part`, or write all of it if the source cannot send only the rest."""
    if not source.startswith(("http://", "https://")):
        with open(source, "rb") as file:
            return _write(file, part, 0, os.fstat(file.fileno()).st_size, limit, Path(source).name)
    offset = _size(part)
    headers = {"User-Agent": "solov2"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = _opener().open(urllib.request.Request(source, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if offset and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send: `part` is complete, or the hash shows that it is something else
        raise
    with response:
        start = 0
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if sent is None or int(sent[1]) != offset:
                part.unlink()
                raise OSError("the server sent another part of the file than requested")
            start = offset
        length = response.headers.get("Content-Length")
        _write(response, part, start, None if length is None else start + int(length), limit, source)


def _opener() -> urllib.request.OpenerDirector:
    """Opens only http and https, even when a server redirects; urllib's own opener also takes ftp: and file:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _write(
    stream: IO[bytes] | http.client.HTTPResponse, part: Path, start: int, end: int | None, limit: int, name: str
) -> None:
    """Write a stream to `part` from byte `start` on.

    Raises:
        OSError: the stream ends before byte `end`, if that is known, or exceeds `limit` bytes.
    """
    if end is not None and end > limit:
        raise OSError(f"it has {end:,} bytes, more than {limit:,}")
    silent = distributed.launched_rank() != 0 or not sys.stderr.isatty()
    shown = name.rpartition("/")[2]
    with (
        part.open("ab" if start else "wb") as file,
        tqdm(total=end, initial=start, desc=shown, unit="B", unit_scale=True, leave=False, disable=silent) as bar,
    ):
        while block := stream.read1(CHUNK):  # type: ignore[union-attr]  # files opened for reading have it
            start += len(block)
            if start > limit:
                raise OSError(f"it has more than {limit:,} bytes")
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    if end is not None and start < end:
        raise OSError(f"the connection was closed after {start:,} of {end:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
