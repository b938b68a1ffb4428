"""Files in the safetensors format: tensors without a pickle, and the rest of a checkpoint as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solov2.errors import InputError
from solov2.outputs import replace_file

SUFFIX = ".safetensors"
KEY = "solov2"  # of the header's entry that holds what is not a tensor
NEEDED = "files in the safetensors format need safetensors: pip install 'solov2[hub]'"


def is_safetensors(path: str | Path) -> bool:
    """Whether a file has this format, by its name."""
    return Path(path).suffix.lower() == SUFFIX


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """The entries of a checkpoint that `write_safetensors` wrote; of other files, the tensors by name.

    Raises:
        InputError: the file is damaged, or safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError(f"cannot read {path}: {NEEDED}") from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            text = (file.metadata() or {}).get(KEY)
        entries = {} if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a safetensors file; it is truncated or damaged") from error
    if not isinstance(entries, dict):
        raise InputError(f"{path} is damaged: entry '{KEY}' of its header is not a JSON object")
    return tensors if text is None else {**entries, "model": tensors}


def write_safetensors(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write the entries of a checkpoint atomically: "model", {name: tensor}, and others that JSON can hold.

    Raises:
        InputError: safetensors is not installed.
        OSError: disk full or no permission; an existing file is left unchanged.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise InputError(f"cannot write {path}: {NEEDED}") from error
    # The format has no place for strides, nor for tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in content["model"].items()}
    header = json.dumps({name: value for name, value in content.items() if name != "model"})
    with replace_file(path) as file:
        file.write(save(tensors, {"format": "pt", KEY: header}))
