"""Published files come from the first source that has them: resumed where they stopped, checked, downloaded once."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from solov2 import download as downloads
from solov2.config import list_models
from solov2.download import MIRROR, download, sha256_of
from solov2.errors import InputError
from solov2.published import FAMILIES, PUBLISHED_FILES, PUBLISHED_WEIGHTS, PublishedFile, find_published

CONTENT = bytes(range(256)) * 8192  # 2 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, the first `drops` times only half of what is asked for; has a list of the requests."""

    def __init__(self, content: bytes = CONTENT, *, drops: int = 0, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.drops, self.ranges = content, drops, ranges
        self.asked: list[tuple[str, int]] = []  # path, first byte
        self.sent, self.delay = 0, 0.0  # bytes, seconds
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and server.ranges else 0
        server.asked.append((self.path, start))
        if self.path == "/moved":
            return self.answer(302, {"Location": "ftp://127.0.0.1/file.pth"})
        if not self.path.endswith("file.pth"):
            return self.answer(404, {})
        if start and start >= len(server.content):
            return self.answer(416, {})
        body = server.content[start:]
        headers = {"Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
        if server.drops:
            server.drops -= 1
            body = body[: len(body) // 2]
        self.answer(206 if start else 200, headers)
        time.sleep(server.delay)
        self.wfile.write(body)
        server.sent += len(body)

    def answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.delenv(MIRROR, raising=False)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
        running.shutdown()


def published(*servers: str, sha256: str = DIGEST) -> PublishedFile:
    return PublishedFile("m", "mmdet", tuple(f"{url}/file.pth" for url in servers), 30.0, "Apache-2.0", sha256)


def dead_url() -> str:
    """Of a port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# ---- the table


def test_every_published_model_has_an_official_file() -> None:
    unpublished = {name for name in list_models() if any(part in name for part in ("quickstart", "panoptic", "plus"))}
    assert set(PUBLISHED_WEIGHTS) == set(list_models()) - unpublished
    assert {(file.model, file.family) for file in PUBLISHED_WEIGHTS.values() if file.family == "authors"} == {
        (name, "authors") for name in ("solov2_r101_fpn_3x", "solov2_light_r34_fpn_3x", "solov2_light_r50_dcn_fpn_3x")
    }
    for name, file in PUBLISHED_WEIGHTS.items():
        assert find_published(name) is file and find_published(name, file.family) is file


def test_published_files_are_told_apart() -> None:
    """Names in the cache are unique, also where two families use the same name; hashes are whole or eight digits."""
    assert len({file.cache_name for file in PUBLISHED_FILES}) == len(PUBLISHED_FILES) == 19
    assert len({(file.model, file.family) for file in PUBLISHED_FILES}) == 19
    assert len({file.name for file in PUBLISHED_FILES}) == 17
    for file in PUBLISHED_FILES:
        assert file.family in FAMILIES and len(file.sha256) in (0, 8, 64) and 25 < file.mask_ap < 45
        assert all(url.startswith("https://") and url.endswith(file.name) for url in file.urls)
        assert file.family != "mmdet" or file.name.endswith(f"-{file.sha256}.pth")
    assert {file.name for file in PUBLISHED_FILES if not file.sha256} == {
        "SOLOv2_LIGHT_448_R50_3x.pth",
        "SOLOv2_LIGHT_512_DCN_R50_3x.pth",
    }


# ---- sources


def test_the_third_source_is_used(server: Server, caplog: pytest.LogCaptureFixture, cache: Path) -> None:
    """The first is dead and the second has a wrong byte; each failure is logged with its address and reason."""
    wrong = bytearray(CONTENT)
    wrong[1_000_000] ^= 1
    with Server(bytes(wrong)) as second:
        dead = dead_url()
        path = download(published(dead, second.url, server.url))
        second.shutdown()
    assert path.read_bytes() == CONTENT and len(second.asked) == len(server.asked) == 1
    failed = [line for line in warnings(caplog) if line.startswith("no weights from")]
    assert len(failed) == 2
    assert f"{dead}/file.pth" in failed[0] and "refused" in failed[0]
    assert f"{second.url}/file.pth" in failed[1] and hashlib.sha256(wrong).hexdigest() in failed[1]
    assert sorted(os.listdir(cache)) == [path.name, f"{path.name}.sha256"]
    assert (cache / f"{path.name}.sha256").read_text() == f"{DIGEST}  {path.name}\n"
    download(published(server.url))
    assert len(server.asked) == 1  # from the cache


def test_without_a_source_the_message_names_all_and_nothing_is_kept(server: Server, cache: Path) -> None:
    server.content = b"something else"
    dead = dead_url()
    with pytest.raises(InputError, match=f"{dead}/file.pth .*{server.url}/file.pth .*{MIRROR}"):
        download(published(dead, server.url))
    assert [name for name in os.listdir(cache) if not name.endswith(".sha256")] == []


def test_prefixes_are_compared_and_unknown_hashes_recorded(
    server: Server, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    assert download(published(server.url, sha256=DIGEST[:8])).name == f"mmdet-{DIGEST[:8]}-file.pth"
    with pytest.raises(InputError, match=f"{DIGEST} and should be 00000000"):
        download(published(server.url, sha256="00000000"))
    path = download(published(server.url, sha256=""))
    assert path.name == "mmdet-unverified-file.pth" and sha256_of(path) == DIGEST
    assert any(DIGEST in line and str(path) in line for line in warnings(caplog))
    assert DIGEST in (cache / f"{path.name}.sha256").read_text()


def test_a_mirror_comes_first(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the file under either name, or a URL."""
    file = published(dead_url())
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    (tmp_path / "mirror").mkdir()
    for name in (file.name, file.cache_name):
        (tmp_path / "mirror" / name).write_bytes(CONTENT)
        assert download(file).read_bytes() == CONTENT
        (tmp_path / "mirror" / name).unlink()
        file.cached.unlink()
    monkeypatch.setenv(MIRROR, f"{server.url}/solov2/")
    assert download(file).read_bytes() == CONTENT
    assert [path for path, _ in server.asked] == [f"/solov2/{file.cache_name}"]


@pytest.mark.parametrize("url", ["file://{}", "ftp://127.0.0.1{}", "data:,{}", "{server}/moved"])
def test_other_protocols_are_refused(server: Server, tmp_path: Path, url: str) -> None:
    (tmp_path / "file.pth").write_bytes(CONTENT)
    address = url.format(tmp_path / "file.pth", server=server.url)
    with pytest.raises(InputError, match="could not be downloaded"):
        download(dataclasses.replace(published("x"), urls=(address,)))


def test_a_download_without_end_is_stopped(server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(downloads, "LARGEST", 2**20)
    with pytest.raises(InputError, match="2,097,152 bytes, more than 1,048,576"):
        download(published(server.url))
    assert not published(server.url).cached.exists()
    with pytest.raises(InputError, match="more than 5"):
        download(dataclasses.replace(published(server.url), size=5))


def test_a_source_that_does_not_answer_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert download(published(url, server.url)).read_bytes() == CONTENT
    assert time.monotonic() - started < 20


# ---- resuming


def test_an_interrupted_download_resumes(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """By the same call: half, half of the rest, and the rest are sent, and no byte twice."""
    server.drops = 2
    assert download(published(server.url)).read_bytes() == CONTENT
    size = len(CONTENT)
    assert [start for _, start in server.asked] == [0, size // 2, size // 4 * 3] and server.sent == size
    assert sum("resuming at byte" in line for line in warnings(caplog)) == 2


def test_a_later_call_resumes_from_another_source(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    server.drops = 1
    with pytest.raises(InputError, match=f"closed after {len(CONTENT) // 2:,} of {len(CONTENT):,} bytes"):
        download(published(server.url))
    with Server() as other:
        assert download(published(other.url)).read_bytes() == CONTENT
        other.shutdown()
    assert other.sent == server.sent == len(CONTENT) // 2


def test_a_server_without_ranges_sends_the_whole_file(server: Server) -> None:
    server.drops, server.ranges = 1, False
    assert download(published(server.url)).read_bytes() == CONTENT
    assert server.sent == len(CONTENT) * 3 // 2


@pytest.mark.parametrize("left", [b"x" * 1000, CONTENT[:-1] + b"x", CONTENT + b"more"])
def test_a_wrong_beginning_is_given_up(server: Server, cache: Path, left: bytes) -> None:
    """What was left is not the file: it is deleted, and the same source is asked for all of it."""
    file = published(server.url)
    cache.mkdir(parents=True)
    (cache / f".{file.cache_name}.part").write_bytes(left)
    assert download(file).read_bytes() == CONTENT
    assert [start for _, start in server.asked] == [len(left), 0]


def test_a_complete_part_is_kept(server: Server, cache: Path) -> None:
    """The process was killed after the last byte."""
    file = published(server.url)
    cache.mkdir(parents=True)
    (cache / f".{file.cache_name}.part").write_bytes(CONTENT)
    assert download(file).read_bytes() == CONTENT and server.sent == 0


def test_without_a_hash_nothing_is_resumed(server: Server, cache: Path) -> None:
    file = published(server.url, sha256="")
    cache.mkdir(parents=True)
    (cache / f".{file.cache_name}.part").write_bytes(CONTENT[:100])
    assert download(file).read_bytes() == CONTENT and server.sent == len(CONTENT)


# ---- several at once


def test_threads_download_once(server: Server) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(download(published(server.url)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(paths) == 4 and len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT
    assert server.sent == len(CONTENT)


def test_processes_download_once(server: Server, tmp_path: Path) -> None:
    code = (
        "from solov2.download import download\nfrom solov2.published import PublishedFile\n"
        f"print(download(PublishedFile('m', 'mmdet', ('{server.url}/file.pth',), 30.0, '', '{DIGEST}')))"
    )
    server.delay = 1.0  # so that the second process starts before the first is done
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "home")}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=100)[0] for process in running}
    assert len(printed) == 1 and Path(printed.pop().strip()).read_bytes() == CONTENT
    assert server.sent == len(CONTENT)
