"""Trains or evaluates in bf16 with the arithmetic of units that have it, on a CPU that has none.

    python tests/scripts/bf16_emulated.py train configs/quickstart.yaml --set train.precision=bf16 --output DIR
    python tests/scripts/bf16_emulated.py evaluate --weights DIR/best.pth --precision bf16

A processor without bf16 instructions runs bf16 convolutions seven times as slowly as float32 ones. A unit that has them
multiplies bf16 numbers exactly, adds up in float32 and rounds the sum to bf16 once. So does this: every convolution and
matrix product of bf16 tensors is computed in float32 and rounded, in the forward and in the backward pass. What follows
the command's name are the arguments of train.py or eval.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from solov2.commands import evaluate, train  # noqa: E402

COMMANDS = {"train": train.main, "evaluate": evaluate.main}
PRODUCTS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
}


class EmulatedBf16(TorchDispatchMode):
    """Inside, products of bf16 tensors are those of the same numbers in float32, rounded to bf16.

    `products` counts them: 0 after a run means that nothing was computed in bf16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return function(*args, **kwargs)
        self.products += 1
        wide = tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, (args, kwargs))
        return tree_map_only(Tensor, lambda x: x.bfloat16(), function(*wide[0], **wide[1]))


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    if not argv or argv[0] not in COMMANDS:
        print(f"error: name one of {', '.join(COMMANDS)}, then its arguments", file=sys.stderr)
        return 2
    with EmulatedBf16() as mode:
        code = COMMANDS[argv[0]](argv[1:])
    print(f"{mode.products} products of bf16 tensors in float32, rounded to bf16", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
