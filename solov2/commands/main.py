"""The front door: `solov2 COMMAND ...`, which is also `python -m solov2 COMMAND ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from solov2.commands.arguments import Parser
from solov2.commands.exit import run_command, typed_name
from solov2.errors import InputError
from solov2.suggestions import did_you_mean
from solov2.version import __version__

COMMANDS = {
    "train": "train a model on data in COCO's format",
    "eval": "COCO mask AP and box AP of a model",
    "predict": "segment photographs and draw what was found",
    "benchmark": "images per second, stage by stage",
    "check-data": "what is wrong with a data set, and a repaired copy",
    "export": "write a model as one graph (.pt2, .onnx)",
    "convert": "write a checkpoint under the names of another family",
    "models": "the models, their parameters and their published AP",
}
MODULES = {"eval": "evaluate"}  # of the commands that are not called like their module
PATH_NAMES = ("ANNOTATIONS", "DIR", "FILE", "IN", "OUT", "SOURCE")  # metavars that a shell completes to files
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments, the command first; those of the process where None.

    Returns:
        The exit code of the command; 2 for one that does not exist.

    Raises:
        KeyboardInterrupt: after Ctrl-C where `argv` was given.
        SystemExit: after --help, --version.
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
        return 130


def command_module(name: str) -> ModuleType:
    """The module of a command: `build_parser(name as typed)` and `main(argv)`."""
    return importlib.import_module(f"solov2.commands.{MODULES.get(name, name.replace('-', '_'))}")


def build_parser(typed: str = "solov2") -> Parser:
    """All commands in one parser: what help prints, what a shell completes, and what the tests go through."""
    parser = Parser(
        prog=typed, description="Train, evaluate, run and export SOLOv2.", epilog=f"{typed} COMMAND --help says more"
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
        own = command_module(name).build_parser(f"{typed} {name}")
        commands.add_parser(name, help=purpose, description=own.description, parents=[own], add_help=False)
    return parser


def _front_parser(word: str) -> Parser:
    if not word.startswith("-"):
        raise InputError(f"unknown command '{word}'{did_you_mean(word, COMMANDS)}; there are {', '.join(COMMANDS)}")
    return build_parser(typed_name("").rstrip())


def _run(args: argparse.Namespace) -> int:
    if args.print_completion is None:
        raise InputError(f"name a command: {', '.join(COMMANDS)}")
    try:
        import shtab
    except ImportError as error:
        raise InputError("completion scripts are made by shtab: pip install 'solov2[completion]'") from error
    parser = build_parser()
    for action in _actions(parser):
        if action.metavar in PATH_NAMES:
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=args.print_completion))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                yield from own._actions
        yield action
