"""Train or evaluate on a CPU without bf16 instructions, with the arithmetic of hardware that has them.

    python tests/scripts/bf16_emulated.py train configs/quickstart.yaml --set train.precision=bf16 --output DIR
    python tests/scripts/bf16_emulated.py evaluate --weights DIR/best.pth --precision bf16

On a CPU without bf16 instructions, bf16 convolutions take seven times as long as float32 ones. Hardware with bf16
multiplies bf16 numbers exactly, accumulates in float32 and rounds the sum to bf16 once. This script does the same: in
the forward and the backward pass, every convolution and matrix product of bf16 tensors is computed in float32 and
rounded. The arguments after the name of the command are those of train.py or eval.py.
"""

from __future__ import annotations

import argparse
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
    """Context manager: products of bf16 tensors are computed in float32 and rounded to bf16.

    `products` counts them; 0 after a run means that nothing was computed in bf16.
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
        float32 = tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.bfloat16 else x, (args, kwargs))
        return tree_map_only(Tensor, lambda x: x.bfloat16(), function(*float32[0], **float32[1]))


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of train.py or eval.py")
    args = parser.parse_args(argv)
    with EmulatedBf16() as mode:
        code = COMMANDS[args.command](args.arguments)
    print(f"{mode.products} products of bf16 tensors were computed in float32 and rounded to bf16", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
