"""The parser class of the commands, and the flags that several commands share, each with one meaning.

Nothing here imports torch, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, TypeVar, get_args, get_origin

from solov2.errors import InputError
from solov2.sections import DataConfig, ModelConfig, TrainConfig
from solov2.settings import Rule, rules
from solov2.suggestions import did_you_mean

DATA_PATHS = tuple(f"{split}_{kind}" for split in ("train", "val") for kind in ("annotations", "images", "segments"))
LIMITS = {name: name for name in ("score_threshold", "max_instances")}  # flag -> setting of post-processing
RUN_FLAGS = (
    "--nproc",
    "--device",
    "--precision",
    "--batch-size",
    "--workers",
    "--set",
    "--overwrite",
)  # train and eval
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `InputError`, takes no abbreviated flags, and shows every default in its help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **settings)

    def parse_args(  # type: ignore[override]  # argparse has overloads for the class of the namespace
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As in argparse, but the error for an unknown flag suggests the closest ones, and `~` is the home folder in
        `--flag=~/x` as well, which shells leave as it is.

        Raises:
            InputError: invalid arguments.
        """
        words = [_expand_home(word) for word in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if word.startswith("-"):
                self.error(f"unknown flag {word}{did_you_mean(word, self._option_string_actions)}")
            self.error(f"unknown argument {word}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise the error, which `run_command` prints in one line."""
        raise InputError(f"{message}; see {self.prog} --help")


def _expand_home(word: str) -> str:
    """The argument, or its value after `--flag=`, with a leading `~/` expanded."""
    return re.sub(r"^(--[\w-]+=)?~(?=/|$)", lambda found: f"{found[1] or ''}{os.path.expanduser('~')}", word)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not mention it; what None means, the text itself has to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings or "default" in text or action.default in (None, argparse.SUPPRESS):
            return text
        if not action.default:
            return f"{text} (default: {'no' if action.nargs == 0 else 'none'})"
        return super()._get_help_string(action)


def at_least(minimum: Number) -> Callable[[str], Number]:
    """The `type` of a flag whose value is a number of at least `minimum`, an int or a float as `minimum` is."""
    kind = type(minimum)

    def convert(text: str) -> Number:
        value = kind(text)
        if not minimum <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse shows it if the text is not a number
    return convert


RULES: dict[str, Rule] = {**rules(ModelConfig), **rules(DataConfig), **rules(TrainConfig)}


def choices(name: str) -> tuple[str, ...]:
    """The choices of a setting; empty if it is not a choice."""
    return get_args(RULES[name].kind) if get_origin(RULES[name].kind) is Literal else ()


def value_of(name: str) -> Callable[[str], Any]:
    """The `type` of a flag for the setting `name`, which accepts what the setting accepts."""
    rule = RULES[name]

    def convert(text: str) -> Any:
        try:
            return rule.check(rule.kind(text) if isinstance(rule.kind, type) else _number_or_choice(text), name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {rule.words}, got {text}") from error

    return convert


def _number_or_choice(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def add_setting(parser: argparse.ArgumentParser, flag: str, *aliases: str, default: str) -> None:
    """Add a flag with the name and meaning of a setting."""
    name = flag.lstrip("-").replace("-", "_")
    options: dict[str, Any] = {"type": value_of(name), "metavar": "N"}
    if choices(name):
        options = {"choices": choices(name)}
    parser.add_argument(flag, *aliases, help=f"{RULES[name].doc} (default: {default})", **options)


def _views(text: str) -> str:
    from solov2.views import parse_views  # which imports torch

    try:
        parse_views(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _names(text: str) -> list[str]:
    """The names in a list that is separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


SHARED: dict[str, dict[str, Any]] = {
    "--config": {"dest": "model", "metavar": "MODEL", "help": "model name or YAML file"},
    "--weights": {
        "metavar": "FILE",
        "help": "checkpoint of any family; official or official:FAMILY for published weights",
    },
    "--device": {"metavar": "NAME", "help": "cpu, cuda:1, ... (default: the accelerator, if there is one)"},
    "--precision": {"choices": choices("precision"), "help": "precision of the network"},
    "--batch-size": {"type": value_of("batch_size"), "metavar": "N", "help": "images per batch in each process"},
    "--workers": {"type": value_of("workers"), "metavar": "N", "help": "DataLoader workers"},
    "--classes": {
        "type": _names,
        "metavar": "A,B",
        "help": "only these classes, by name; others are treated as if they were not annotated (default: all)",
    },
    "--tta": {
        "type": _views,
        "metavar": "VIEWS",
        "help": "test-time augmentation: predict several views of each image and merge them; flip adds mirrored views, "
        "and factors add resized ones, as in flip,0.75,1.25 (default: none)",
    },
    "--nproc": {
        "type": at_least(1),
        "metavar": "N",
        "help": "processes on this machine, one per GPU (default: torchrun's, else one)",
    },
    "--score-threshold": {"type": value_of("score_threshold"), "metavar": "X", "help": "minimum score of an instance"},
    "--max-instances": {
        "type": value_of("max_instances"),
        "metavar": "N",
        "help": "maximum instances per image; 0: no limit",
    },
    "--size": {
        "type": at_least(1),
        "nargs": 2,
        "metavar": ("H", "W"),
        "help": "network input in pixels, multiples of 32",
    },
    "--json": {"metavar": "FILE", "help": "write the report as JSON; -: to standard output (default: none)"},
    "--results": {
        "metavar": "FILE",
        "help": "write the instances in COCO's results format; -: to standard output (default: none)",
    },
    "--per-class": {"action": "store_true", "help": "also report the figures of each class"},
    "--overwrite": {"action": "store_true", "help": "replace existing files"},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "SECTION.KEY=VALUE",
        "help": "change a setting of the configuration, e.g. model.input_scale=[1333,640]; may be repeated",
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
        parser: receives the flags.
        flags: which flags.
        notes: {flag: text to append to its help in parentheses}, such as its default in this command.
        required: flags that must be given.
    """
    for flag in flags:
        note = (notes or {}).get(flag)
        shared = SHARED[flag]
        needed: dict[str, Any] = {"required": True} if flag in required else {}
        text = f"{shared['help']} ({note})" if note else shared["help"]
        parser.add_argument(flag, **shared | needed | {"help": text})


def add_model_argument(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add MODEL, as a positional or as --config, but not both; `args.model` is None if neither is given.

    Args:
        parser: receives the arguments.
        default: what is used without it, for the help text.
    """
    group = parser.add_mutually_exclusive_group()
    # Without SUPPRESS, the default of a missing positional would overwrite the value of the flag.
    text = f"model name or YAML file (default: {default})"
    group.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=text)
    add_shared_arguments(group, "--config", notes={"--config": "the same as MODEL, with the same default"})


def add_data_root(parser: argparse._ActionsContainer, *, default: str) -> None:
    """Add the flag for the folder of a COCO tree; `default` is what is used without it, for the help text."""
    text = f"folder with annotations/, train2017/ and val2017/ (default: {default})"
    parser.add_argument("--data", "--data-root", dest="data_root", metavar="DIR", help=text)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that locate the data; they take precedence over the configuration."""
    group = parser.add_argument_group("data")
    add_data_root(group, default="from the configuration, usually data/coco")
    for split, purpose in (("train", "training"), ("val", "validation")):
        group.add_argument(
            f"--{split}-annotations",
            metavar="FILE",
            help=f"{purpose} annotations in COCO's JSON format (default: from the configuration)",
        )
        group.add_argument(
            f"--{split}-images", metavar="DIR", help=f"folder of the {purpose} images (default: from the configuration)"
        )
        group.add_argument(
            f"--{split}-segments",
            metavar="DIR",
            help=f"folder of the PNGs of panoptic {purpose} annotations (default: beside the annotation file)",
        )


def data_places(args: argparse.Namespace) -> dict[str, str | Path] | None:
    """The flags of `add_data_arguments`, as `solov2.data.build.locate_data` takes them; None if none was given."""
    named = {"root": args.data_root, **{key: getattr(args, key) for key in DATA_PATHS}}
    places = {key: path for key, path in named.items() if path is not None}
    return places or None


def given(args: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    """{configuration key: value} for the flags that were given; `keys` maps an attribute of `args` to its key."""
    return {key: getattr(args, flag) for flag, key in keys.items() if getattr(args, flag) is not None}


def model_settings(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The model settings among "section.key" overrides, as `solov2.build.build_model` takes them."""
    return {key.removeprefix("model."): value for key, value in overrides.items() if key.startswith("model.")}


def text_stream(*machine_outputs: str | None) -> TextIO:
    """Where to print text for people: standard error if an output is "-", standard output, else standard output."""
    return sys.stderr if "-" in machine_outputs else sys.stdout
