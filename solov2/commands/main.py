"""The entry point of all commands: `solov2 COMMAND ...` or `python -m solov2 COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from solov2.commands.arguments import Parser
from solov2.commands.exit import INTERRUPTED, run_command, typed_name
from solov2.errors import InputError
from solov2.suggestions import did_you_mean
from solov2.version import __version__

COMMANDS = {
    "train": "train a model on data in COCO's format",
    "eval": "evaluate COCO mask AP and box AP of a model",
    "panoptic-quality": "compute the panoptic quality of two files in COCO's panoptic format",
    "report": "write a page about a run, with what to fix first",
    "predict": "segment images and draw the results",
    "benchmark": "measure images per second, by stage",
    "check-data": "check a dataset and write a repaired copy",
    "import": "read annotations of other tools and write them in COCO's format",
    "export": "write a model as one graph (.pt2, .onnx)",
    "convert": "rewrite a checkpoint with the names of another family",
    "models": "list the models, their parameters and their published AP",
    "weights": "list published weights, fetch them, or say what a weights file is",
}
MODULES = {"eval": "evaluate", "import": "import_data"}  # commands whose module has another name
# metavars that a shell completes with paths
PATH_NAMES = (
    "ANNOTATIONS",
    "DIR",
    "FILE",
    "FILE.html",
    "FILE.json",
    "GT.json",
    "IN",
    "OUT",
    "PRED.json",
    "RUN",
    "SOURCE",
)
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments, starting with the command; default: those of the process.

    Returns:
        The exit code of the command; 2 for an unknown command.

    Raises:
        KeyboardInterrupt: after Ctrl-C if `argv` was given.
        SystemExit: after --help or --version.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words = ["--help"] if words in ([], ["help"]) else words
    if words[0] not in COMMANDS:
        return run_command("", lambda _name: _front_parser(words[0]), _run, words)
    try:
        return command_module(words[0]).main(words[1:])
    except KeyboardInterrupt:
        if argv is not None:
            raise
        return INTERRUPTED


def command_module(name: str) -> ModuleType:
    """The module of a command; it has `build_parser(typed)` and `main(argv)`."""
    return importlib.import_module(f"solov2.commands.{MODULES.get(name, name.replace('-', '_'))}")


def build_parser(typed: str = "solov2") -> Parser:
    """Build one parser with all commands, for help, shell completion and tests."""
    parser = Parser(
        prog=typed, description="Train, evaluate, run and export SOLOv2.", epilog=f"for details: {typed} COMMAND --help"
    )
    parser.add_argument("--version", action="version", version=f"solov2 {__version__}", help="print the version")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a completion script for {', '.join(SHELLS)} (default: none)",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, purpose in COMMANDS.items():
        command = command_module(name).build_parser(f"{typed} {name}")
        commands.add_parser(name, help=purpose, description=command.description, parents=[command], add_help=False)
    return parser


def _front_parser(word: str) -> Parser:
    if not word.startswith("-"):
        raise InputError(f"unknown command '{word}'{did_you_mean(word, COMMANDS)}; available: {', '.join(COMMANDS)}")
    return build_parser(typed_name("").rstrip())


def _run(args: argparse.Namespace) -> int:
    if args.print_completion is None:
        raise InputError(f"give a command: {', '.join(COMMANDS)}")
    try:
        import shtab
    except ImportError as error:
        raise InputError("completion scripts need shtab: pip install 'solov2[completion]'") from error
    parser = build_parser()
    for action in _actions(parser):
        if action.metavar in PATH_NAMES:
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=args.print_completion))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from command._actions
        yield action
