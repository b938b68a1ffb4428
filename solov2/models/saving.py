"""What a saved model consists of: weights for inference and everything that `solov2.load` needs to build it again."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from solov2.checkpoint import FORMAT, TRAITS, Checkpoint
from solov2.errors import InputError

if TYPE_CHECKING:
    from solov2.models.solov2 import SOLOv2


def model_checkpoint(model: SOLOv2, source: str) -> Checkpoint:
    """The model as a checkpoint, with the thresholds, limits and input scale that it has now.

    Args:
        model: of `solov2.build_model` or `solov2.load`.
        source: name of the checkpoint, for messages.

    Raises:
        InputError: the model has another origin, or is an optimized copy.
    """
    if model.config is None:
        raise InputError(
            "only models of solov2.build_model and solov2.load can be saved, and not their optimized copies: save the "
            "model that was optimized"
        )
    now = asdict(model.settings) | asdict(model.panoptic_settings) | {"input_scale": model.input_scale}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in now.items()}
    config = {**model.config, "model": model.config["model"] | plain}
    unused = "auxiliary_head."  # only training uses it
    return Checkpoint(
        source,
        {name: tensor.cpu() for name, tensor in model.state_dict().items() if not name.startswith(unused)},
        traits={"family": FORMAT, **{key: config["model"][key] for key in TRAITS}},
        class_names=list(model.class_names),
        category_ids=[int(number) for number in model.category_ids],  # a user may have set numpy's integers
        stuff_names=list(model.stuff_names) or None,
        stuff_category_ids=[int(number) for number in model.stuff_category_ids] or None,
        config=config,
    )
