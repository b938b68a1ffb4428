"""What a command shows: printing never fails, never ends a command, and never steers a terminal."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

from solov2.commands.arguments import Parser
from solov2.commands.exit import run_command
from solov2.commands.screen import Stream, safe_streams, show

COMMAND = r"""
import sys
from solov2.commands.arguments import Parser
from solov2.commands.exit import run_command
from solov2.outputs import write_json

def run(args):
    for number in range(5000):
        print("\u732b \udcff", number)
    print("to stderr", file=sys.stderr)
    write_json(sys.argv[1], "done")
    print("\u00c4 end")
    return 1

sys.exit(run_command("x", lambda typed: Parser(prog=typed), run, []))
"""


def closed_pipe() -> int:
    """The end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def run(words: list[str], *, variables: dict[str, str] | None = None, **settings) -> subprocess.CompletedProcess[bytes]:
    """Run Python, with buffered streams unless `variables` say otherwise."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **(variables or {})}
    return subprocess.run([sys.executable, *words], timeout=60, env=environment, **settings)


@pytest.mark.parametrize(
    ("encoding", "first", "last"),
    [
        ("ascii", rb"\u732b \udcff 0", rb"\xc4 end"),
        ("cp1252", rb"\u732b \udcff 0", b"\xc4 end"),
        ("utf-8", "猫 \\udcff 0".encode(), "Ä end".encode()),
    ],
)
def test_a_console_that_cannot_write_a_name(encoding: str, first: bytes, last: bytes, tmp_path: Path) -> None:
    console = {"PYTHONIOENCODING": encoding}
    done = run(["-c", COMMAND, str(tmp_path / "x.json")], variables=console, capture_output=True)
    lines = done.stdout.splitlines()
    assert (done.returncode, lines[0], lines[-1], done.stderr.split()) == (1, first, last, [b"to", b"stderr"])
    assert (tmp_path / "x.json").read_text() == '"done"\n'


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_pipe_ends_nothing(name: str, unbuffered: str, tmp_path: Path) -> None:
    """`command | head`: the files are written, the exit code is the usual one, and nothing is complained about."""
    other = {"stdout": "stderr", "stderr": "stdout"}[name]
    streams = {name: closed_pipe(), other: subprocess.PIPE}
    done = run(["-c", COMMAND, str(tmp_path / "x.json")], variables={"PYTHONUNBUFFERED": unbuffered}, **streams)
    shown = done.stderr if name == "stdout" else b""
    assert done.returncode == 1 and shown.split() in ([], [b"to", b"stderr"])
    assert (tmp_path / "x.json").read_text() == '"done"\n'


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)])
def test_closed_standard_streams(numbers: tuple[int, ...], tmp_path: Path) -> None:
    """`command >&-`: no file that is written gets the number of a standard stream, and with it what libraries print."""
    noise = (
        "import os\n    with replace_file(sys.argv[1]) as file:\n        os.write(1, b'noise'), os.write(2, b'noise')\n"
    )
    write = "    write_json(sys.argv[1], "
    command = COMMAND.replace("import write_json", "import replace_file").replace(
        write, f"    {noise}        file.write("
    )
    command = command.replace('"done"', "b'\"done\"\\n'")
    done = run(["-c", command, str(tmp_path / "x.json")], preexec_fn=lambda: [os.close(number) for number in numbers])
    assert done.returncode == 1 and (tmp_path / "x.json").read_text() == '"done"\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")
def test_a_full_disk_under_standard_output_is_reported_after_the_files(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = run(["-c", COMMAND, str(tmp_path / "x.json")], stdout=full, stderr=subprocess.PIPE)
        help_text = run(["-m", "solov2", "train", "--help"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and (tmp_path / "x.json").read_text() == '"done"\n'
    assert done.stderr.decode().splitlines() == ["to stderr", f"error: standard output: {os.strerror(errno.ENOSPC)}"]
    assert b"Traceback" not in help_text.stderr


def test_help_for_a_closed_pipe() -> None:
    done = run(["-m", "solov2", "train", "--help"], stdout=closed_pipe(), stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("columns", ["0", "1", "-5", "many"])
def test_environment_variables_of_terminals(columns: str) -> None:
    settings = {"COLUMNS": columns, "LINES": columns, "TERM": "dumb", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    done = run(["-m", "solov2", "train", "--help"], variables=settings, capture_output=True)
    assert done.returncode == 0 and b"--epochs" in done.stdout and b"\x1b" not in done.stdout and done.stderr == b""


def start(body: Callable[[], object]) -> int:
    return run_command("x", lambda typed: Parser(prog=typed), lambda _args: body() and 0 or 0, [])


def test_shown_logged_and_warned_names(capsys: pytest.CaptureFixture[str]) -> None:
    """A newline in a name would start a line of its own, which could look like one of ours."""
    name = "cat\x1b[2J\u202e\nerror: all is lost"
    safe = r"cat\x1b[2J\u202e\nerror: all is lost"

    def body() -> None:
        show("table", f"  {name}")
        logging.getLogger("solov2.data").warning("%s has no instances", name)
        warnings.warn("first\nsecond \x1b[2J", stacklevel=1)

    assert start(body) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["table", f"  {safe}"]
    assert err.splitlines() == [f"warning: {safe} has no instances", "warning: first", r"second \x1b[2J"]


def test_a_progress_bar_on_a_closed_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm passes a broken pipe on, which would end the command."""
    monkeypatch.setattr("sys.stderr", os.fdopen(closed_pipe(), "w", buffering=1))
    seen = []

    def body() -> None:
        for number in tqdm(range(3), mininterval=0):
            tqdm.write("line", file=sys.stderr)
            seen.append(number)

    assert start(body) == 0 and seen == [0, 1, 2]


def test_the_streams_are_those_of_the_caller_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python, commands may find no streams at all (pythonw), closed ones, or ones that are no files."""
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, io.StringIO()):
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("sys.stderr", stream)
        with safe_streams():
            print("hello")
            print("hello", file=sys.stderr)
        assert sys.stdout is stream and sys.stderr is stream
    assert stream.getvalue() == "hello\nhello\n"


def test_a_stream_remembers_what_was_lost() -> None:
    for error, reported in ((BrokenPipeError(), False), (OSError(errno.ENOSPC, "full"), True), (ValueError("x"), True)):

        class Broken(io.StringIO):
            def write(self, text: str, error: Exception = error) -> int:
                raise error

        stream = Stream(Broken())
        assert stream.write("abc") == 3 and (stream.end() is not None) == reported
    whole = Stream(io.StringIO())
    whole.write("abc")
    assert whole.end() is None and whole.getvalue() == "abc"
