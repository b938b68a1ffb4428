"""Expected failures of a command: one line on stderr and the documented exit code."""

from __future__ import annotations

import errno

import pytest

from solov2.commands import exit as command_exit
from solov2.commands.arguments import Parser
from solov2.commands.exit import error_message
from solov2.errors import InputError, RunFailed, printable


def run_command(body, words):
    """Run a command that takes any arguments."""

    def build_parser(typed):
        parser = Parser(prog=typed)
        parser.add_argument("all", nargs="*")
        return parser

    return command_exit.run_command("train", build_parser, body, words)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no such model: x"), 2, "error: no such model: x"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pth"), 2, "error: a.pth: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), 2, "error: b: Permission denied"),
        (RunFailed("process 0 waited for the others"), 1, "error: process 0 waited"),
        (RunFailed("step 3 is not finite"), 1, "error: step 3 is not finite"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a\x1b\n", None, "b"), 2, r"error: a\x1b\n: Is a directory"),
        (TimeoutError("processes [1] did not join within 60 seconds"), 1, "error: processes [1] did not join"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(error, code, message, capsys):
    def body(_arguments):
        raise error

    assert run_command(body, []) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.splitlines()) == 1


def test_an_interruption_is_an_exit_code_for_the_shell_and_an_exception_for_python(capsys, monkeypatch):
    def interrupted(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["train.py"])
    for body in (interrupted, lambda _arguments: 130):
        assert run_command(body, None) == 130
        with pytest.raises(KeyboardInterrupt):
            run_command(body, [])
    assert capsys.readouterr().err == "interrupted\n" * 2


@pytest.mark.parametrize("error", [ZeroDivisionError, ImportError, ModuleNotFoundError])
def test_an_unexpected_error_keeps_its_traceback(error):
    """An ImportError too: what is optional raises InputError, so that this one is a defect or a broken installation."""

    def body(_arguments):
        raise error

    with pytest.raises(error):
        run_command(body, [])


def test_the_body_gets_the_arguments_and_returns_the_exit_code():
    assert run_command(lambda args: len(args.words) + len(args.all) - 3, ["a", "b", "c"]) == 3


def test_the_message_of_an_error_from_a_worker():
    text = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    )
    assert error_message(InputError(f"{text}solov2.config.InputError: a.jpg is broken\n")) == "a.jpg is broken"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\nc ü 猫", r"a\x1b[2Jb\nc ü 猫"),
        ("\x9b2J \x7f\r\b\0", r"\x9b2J \x7f\r\x08\x00"),
        ("user\u202egpj.exe \u2066a\u2069", r"user\u202egpj.exe \u2066a\u2069"),  # right to left: "Trojan source"
        ("ca\u200bt\u2060\ufeff", r"ca\u200bt\u2060\ufeff"),  # two classes that look the same
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("\udcff", r"\udcff"),  # of a file name that is not UTF-8
        ("a: {b} #c | *d* `e` <f>", "a: {b} #c | *d* `e` <f>"),
    ],
)
def test_text_from_files_cannot_steer_a_terminal(text, shown):
    assert printable(text) == shown


def test_text_for_a_console_that_lacks_characters():
    assert printable("Ä 猫", encoding="cp1252") == r"Ä \u732b"
    assert printable("Ä 猫", encoding="ascii") == r"\xc4 \u732b"


def test_only_rank_zero_prints_an_error_at_once(monkeypatch, capsys):
    """The launcher ends the other ranks while they wait; a rank that fails alone prints after the wait."""

    def body(_arguments):
        raise InputError("broken")

    waited = []
    monkeypatch.setattr(command_exit.time, "sleep", waited.append)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert run_command(body, []) == 2
    assert capsys.readouterr().err == "error: broken\n" * 2
    assert waited == [command_exit.HEAD_START + 3 * command_exit.STAGGER]
