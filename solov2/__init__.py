"""SOLOv2 instance segmentation in pure PyTorch. Names are imported on first use, so that `import solov2` is cheap."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from solov2.version import __version__ as __version__

__all__ = [
    "SOLOv2",
    "TrainResult",
    "build_model",
    "draw_instances",
    "draw_panoptic",
    "find_images",
    "list_models",
    "load",
    "to_supervision",
    "train",
]

_EXPORTS = {
    "SOLOv2": "solov2.models.solov2",
    "TrainResult": "solov2.training.train",
    "build_model": "solov2.build",
    "draw_instances": "solov2.visualize",
    "draw_panoptic": "solov2.visualize_panoptic",
    "find_images": "solov2.ops.image_files",
    "list_models": "solov2.config",
    "load": "solov2.build",
    "to_supervision": "solov2.interoperability",
    "train": "solov2.training.train",
}
# Attribute -> module to import for it; for a package, the module that users call.
_SUBMODULES = {
    "targets": "solov2.targets",
    "losses": "solov2.losses",
    "convert": "solov2.convert",
    "hub": "solov2.hub",
    "ops": "solov2.ops.matrix_nms",
    "models": "solov2.models.solov2",
    "data": "solov2.data.coco",
    "evaluation": "solov2.evaluation.coco",
}

if TYPE_CHECKING:  # the same names for type checkers, which cannot follow __getattr__
    from solov2 import convert as convert
    from solov2 import data as data
    from solov2 import evaluation as evaluation
    from solov2 import hub as hub
    from solov2 import losses as losses
    from solov2 import models as models
    from solov2 import ops as ops
    from solov2 import targets as targets
    from solov2.build import build_model, load
    from solov2.config import list_models
    from solov2.interoperability import to_supervision
    from solov2.models.solov2 import SOLOv2
    from solov2.ops.image_files import find_images
    from solov2.training.train import TrainResult, train
    from solov2.visualize import draw_instances
    from solov2.visualize_panoptic import draw_panoptic
else:

    def __getattr__(name: str) -> object:
        if name in _EXPORTS:
            return getattr(importlib.import_module(_EXPORTS[name]), name)
        if name in _SUBMODULES:
            importlib.import_module(_SUBMODULES[name])
            return sys.modules[f"solov2.{name}"]
        raise AttributeError(f"module 'solov2' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])
