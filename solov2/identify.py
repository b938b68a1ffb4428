"""Identify a weights file: its hash, its family, the published file that it equals, the models that it fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from solov2.build import construct, fit_config
from solov2.checkpoint import Checkpoint
from solov2.config import ModelConfig, list_models, load_config
from solov2.data.categories import default_class_names
from solov2.download import sha256_of
from solov2.errors import InputError
from solov2.published import PUBLISHED_FILES, PublishedFile
from solov2.weights import check_fits, read_checkpoint


@dataclass(frozen=True)
class Identity:
    """What a weights file is.

    Args:
        sha256: of the file, 64 digits.
        family: whose names its tensors have: "solov2", "original", "mmdet" or "adelaidet".
        published: the published file with this hash, if there is one.
        expected: published files of the same name that have another hash, if `published` is None.
        models: names of the models whose network takes its weights, see `fitting_models`.
        own_model: name of the configuration that the file carries, if its network takes the weights.
    """

    sha256: str
    family: str
    published: PublishedFile | None
    expected: list[PublishedFile]
    models: list[str]
    own_model: str | None


def identify(path: str | Path) -> Identity:
    """Read a weights file and say what it is.

    Raises:
        InputError: unreadable or damaged, see `solov2.weights.read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    digest, name = sha256_of(Path(path)), Path(path).name
    published = next((file for file in PUBLISHED_FILES if file.sha256 and digest.startswith(file.sha256)), None)
    named = [file for file in PUBLISHED_FILES if file.sha256 and name in (file.name, file.cache_name)]
    config = checkpoint.configuration()
    own = config is not None and fits(config.model, checkpoint)
    return Identity(
        digest,
        checkpoint.family,
        published,
        named if published is None else [],
        fitting_models(checkpoint),
        config.name if config is not None and own else None,
    )


def fitting_models(checkpoint: Checkpoint) -> list[str]:
    """Names of the models whose network has exactly the tensors of a checkpoint.

    Models that differ only in their training or in the input size have the same network.
    """
    return [name for name in list_models() if fits(load_config(name).model, checkpoint)]


def fits(config: ModelConfig, checkpoint: Checkpoint) -> bool:
    """Whether the network of a configuration has exactly the tensors of a checkpoint.

    The numbers of classes and the traits are taken from the checkpoint, as in `solov2.build_model`.
    """
    try:
        config = fit_config(config, checkpoint)
        with torch.device("meta"):  # shapes only, without memory
            expected = construct(config, default_class_names(config.num_classes)).state_dict()
        check_fits(expected, checkpoint.weights, checkpoint.source)
    except InputError:
        return False
    return True
