"""Which operations run: what would be kernel launches on an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = (
    "view",
    "detach",
    "slice",
    "select",
    "expand",
    "permute",
    "transpose",
    "unsqueeze",
    "squeeze",
    "split",
    "alias",
    "promote_types",
)


class Operations(TorchDispatchMode):
    """Context that lists the names of the ATen operations inside; views are left out, since they launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.dtypes: dict[str, torch.dtype] = {}  # of the first argument of each operation's last call

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and not name.strip("_").startswith(VIEWS):
            self.names.append(name)
            if args and isinstance(args[0], torch.Tensor):
                self.dtypes[name] = args[0].dtype
        return function(*args, **(kwargs or {}))
