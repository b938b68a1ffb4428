"""Which operations run: what would be kernel launches on an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = (
    "empty",
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
    """Context that lists the names of the ATen operations inside, but not of those that launch nothing."""

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


# Operations whose result has a shape or a value that the host must know; so do `Tensor.tolist` and its like.
BLOCKING = {
    "nonzero", "masked_select", "unique_consecutive", "_unique", "_unique2", "unique_dim", "bincount", "is_nonzero",
    "item", "_local_scalar_dense", "equal", "argwhere",
}  # fmt: skip
READING = ("tolist", "cpu")


class Waits(Operations):
    """Context that counts where the host would wait for an accelerator; copies from the host are not seen on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._calls = _Calls(self.waits)

    def __enter__(self) -> Waits:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        selectors = args[1] if "index" in name and len(args) > 1 and isinstance(args[1], (list, tuple)) else []
        if name in BLOCKING or any(s is not None and s.dtype in (torch.bool, torch.uint8) for s in selectors):
            self.waits.append(name)
        return super().__torch_dispatch__(function, types, args, kwargs)


class _Calls(TorchFunctionMode):
    """Records the methods that read a tensor on the host and run no operation on a CPU."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in READING:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))
