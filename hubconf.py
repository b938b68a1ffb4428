"""Entry points of torch.hub: `torch.hub.load(FOLDER, "solov2_light_r18_fpn_3x", source="local")`."""

from __future__ import annotations

import functools

from solov2 import build_model, list_models

dependencies = ["torch", "torchvision", "pycocotools", "numpy", "PIL", "yaml", "tqdm"]

# One function for each model; it takes what `solov2.build_model` takes behind the name, such as weights="official".
for _name in list_models():
    globals()[_name] = functools.partial(build_model, _name)
