"""The commands: all are found, flags are consistent, help is fast, and mistakes are reported once."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from solov2.commands.arguments import Parser, add_model_argument, at_least
from solov2.commands.exit import own_command, typed_name
from solov2.commands.main import COMMANDS, build_parser, command_module, main
from solov2.config import list_models
from solov2.errors import InputError
from solov2.version import __version__

HEAVY = ("torch", "torchvision", "numpy", "pycocotools", "PIL")
PRODUCT = "--output"  # what a command produces: a run folder, pictures, an exported file
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def parsers() -> dict[str, Parser]:
    return {name: command_module(name).build_parser(f"solov2 {name}") for name in COMMANDS}


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_commands_of_the_design() -> None:
    others = {"panoptic-quality", "predict", "benchmark", "check-data", "import", "export", "convert", "models"} | {
        "weights",
        "report",
    }
    assert set(COMMANDS) == {"train", "eval", *others}
    for name, parser in parsers().items():
        assert parser.prog == f"solov2 {name}" and parser.description


def test_a_flag_means_the_same_in_every_command() -> None:
    meanings = defaultdict(dict)
    for name, parser in parsers().items():
        for action in parser._actions:
            kind = (type(action), action.dest, getattr(action.type, "__name__", None), action.nargs, action.metavar)
            text = (action.help or "").partition(" (")[0]
            for flag in action.option_strings:
                choices = () if flag == "--precision" else tuple(action.choices or ())  # files have their own
                meanings[flag].setdefault((*kind, choices, text), []).append(name)
    meanings.pop(PRODUCT)
    meanings.pop("--format")  # of what is read, or a list of those written
    for flag, found in meanings.items():
        assert len(found) == 1, f"{flag} means different things: {found}"
    for flag in ("--weights", "--device", "--precision", "--batch-size", "--workers", "--set", "--overwrite"):
        assert len(next(iter(meanings[flag].values()))) > 1


def test_every_flag_has_a_help_text_with_its_default() -> None:
    for name, parser in parsers().items():
        formatter = parser._get_formatter()
        for action in parser._actions:
            text = formatter._expand_help(action)
            assert text, f"{name} {action.option_strings or action.dest} has no help text"
            if action.option_strings and not action.required and action.dest != "help":
                assert "default" in text and "%" not in text, f"{name} {action.option_strings}: {text}"
        assert "default" in parser.format_help()


@pytest.mark.parametrize("name", ["train", "eval", "benchmark", "export"])
@pytest.mark.parametrize(
    ("words", "model"),
    [
        ([], None),
        (["quickstart"], "quickstart"),
        (["--config", "quickstart"], "quickstart"),
        (["--config=quickstart"], "quickstart"),
        (["--device", "cpu", "quickstart", "--overwrite"], "quickstart"),
        (["--overwrite", "--config", "quickstart", "--device", "cpu"], "quickstart"),
    ],
)
def test_the_model_is_a_positional_or_a_flag(name: str, words: list[str], model: str | None) -> None:
    needed = ["--weights", "w", "--size", "64", "64", "--output", "a.pt2"] if name == "export" else []
    assert parsers()[name].parse_args([*words, *needed]).model == model
    if model is not None:
        for both in (["other", *words], [*words, "--config", "other"] if "--config" not in words[0] else ["x", *words]):
            if sum("--config" in word for word in both) == 1:
                with pytest.raises(InputError, match="not allowed with"):
                    parsers()[name].parse_args([*both, *needed])


def test_errors_for_unknown_flags_suggest_close_ones() -> None:
    for words, flag in (
        (["--epoch", "3"], "--epochs"),
        (["--bs", "3"], "--batch-size"),
        (["--max-epochs=3"], "--epochs"),
        (["--amp"], "--precision"),
    ):
        with pytest.raises(InputError, match=f"unknown flag {words[0].partition('=')[0]}.*did you mean.*{flag}"):
            parsers()["train"].parse_args(words)
    with pytest.raises(InputError, match="unknown argument b"):
        parsers()["train"].parse_args(["a", "b"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["predict", "a.jpg"], ["--weights", "solov2 predict --help"]),
        (["predict", "--weights", "w"], ["SOURCE"]),
        (["eval", "--split", "test"], ["--split", "'test'", "val"]),
        (["eval", "--batch-size", "0"], ["--batch-size", "0", "1"]),
        (["eval", "--batch-size", "x"], ["--batch-size", "integer", "x"]),
        (["train", "--epochs", "x"], ["--epochs", "integer", "x"]),
        (["train", "quickstart", "--epochs", "0"], ["--epochs", "1", "0"]),
        (["train", "quickstart", "--set", "train.epochs=0"], ["train.epochs", "1", "0"]),
        (["eval", "best.pth", "--oracle"], ["best.pth", "--weights"]),
        (["predict", "a.jpg", "--weights", "w", "--score-threshold", "2"], ["--score-threshold", "from 0 to 1", "2"]),
        (["trian"], ["trian", "did you mean train?"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
)
def test_error_messages_are_one_line(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert out == "" and line.startswith("error: ") and all(part in line for part in parts), line


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell expands a word that starts with ~, but neither --flag=~/x nor what is quoted."""
    monkeypatch.setenv("HOME", "/home/me")
    for words in (["--weights=~/w.pth"], ["--weights", "~/w.pth"], ["--weights", "/home/me/w.pth"]):
        assert parsers()["eval"].parse_args(words).weights == "/home/me/w.pth"
    for name in ("a~/b", "~me/w.pth", "./~/w.pth", "w~.pth"):
        assert parsers()["eval"].parse_args(["--weights", name]).weights == name


def test_numbers_of_flags() -> None:
    assert at_least(1)("7") == 7 and isinstance(at_least(0.0)("0"), float)
    for kind, text in ((at_least(1), "0"), (at_least(0.0), "-0.1"), (at_least(0.0), "nan"), (at_least(0.0), "inf")):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            kind(text)


@pytest.mark.parametrize(
    ("script", "typed", "again"),
    [
        ("train.py", "train.py", ["train.py"]),
        ("mine.py", "mine.py", ["mine.py"]),  # a user's own script, which may do more than the command
        ("solov2-train", "solov2-train", ["solov2-train"]),
        ("bin/solov2", "solov2 train", ["bin/solov2", "train"]),
        ("solov2/__main__.py", "python -m solov2 train", ["-m", "solov2", "train"]),
        ("pytest/__main__.py", "solov2 train", ["-m", "solov2", "train"]),
        ("-c", "solov2 train", ["-m", "solov2", "train"]),
    ],
)
def test_a_command_knows_its_name_and_how_to_start_itself_again(script, typed, again, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    if script != "-c":
        Path(script).parent.mkdir(exist_ok=True)
        Path(script).touch()
    monkeypatch.setattr("sys.argv", [script, "--nproc", "2"])
    assert typed_name("train") == typed and own_command("train") == again


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (["train.py"], "usage: train.py "),
        (["-m", "solov2"], "usage: python -m solov2 "),
        (["-m", "solov2", "check-data"], "usage: python -m solov2 check-data "),
    ],
)
def test_help_prints_the_name_that_was_typed(words: list[str], usage: str, repo_root: Path) -> None:
    result = run(*words, "--help", cwd=repo_root)
    assert result.returncode == 0 and result.stdout.startswith(usage) and result.stderr == ""


def test_help_and_mistakes_import_nothing_heavy(repo_root: Path) -> None:
    """torch, torchvision and numpy take seconds to import, so commands import them only after parsing."""
    code = (
        "import sys\nfrom solov2.commands.main import COMMANDS, main\n"
        "for words in [['--help'], ['--version'], ['no'], *([name, '--help'] for name in COMMANDS), "
        "*([name, '--no-such-flag'] for name in COMMANDS)]:\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    result = run("-c", code, cwd=repo_root)
    assert result.returncode == 0, result.stderr
    seen = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert seen == ["[]"] * (3 + 2 * len(COMMANDS))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"solov2 {__version__}\n"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and all(f"  {name} " in out for name in COMMANDS)


def test_models_has_a_row_for_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    rows = {row["model"]: row for row in json.loads(out)}
    assert list(rows) == list_models() and all(name in err for name in rows)
    assert rows["solov2_light_r18_fpn_3x"]["parameters"] == 18_271_760
    assert {rows[name]["mask_AP"] for name in ("solov2_r50_fpn_3x", "quickstart")} == {0.375, None}


@pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="pip install 'solov2[completion]'")
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", shell]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("check-data", "evaluate-every", "bf16"))


def test_completion_without_shtab_names_the_extra(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "solov2[completion]" in capsys.readouterr().err


def test_the_combined_parser_parses_every_command() -> None:
    args = build_parser().parse_args(["train", "quickstart", "--epochs", "3"])
    assert (args.command, args.model, args.epochs) == ("train", "quickstart", 3)


@pytest.mark.parametrize("words", [["no_such_model"], ["quickstart", "--epoch", "3"], ["quickstart", "--epochs", "0"]])
def test_several_processes_report_a_mistake_once_and_before_the_launcher(words: list[str], tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [*LAUNCHER, str(root / "train.py"), *words, "--output", str(tmp_path / "run")],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    [error] = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    [report] = [number for number, line in enumerate(lines) if "ChildFailedError" in line][:1]
    assert error < report and "Traceback" not in "\n".join(lines[:error])


def test_an_omitted_positional_does_not_override_the_flag() -> None:
    parser = Parser(prog="x")
    add_model_argument(parser, default="none")
    assert parser.parse_args(["--config", "a"]).model == "a" and parser.parse_args(["b"]).model == "b"


def test_outputs_of_a_command_differ_from_each_other_and_from_its_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, same, out = tmp_path / "w.pth", str(tmp_path / "same.json"), str(tmp_path / "out")
    exported, photo = tmp_path / "w.pt2", tmp_path / "a.png"
    weights.touch()
    photo.touch()
    exported.symlink_to(weights)
    for words, flag in (
        (["eval", "--weights", str(weights), "--json", same, "--results", same], "--results"),
        (["eval", "--weights", str(weights), "--json", "-", "--results", "-"], "--results"),
        (["eval", "--weights", str(weights), "--json", str(weights), "--overwrite"], "--json"),
        (["check-data", str(weights), "--images", str(tmp_path), "--json", same, "--fix", same], "--fix"),
        (["convert", str(weights), str(weights), "--overwrite"], "OUT"),
        (
            ["export", "--weights", str(weights), "--size", "64", "64", "--output", str(exported), "--overwrite"],
            "--output",
        ),
        (["predict", str(photo), "--weights", str(weights), "--output", str(tmp_path), "--overwrite"], "--output"),
        (["predict", str(photo), "--weights", str(weights), "--results", str(photo), "--overwrite"], "--results"),
        (["predict", str(photo), "--weights", str(weights), "--output", out, "--results", f"{out}/a.png"], "--results"),
        (["predict", str(photo), "--weights", str(weights), "--output", out, "--results", out], "--results"),
        (["benchmark", "--compare", str(weights), "--json", str(weights), "--overwrite"], "--json"),
        (["check-data", str(weights), "--images", str(tmp_path), "--fix", str(weights), "--overwrite"], "--fix"),
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith(f"error: {flag} ") and "would replace" in error and error.count("\n") == 1
