"""Weights: reading checkpoints of every family, and strict loading."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solov2.checkpoint import FORMAT, TRAITS, Checkpoint, check_finite, load_file, write_file
from solov2.config import Config, ModelConfig, replace_model
from solov2.convert import class_names_of, convert_state_dict, is_modulated, to_mmdet, unwrap
from solov2.download import download
from solov2.errors import InputError, count, printable
from solov2.outputs import check_outputs
from solov2.published import find_published
from solov2.safetensors_file import is_safetensors

LOG = logging.getLogger(__name__)


TARGETS = (FORMAT, "mmdet")  # families that `convert_file` writes
CATEGORY_LAYER = "head.category_predictor"  # one row per class
SEMANTIC_HEAD = "semantic_head"
AUXILIARY_HEAD = "auxiliary_head"  # of an auxiliary loss: only runs that resume need it
STUFF_LAYER = f"{SEMANTIC_HEAD}.predictor"  # one row per stuff class, and one for all things


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file of any family, opening it only once; weights of other families are converted.

    The head of an auxiliary loss stays in the state of the training run and is left out of the weights.

    Raises:
        InputError: unreadable (see `solov2.checkpoint.load_file`), damaged (NaN and infinity count), or of an unknown
            family.
    """
    content, source = load_file(path), str(path)
    if isinstance(content.get("format"), str) and content["format"] == FORMAT:
        checkpoint = Checkpoint.from_content(content, source)
    else:
        try:
            weights, traits = convert_state_dict(unwrap(content))
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error
        names = class_names_of(content)
        checkpoint = Checkpoint(source, weights, family=traits["family"], traits=traits, class_names=names)
    _check_values(checkpoint)
    auxiliary = auxiliary_tensors(checkpoint.weights)
    if auxiliary:
        kept = {name: tensor for name, tensor in checkpoint.weights.items() if name not in auxiliary}
        checkpoint = replace(checkpoint, weights=kept)
    return checkpoint


def _check_values(checkpoint: Checkpoint) -> None:
    """Check what decides the architecture, and that all numbers are finite, those of a run's optimizer too.

    Raises:
        InputError: invalid trait, a category layer whose bias is not one number per class, or a tensor with NaN or
            infinity.
    """
    source, training = checkpoint.source, checkpoint.training
    apply_weight_metadata(ModelConfig(), checkpoint)
    for weights in [checkpoint.weights, *([] if training is None else [training.weights])]:
        for layer, name in ((CATEGORY_LAYER, "category layer"), (STUFF_LAYER, "stuff layer")):
            weight, bias = (weights.get(f"{layer}.{part}") for part in ("weight", "bias"))
            if bias is not None and (bias.ndim != 1 or weight is not None and weight.shape[:1] != bias.shape):
                raise InputError(
                    f"{source} is damaged: the bias of its {name} has shape {list(bias.shape)}, not one number per "
                    "class"
                )
        check_finite(weights, source)
    for number, state in ({} if training is None else training.optimizer["state"]).items():
        tensors = {f"{name} of parameter {number}": each for name, each in state.items() if isinstance(each, Tensor)}
        check_finite(tensors, source)


def find_checkpoint(
    weights: str | Path | Checkpoint | None, name_or_config: str | Path | Config | ModelConfig | None = None
) -> Checkpoint | None:
    """The checkpoint that the argument `weights` refers to; None for None.

    Args:
        weights: a file, "official" for the model's published file ("official:mmdet", "official:authors" and
            "official:adelaidet" say whose), or a checkpoint that has already been read.
        name_or_config: the model; required for "official".

    Raises:
        InputError: the file does not exist, cannot be read or cannot be downloaded, or no weights are published.
    """
    if weights is None or isinstance(weights, Checkpoint):
        return weights
    word, _, family = str(weights).partition(":")
    return read_checkpoint(official_weights(name_or_config, family) if word == "official" else weights)


def official_weights(name: str | Path | Config | ModelConfig | None, family: str = "") -> Path:
    """Path of a model's published weights in torch's hub cache; they are downloaded on first use.

    Args:
        name: the model.
        family: whose weights, one of `solov2.published.FAMILIES`; "" for the first file of the model.

    Raises:
        InputError: no weights are published for this model, or the download failed; the message says what to do.
    """
    name = Path(name).stem if isinstance(name, (str, Path)) else getattr(name, "name", None)
    if name is None:
        raise InputError("official weights belong to a named model: name it too (--config MODEL)")
    return download(find_published(name, family))


def apply_weight_metadata(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The configuration with the settings in `TRAITS` taken from a checkpoint.

    Raises:
        InputError: invalid value of a trait.
    """
    try:
        return replace_model(config, {key: checkpoint.traits[key] for key in TRAITS if key in checkpoint.traits})
    except InputError as error:
        raise InputError(f"{checkpoint.source} is damaged: {error}") from error


def weight_metadata(config: ModelConfig) -> dict[str, Any]:
    """The traits to store in a checkpoint of this model, see `solov2.convert.convert_state_dict`."""
    values = {key: getattr(config, key) for key in TRAITS}
    return {"family": FORMAT, **{key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}}


def match_category_layer(
    model: nn.Module, state: Mapping[str, Tensor], rows: Sequence[int | None], layer: str = CATEGORY_LAYER
) -> dict[str, Tensor]:
    """The state with a category layer for the classes of the model, or another layer with a row per class.

    Args:
        model: has the initial values of the classes that the state does not know.
        state: tensors under our names; what does not fit is left as it is, for `load_weights` to name.
        rows: for each class of the model, its row in the layer of the state, or None if it is unknown there.
        layer: name of the layer.
    """
    own, matched = model.state_dict(), dict(state)
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in state and state[name].shape[1:] == own[name].shape[1:]:
            pairs = zip(own[name], rows, strict=True)
            matched[name] = torch.stack([initial if row is None else state[name][row] for initial, row in pairs])
    return matched


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict strictly, but warn where a category or stuff layer has another class count or where only one
    side has a semantic head: that layer or head is re-initialized, or left out if the model has none.

    Args:
        model: receives the weights.
        state: tensors under our names.
        source: file name, for messages.

    Raises:
        InputError: missing or unexpected tensors, or tensors of the wrong shape or kind of number; they are listed.
    """
    expected = model.state_dict()
    state = dict(state)
    own, stored = semantic_tensors(expected), semantic_tensors(state)
    if stored and not own:
        LOG.warning("%s has a semantic head and the model has none: it is left out, all other weights are kept", source)
        state = {name: tensor for name, tensor in state.items() if name not in stored}
    if own and not stored and f"{CATEGORY_LAYER}.bias" in state:
        LOG.warning("%s has no semantic head: the model's is re-initialized, all other weights are kept", source)
        state |= own
    for layer, name, others in ((CATEGORY_LAYER, "category layer", 0), (STUFF_LAYER, "stuff layer", 1)):
        bias = f"{layer}.bias"
        if bias in state and bias in expected and len(state[bias]) != len(expected[bias]):
            LOG.warning(
                "%s has %s and the model %d: the %s is re-initialized, all other weights are kept",
                source,
                count(len(state[bias]) - others, f"{'stuff ' * others}class", f"{'stuff ' * others}classes"),
                len(expected[bias]) - others,
                name,
            )
            state |= {name: expected[name] for name in (f"{layer}.weight", bias)}
    check_fits(expected, state, source)
    model.load_state_dict({**expected, **state})


def semantic_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the semantic head in a state; none for instance models."""
    return {name: tensor for name, tensor in state.items() if name.startswith(f"{SEMANTIC_HEAD}.")}


def auxiliary_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the head of an auxiliary loss in a state."""
    return {name: tensor for name, tensor in state.items() if name.startswith(f"{AUXILIARY_HEAD}.")}


def check_fits(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Compare names, shapes and kinds of number with those of a model; its tensors may be on the meta device.

    Raises:
        InputError: they differ; the differences are listed.
    """
    optional = [name for name in expected if name.endswith("num_batches_tracked")]  # some families do not store them
    wrong_kind = [
        f"{name} is {state[name].dtype}".replace("torch.", "")
        for name in expected
        if name in state and state[name].is_floating_point() != expected[name].is_floating_point()
    ]
    missing, unexpected = sorted(expected.keys() - state.keys() - set(optional)), sorted(state.keys() - expected.keys())
    misshapen = [
        f"{name} is {list(state[name].shape)} and should be {list(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if missing or unexpected or misshapen or wrong_kind:
        parts = [
            f"{len(names)} {kind} ({_abbreviated(names)})"
            for kind, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", misshapen),
                ("of another kind", wrong_kind),
            )
            if names
        ]
        raise InputError(f"{source} does not fit this model: {'; '.join(parts)}")


def convert_file(source: str | Path, target: str | Path, *, to: str = FORMAT, overwrite: bool = False) -> str:
    """Convert a checkpoint file.

    Args:
        source: a file of any family.
        target: file to write, in the safetensors format if its name ends so; folders are created as needed.
        to: "solov2", which also stores traits, configuration and class names, or "mmdet".
        overwrite: replace an existing target.

    Returns:
        One line that says what was read and written.

    Raises:
        InputError: the source or `to` is of an unknown family, the source is unreadable, the target exists or is not
            writable, or mmdetection's SOLOv2 cannot represent the network.
    """
    if to not in TARGETS:
        raise InputError(f"checkpoints can be written for {' or '.join(TARGETS)}, not for {to}")
    if to == "mmdet" and is_safetensors(target):
        raise InputError(f"{target}: mmdetection reads no safetensors files; name a .pth file, or leave out --to mmdet")
    check_outputs([("OUT", target)], overwrite=overwrite, inputs=[source])
    checkpoint = read_checkpoint(source)
    traits = checkpoint.traits
    if to == "mmdet":
        if traits.get("stride_in_1x1") or traits.get("channel_order", "rgb") != "rgb":
            raise InputError(f"{source} has an MSRA backbone, for which mmdetection has no SOLOv2 configuration")
        try:
            state = to_mmdet(checkpoint.weights)
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if to == "mmdet":
            write_file(target, {"state_dict": state, "meta": {"CLASSES": checkpoint.class_names}})
        else:
            replace(checkpoint, training=None).save(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror or error}") from error
    layers = sum(name.endswith("conv_offset.weight") for name in checkpoint.weights)
    return (
        f"{source}: {checkpoint.family}, {len(checkpoint.weights)} tensors, "
        + (
            f"{layers} deformable layers ({'DCNv2' if is_modulated(checkpoint.weights) else 'DCNv1'}), "
            if layers
            else ""
        )
        + f"{traits.get('channel_order', 'rgb')} input, written to {target} with the names of {to}"
    )


def _abbreviated(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(printable(name[:100]) for name in names[:limit]) + (
        f", and {len(names) - limit} more" if len(names) > limit else ""
    )
