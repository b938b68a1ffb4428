"""Entry points of torch.hub: `torch.hub.load(FOLDER, "solov2_light_r18_fpn_3x", source="local")`."""

from __future__ import annotations

import functools

from solov2 import build_model, list_models

dependencies = ["torch", "torchvision", "pycocotools", "numpy", "PIL", "yaml", "tqdm"]

# One function per model. It takes the keyword arguments of `solov2.build_model`, such as weights="official".
for _name in list_models():
    globals()[_name] = functools.partial(build_model, _name)
