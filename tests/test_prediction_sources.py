"""The sources of `solov2 predict`: patterns, URLs, standard input, and what is wrong with them."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from solov2.errors import InputError
from solov2.prediction import sources
from solov2.prediction.sources import Source, download, find_sources, plan_jobs, read_source

PIXELS = 10**6


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (255, 0, 0)).save(file, format=kind)
    return file.getvalue()


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/missing"):
                self.send_error(404)
                return
            if self.path.startswith("/slow"):
                stop.wait(5)
                return
            self.send_response(302 if self.path.startswith("/moved") else 200)
            if self.path.startswith("/moved"):
                self.send_header("Location", "file:///etc/passwd")
            body = b"x" * 5000 if self.path.startswith("/large") else picture()
            self.end_headers()
            self.wfile.write(body[: 20 if self.path.startswith("/broken") else None])

        def log_message(self, *_: object) -> None:
            pass

    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_patterns_keep_their_folders(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/x/b.png", "in/x/y/c.png", "in/x/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    found = find_sources([tmp_path / "in" / "**" / "*.png", tmp_path / "in" / "a.*"], tmp_path / "out")
    assert [(Path(source.name).name, str(source.folder)) for source in found] == [
        ("a.png", "."),
        ("b.png", "x"),
        ("c.png", "x/y"),
    ]
    (tmp_path / "in" / "[1].png").write_bytes(picture())  # a file of this name is no pattern
    assert [source.name for source in find_sources([tmp_path / "in" / "[1].png"], tmp_path)] == [
        str(tmp_path / "in" / "[1].png")
    ]


def test_names_of_outputs() -> None:
    given = [
        Source("https://host/a%20b.JPG?size=2", "url"),
        Source("https://host/", "url"),
        Source("https://host/..", "url"),
        Source("https://host/c%2Fd.webp", "url"),
        Source("-", "stdin"),
        Source("0", "camera"),
        Source("clips/e.webm", "video"),
    ]
    assert [str(job.picture) for job in plan_jobs(given)] == [
        "a b.JPG", "image.png", "image_2.png", "d.png", "stdin.png", "camera_0.mp4", "e.mp4"
    ]  # fmt: skip


def test_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("7", "a.MP4"):
        Path(name).write_bytes(b"")
    found = find_sources(["http://host/x.jpg", "-", "0", "7", "a.MP4", "-"], tmp_path / "out")
    assert [(source.name, source.kind) for source in found] == [
        ("http://host/x.jpg", "url"), ("-", "stdin"), ("0", "camera"), ("7", "file"), ("a.MP4", "video")
    ]  # fmt: skip


def test_urls(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_source(Source(f"{server}/a.png", "url"), PIXELS).shape == (3, 6, 8)
    monkeypatch.setattr(sources, "MAX_BYTES", 2000)
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    for path, words in (
        ("missing.png", "404|Not Found"),
        ("slow.png", "timed out"),
        ("moved.png", "not allowed|file://"),
        ("large.png", "the maximum"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            download(f"{server}/{path}")
        assert f"{server}/{path}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="broken.png"):
        read_source(Source(f"{server}/broken.png", "url"), PIXELS)
    with pytest.raises(InputError, match="cannot be fetched"):
        download("http://127.0.0.1:9/a.png")


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(picture("JPEG"))))
    assert read_source(Source("-", "stdin"), PIXELS).shape == (3, 6, 8)
    with pytest.raises(InputError, match="standard input"):
        read_source(Source("-", "stdin"), PIXELS)  # nothing is left
