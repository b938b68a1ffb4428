"""Sharing whole models through the Hugging Face Hub (extra `hub`), with a model card that says what was measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from solov2.build import load
from solov2.errors import InputError, count, printable
from solov2.models.saving import model_checkpoint
from solov2.models.solov2 import SOLOv2
from solov2.version import __version__

WEIGHTS, CARD = "model.safetensors", "README.md"  # the files of a repository


def push_to_hub(
    model: SOLOv2,
    repo: str,
    *,
    license: str | None = None,
    figures: Mapping[str, float] | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a SOLOv2",
) -> str:
    """Upload a model with its configuration, classes and thresholds; `from_pretrained` loads it.

    Args:
        model: from `solov2.build_model`, `solov2.load` or `from_pretrained`.
        repo: name of the repository, "owner/name"; it is created if necessary. An existing model card is kept.
        license: license of the weights for the card, such as "apache-2.0"; None: no license is stated.
        figures: measured figures for the card, such as {"mask AP on COCO val2017, in percent": 37.5}.
        private: whether a new repository is private; None: the owner's default.
        token: access token of the Hub; None: that of `hf auth login` or of HF_TOKEN.
        message: commit message.

    Returns:
        URL of the commit.

    Raises:
        InputError: huggingface_hub or safetensors is not installed, the model cannot be saved (see `SOLOv2.save`), or
            the upload failed.
    """
    hub = _huggingface_hub()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(model, folder, repo=repo, license=license, figures=figures)
        try:
            api = hub.HfApi(token=token)
            api.create_repo(repo, private=private, exist_ok=True)
            kept = [CARD] if api.file_exists(repo, CARD) else None
            commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=kept)
        except Exception as error:  # what a lost connection raises depends on the version of huggingface_hub
            raise InputError(f"the model could not be uploaded to {printable(repo)} ({_reason(error)})") from error
    return str(commit.commit_url)


def from_pretrained(
    repo: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: str | torch.device | None = None,
) -> SOLOv2:
    """Load a model from a repository written by `push_to_hub`, or from a folder with the same files.

    Only the weights file is read, and no code in it is executed.

    Args:
        repo: "owner/name" on the Hub, or a folder; a folder that exists takes precedence.
        revision: branch, tag or commit; default: the main branch.
        token: as for `push_to_hub`, for private repositories.
        device: device of the model; default: the CPU.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: huggingface_hub or safetensors is not installed, or the file is missing, damaged or cannot be
            downloaded.
    """
    if os.path.isdir(repo):
        return load(Path(repo) / WEIGHTS, device)
    hub = _huggingface_hub()
    try:
        path = hub.hf_hub_download(str(repo), WEIGHTS, revision=revision, token=token)
    except Exception as error:  # what a lost connection raises depends on the version of huggingface_hub
        raise InputError(f"no {WEIGHTS} from {printable(str(repo))} ({_reason(error)})") from error
    return load(path, device)


def write_folder(
    model: SOLOv2,
    folder: str | Path,
    *,
    repo: str,
    license: str | None = None,
    figures: Mapping[str, float] | None = None,
) -> None:
    """Write the files that `push_to_hub` uploads, replacing older ones: the model and its card.

    Args:
        model, repo, license, figures: as for `push_to_hub`.
        folder: created if needed.

    Raises:
        InputError: see `SOLOv2.save`.
        OSError: disk full or no permission.
    """
    model.save(Path(folder) / WEIGHTS)
    card = model_card(model, repo, license, figures or {})
    (Path(folder) / CARD).write_text(card, encoding="utf-8")


def model_card(model: SOLOv2, repo: str, license: str | None, figures: Mapping[str, float]) -> str:
    """The model card in Markdown, in which all text from the user is escaped. See `push_to_hub` for the arguments."""
    panoptic = model.semantic_head is not None
    kind = "panoptic" if panoptic else "instance"
    metadata: dict[str, Any] = {
        "library_name": "solov2",
        "pipeline_tag": "image-segmentation",
        "tags": ["solov2", f"{kind}-segmentation"],
    }
    if license is not None:
        metadata["license"] = license
    rows = [f"| {_escaped(what)} | {figure:g} |" for what, figure in figures.items()]
    stuff = f"\n\nStuff: {', '.join(map(_escaped, model.stuff_names))}." if panoptic else ""
    stated = _escaped(license or "") or "None is stated; the license of the weights that it started from still applies."
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# {_escaped(repo.rpartition("/")[2])}

[SOLOv2](https://arxiv.org/abs/2003.10152) for {kind} segmentation: {parameters:.1f} M parameters, \
{count(model.num_classes, "class", "classes")}. Written by solov2 {__version__}.

## Use

With the Python package solov2 and its extra `hub`:

```python
import solov2

model = solov2.hub.from_pretrained({ascii(repo)})
results = model.predict(["street.jpg"])  # masks, boxes, labels, scores
```

## Figures

{chr(10).join(["| measured | |", "|---|---|", *rows]) if rows else "None are stated."}

## Classes

{", ".join(map(_escaped, model.class_names))}.{stuff}

## Configuration

```yaml
{yaml.safe_dump(model_checkpoint(model, repo).config, sort_keys=False, default_flow_style=None, width=100).strip()}
```

## License of the weights

{stated}
"""


def _escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is: every character but letters, digits and spaces as a number."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in printable(text))


def _huggingface_hub() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("the Hugging Face Hub needs huggingface_hub: pip install 'solov2[hub]'") from error
    return huggingface_hub


def _reason(error: BaseException) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__
