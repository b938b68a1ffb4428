"""The folder beside a run folder, for annotations converted to COCO's format and for the proposed settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from solov2.config import Config, config_folder, find_config
from solov2.errors import InputError
from solov2.outputs import replace_file

PROPOSAL = "proposal.yaml"
NAMES = ("train.json", "val.json", PROPOSAL)


def data_folder(run: Path) -> Path:
    """The folder for the data of a run: RUN.data, which --overwrite does not clear."""
    return run.with_name(f"{run.name}.data")


def check_data_folder(folder: Path) -> None:
    """Check that files of a run may be written to the folder. Raises InputError if it holds anything else."""
    if not folder.exists():
        return
    others = (
        sorted(path.name for path in folder.iterdir() if path.name not in NAMES) if folder.is_dir() else ["no folder"]
    )
    if others:
        raise InputError(
            f"{folder} is where {', '.join(NAMES)} of this run belong, but it holds {others[0]}; choose another run "
            "folder with --output"
        )


def file_contents(
    contents: Mapping[str, Mapping[str, Any]], base: str | Path | None, recipe: Config, config: Config
) -> dict[str, str]:
    """{name: text} of the files to write.

    Args:
        contents: {"train", "val"}: COCO's JSON, of those that are not used as they are.
        base: model name or YAML file that `recipe` was loaded from; None: no file of settings is written.
        recipe: the configuration before any change.
        config: that of the run.
    """
    files = {f"{part}.json": json.dumps(content) + "\n" for part, content in contents.items()}
    if base is not None:
        changed = {key: value for key, value in _changed(recipe.to_dict(), config.to_dict()).items() if value}
        values = {"base": _base_name(base), "name": config.name, **changed}
        files[PROPOSAL] = yaml.safe_dump(values, default_flow_style=None, sort_keys=False, width=120)
    return files


def _base_name(model: str | Path) -> str:
    path = find_config(model).resolve()
    return path.stem if path.parent == config_folder().resolve() else str(path)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each section that differ."""
    sections = [name for name in now if isinstance(now[name], dict)]
    return {name: {key: value for key, value in now[name].items() if value != before[name][key]} for name in sections}


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write those whose content differs from what is there, each whole or not at all.

    Raises:
        OSError: disk full or no permission.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            with replace_file(path) as file:
                file.write(text.encode())
