"""The vocabulary of the commands: one parser class, and the flags that several commands share, each with one meaning.

Nothing here imports torch, so that `--help` costs no more than Python itself.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, TypeVar, get_args, get_origin

from solov2.errors import InputError
from solov2.sections import DataConfig, ModelConfig, TrainConfig
from solov2.settings import Rule, rules
from solov2.suggestions import did_you_mean

DATA_PATHS = ("train_annotations", "train_images", "val_annotations", "val_images")
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
    """Adds the default to a help text that does not name it; only the text can say what None stands for."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings or "default" in text or action.default in (None, argparse.SUPPRESS):
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


RULES: dict[str, Rule] = {**rules(ModelConfig), **rules(DataConfig), **rules(TrainConfig)}


def choices(name: str) -> tuple[str, ...]:
    """The choices of a setting; none where it takes anything else."""
    return get_args(RULES[name].kind) if get_origin(RULES[name].kind) is Literal else ()


def value_of(name: str) -> Callable[[str], Any]:
    """The type of a flag that stands for a setting and takes what the setting takes."""
    rule = RULES[name]

    def convert(text: str) -> Any:
        try:
            return rule.check(rule.kind(text), name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {rule.words}, got {text}") from error

    return convert


def add_setting(parser: argparse.ArgumentParser, flag: str, *aliases: str, default: str) -> None:
    """A flag that is called like a setting and means it."""
    name = flag.lstrip("-").replace("-", "_")
    options: dict[str, Any] = {"type": value_of(name), "metavar": "N"}
    if choices(name):
        options = {"choices": choices(name)}
    parser.add_argument(flag, *aliases, help=f"{RULES[name].doc} (default: {default})", **options)


SHARED: dict[str, dict[str, Any]] = {
    "--config": {"dest": "model", "metavar": "MODEL", "help": "model name or YAML file"},
    "--weights": {"metavar": "FILE", "help": "checkpoint of any family; official: the published one of the model"},
    "--device": {"metavar": "NAME", "help": "cpu, cuda:1, ... (default: the accelerator, if there is one)"},
    "--precision": {"choices": choices("precision"), "help": "precision of the network"},
    "--batch-size": {"type": value_of("batch_size"), "metavar": "N", "help": "images at a time per process"},
    "--workers": {"type": value_of("workers"), "metavar": "N", "help": "loading processes"},
    "--nproc": {
        "type": at_least(1),
        "metavar": "N",
        "help": "processes on this machine, one per GPU (default: those of torchrun, else one)",
    },
    "--score-threshold": {"type": value_of("score_threshold"), "metavar": "X", "help": "minimum score of an instance"},
    "--max-instances": {"type": value_of("max_instances"), "metavar": "N", "help": "instances per image; 0: all"},
    "--size": {
        "type": at_least(1),
        "nargs": 2,
        "metavar": ("H", "W"),
        "help": "network input in pixels, multiples of 32",
    },
    "--json": {"metavar": "FILE", "help": "write the report as JSON; - is the screen (default: none)"},
    "--results": {
        "metavar": "FILE",
        "help": "write the instances in COCO's results format; - is the screen (default: none)",
    },
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


def add_data_root(parser: argparse._ActionsContainer, *, default: str) -> None:
    """The folder of a COCO tree; `default` is what stands for it, for the help text."""
    text = f"folder with annotations/, train2017/ and val2017/ (default: {default})"
    parser.add_argument("--data", "--data-root", dest="data_root", metavar="DIR", help=text)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the data lies; they win over the configuration."""
    group = parser.add_argument_group("data")
    add_data_root(group, default="the configuration's, data/coco")
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
    named = {"root": args.data_root, **{key: getattr(args, key) for key in DATA_PATHS}}
    places = {key: path for key, path in named.items() if path is not None}
    return places or None


def given(args: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    """{configuration key: value} of the flags that were typed; `keys` maps an attribute of `args` to its key."""
    return {key: getattr(args, flag) for flag, key in keys.items() if getattr(args, flag) is not None}


def model_settings(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the model among "section.key" overrides, as `solov2.build.build_model` takes them."""
    return {key.removeprefix("model."): value for key, value in overrides.items() if key.startswith("model.")}


def text_stream(*machine_outputs: str | None) -> TextIO:
    """Where text for people goes: standard error where one of the outputs is "-", the screen, else standard output."""
    return sys.stderr if "-" in machine_outputs else sys.stdout
