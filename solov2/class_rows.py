"""Which rows of the last layers stand for which class: matched by name, or fewer of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from solov2.checkpoint import Checkpoint
from solov2.data.class_matching import can_match, difference, match_names, shorten, similar_names
from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2
from solov2.suggestions import did_you_mean
from solov2.weights import CATEGORY_LAYER, STUFF_LAYER, match_category_layer

LOG = logging.getLogger(__name__)


def match_classes(model: SOLOv2, weights: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights, with the rows of the category layer moved to the model's classes of the same name."""
    rows = _matching_rows(model.class_names, checkpoint.class_names, weights, checkpoint.source, CATEGORY_LAYER)
    return weights if rows is None else match_category_layer(model, weights, rows)


def match_stuff_classes(model: SOLOv2, weights: dict[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights, with the rows of the stuff layer moved likewise; the row of the things stays the last."""
    known = checkpoint.stuff_names
    rows = _matching_rows(model.stuff_names, known, weights, checkpoint.source, STUFF_LAYER, others=1)
    return weights if rows is None else match_category_layer(model, weights, [*rows, len(known or [])], STUFF_LAYER)


def _matching_rows(
    names: list[str],
    known: list[str] | None,
    weights: Mapping[str, Tensor],
    source: str,
    layer: str,
    *,
    others: int = 0,
) -> list[int | None] | None:
    """For each name its row in a layer of the weights, which has `others` more rows; None if names cannot tell."""
    bias = weights.get(f"{layer}.bias")
    if known is None or not can_match(known, names) or bias is None or len(bias) != len(known) + others:
        return None
    rows = match_names(names, known)
    kept = [name for name, row in zip(names, rows, strict=True) if row is not None]
    new = [name for name, row in zip(names, rows, strict=True) if row is None]
    if new:
        LOG.warning(
            "%s: the %s layer is re-initialized for %s and kept for %s%s; all other weights are kept",
            source,
            "category" if layer == CATEGORY_LAYER else "stuff",
            shorten(new),
            shorten(kept) or "no class",
            similar_names(new, difference(known, names)),
        )
    return rows


def restrict_classes(model: SOLOv2, class_names: Sequence[str], source: str) -> None:
    """Restrict a model to some of its classes; the rows of the others are removed from its category layer.

    Args:
        model: changed in place; the remaining classes keep their order and their scores.
        class_names: names of the classes to keep.
        source: where the model comes from, for the message.

    Raises:
        InputError: the model is panoptic, or a name is not one of its classes.
    """
    if model.semantic_head is not None:
        raise InputError("--classes does not work with panoptic models; leave it out")
    for name in class_names:
        if name not in model.class_names:
            raise InputError(
                f"{source} has no class '{name}'{did_you_mean(name, model.class_names)}; its classes are "
                f"{shorten(model.class_names)}"
            )
    labels = [label for label, name in enumerate(model.class_names) if name in class_names]
    layer = model.head.category_predictor
    assert layer.bias is not None
    layer.weight, layer.bias = (nn.Parameter(values.detach()[labels]) for values in (layer.weight, layer.bias))
    layer.out_channels = len(labels)
    model.class_names = [model.class_names[label] for label in labels]
    model.category_ids = [model.category_ids[label] for label in labels]
