"""Flags that several commands share, each with one meaning."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATHS = ("train_annotations", "train_images", "val_annotations", "val_images")
SHARED: dict[str, dict[str, Any]] = {
    "--weights": {"metavar": "FILE", "help": "checkpoint of any family; official: the published one of the model"},
    "--device": {"help": "e.g. cpu (default: the accelerator, if there is one)"},
    "--precision": {"choices": ("float32", "bf16", "fp16"), "help": "of the network"},
    "--batch-size": {"type": int, "metavar": "N", "help": "images at a time per process"},
    "--nproc": {"type": int, "metavar": "N", "help": "processes on this machine, one per GPU"},
    "--workers": {"type": int, "metavar": "N", "help": "loading processes per process"},
    "--overwrite": {"action": "store_true", "help": "replace what an earlier run wrote"},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "SECTION.KEY=VALUE",
        "help": "any entry of the configuration, e.g. model.input_scale=[1333,640]",
    },
}


def add_shared_arguments(parser: argparse.ArgumentParser, *flags: str, notes: Mapping[str, str] | None = None) -> None:
    """Add flags of `SHARED`; `notes` go behind the help text of a flag, such as what its default is here."""
    for flag in flags:
        note = (notes or {}).get(flag)
        shared = SHARED[flag]
        parser.add_argument(flag, **shared | {"help": f"{shared['help']} ({note})" if note else shared["help"]})


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the data lies; they win over the configuration."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder with annotations/, train2017/, val2017/ (default: the configuration's, data/coco)",
    )
    for split in ("train", "val"):
        group.add_argument(f"--{split}-annotations", metavar="FILE", help=f"{split} annotations in COCO's JSON format")
        group.add_argument(f"--{split}-images", metavar="DIR", help=f"folder of the {split} images")


def data_places(args: argparse.Namespace) -> dict[str, str | Path] | None:
    """What `solov2.data.build.locate_data` takes, of the flags of `add_data_arguments`; None without any."""
    named = {"root": args.data_root, **{key: getattr(args, key) for key in PATHS}}
    places = {key: path for key, path in named.items() if path is not None}
    return places or None


def given(args: argparse.Namespace, keys: dict[str, str]) -> dict[str, Any]:
    """{configuration key: value} of the flags that were typed; `keys` maps an attribute of `args` to its key."""
    return {key: getattr(args, flag) for flag, key in keys.items() if getattr(args, flag) is not None}
