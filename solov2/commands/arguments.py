"""The vocabulary of the commands: one parser class, and the flags that several commands share, each with one meaning.

Nothing here imports torch, so that `--help` costs no more than Python itself.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, get_args

from solov2.errors import InputError
from solov2.sections import TrainConfig
from solov2.settings import rules
from solov2.suggestions import did_you_mean

PATHS = ("train_annotations", "train_images", "val_annotations", "val_images")
LIMITS = {name: name for name in ("score_threshold", "max_instances")}  # flags -> settings of post-processing
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `InputError`, whose flags are typed in full, and whose help names every
    default.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **settings)

    def parse_args(  # type: ignore[override]  # argparse has overloads for the class of the namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse's, but an unknown flag is named with the closest ones.

        Raises:
            InputError: the words cannot be parsed.
        """
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if word.startswith("-"):
                self.error(f"unknown flag {word}{did_you_mean(word, self._option_string_actions)}")
            self.error(f"unknown argument {word}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise what `run_command` prints as one sentence."""
        raise InputError(f"{message}; see {self.prog} --help")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings or action.required or "default" in text or action.default == argparse.SUPPRESS:
            return text
        if not action.default:
            return f"{text} (default: {'no' if action.nargs == 0 else 'none'})"
        return super()._get_help_string(action)


def at_least(minimum: Number) -> Callable[[str], Number]:
    """The type of a flag whose value is a number from `minimum` on; its own type decides between int and float."""
    kind = type(minimum)

    def convert(text: str) -> Number:
        value = kind(text)
        if not minimum <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse shows it where the text is no number
    return convert


def choices(name: str) -> tuple[str, ...]:
    """What a setting of training takes."""
    return get_args(rules(TrainConfig)[name].kind)


SHARED: dict[str, dict[str, Any]] = {
    "--config": {"dest": "model", "metavar": "MODEL", "help": "model name or YAML file"},
    "--data-root": {"metavar": "DIR", "help": "folder with annotations/, train2017/ and val2017/"},
    "--weights": {"metavar": "FILE", "help": "checkpoint of any family; official: the published one of the model"},
    "--device": {"metavar": "NAME", "help": "cpu, cuda:1, ... (default: the accelerator, if there is one)"},
    "--precision": {"choices": choices("precision"), "help": "of the network"},
    "--batch-size": {"type": at_least(1), "metavar": "N", "help": "images at a time per process"},
    "--workers": {"type": at_least(0), "metavar": "N", "help": "loading processes per process"},
    "--nproc": {
        "type": at_least(1),
        "metavar": "N",
        "help": "processes on this machine, one per GPU (default: those of torchrun, else one)",
    },
    "--score-threshold": {"type": at_least(0.0), "metavar": "X", "help": "minimum score of an instance"},
    "--max-instances": {"type": at_least(0), "metavar": "N", "help": "instances per image at most, 0 for all"},
    "--size": {
        "type": at_least(1),
        "nargs": 2,
        "metavar": ("H", "W"),
        "help": "network input in pixels, multiples of 32",
    },
    "--json": {"metavar": "FILE", "help": "write figures and findings as JSON; - is the screen"},
    "--results": {"metavar": "FILE", "help": "write the instances in COCO's results format; - is the screen"},
    "--overwrite": {"action": "store_true", "help": "replace files that are there already"},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "SECTION.KEY=VALUE",
        "help": "change an entry of the configuration, e.g. model.input_scale=[1333,640]; may be repeated",
    },
}


def add_shared_arguments(
    parser: argparse._ActionsContainer,
    *flags: str,
    notes: Mapping[str, str] | None = None,
    required: Collection[str] = (),
) -> None:
    """Add flags of `SHARED`.

    Args:
        parser: takes them.
        flags: which ones.
        notes: {flag: what follows its help text in parentheses}, such as what its default is here.
        required: flags that must be given.
    """
    for flag in flags:
        note = (notes or {}).get(flag)
        shared = SHARED[flag]
        needed: dict[str, Any] = {"required": True} if flag in required else {}
        text = f"{shared['help']} ({note})" if note else shared["help"]
        parser.add_argument(flag, **shared | needed | {"help": text})


def add_model_argument(parser: argparse.ArgumentParser, *, default: str) -> None:
    """MODEL, as a positional or as --config, but not both; `args.model` is None without either.

    Args:
        parser: takes it.
        default: what stands for it where it is left out, for the help text.
    """
    group = parser.add_mutually_exclusive_group()
    # Without SUPPRESS the missing positional would write its default over the value of the flag.
    text = f"model name or YAML file (default: {default})"
    group.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=text)
    add_shared_arguments(group, "--config", notes={"--config": "the same as MODEL, its default too"})


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the data lies; they win over the configuration."""
    group = parser.add_argument_group("data")
    root = SHARED["--data-root"]
    text = f"{root['help']} (default: the configuration's, data/coco)"
    group.add_argument("--data", "--data-root", dest="data_root", **root | {"help": text})
    for split in ("train", "val"):
        group.add_argument(
            f"--{split}-annotations",
            metavar="FILE",
            help=f"{split} annotations in COCO's JSON format (default: the configuration's)",
        )
        group.add_argument(
            f"--{split}-images", metavar="DIR", help=f"folder of the {split} images (default: the configuration's)"
        )


def data_places(args: argparse.Namespace) -> dict[str, str | Path] | None:
    """What `solov2.data.build.locate_data` takes, of the flags of `add_data_arguments`; None without any."""
    named = {"root": args.data_root, **{key: getattr(args, key) for key in PATHS}}
    places = {key: path for key, path in named.items() if path is not None}
    return places or None


def given(args: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    """{configuration key: value} of the flags that were typed; `keys` maps an attribute of `args` to its key."""
    return {key: getattr(args, flag) for flag, key in keys.items() if getattr(args, flag) is not None}


def text_stream(*machine_outputs: str | None) -> TextIO:
    """Where text for people goes: standard error where one of the outputs is "-", the screen, else standard output."""
    return sys.stderr if "-" in machine_outputs else sys.stdout
