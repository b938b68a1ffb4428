"""The script that stands in for bf16 units computes what they compute, in both directions."""

from __future__ import annotations

import pytest
import torch
from scripts.bf16_emulated import EmulatedBf16, main
from torch import Tensor, nn


def passes(conv: nn.Conv2d, x: Tensor, towards: Tensor) -> list[Tensor]:
    """Output, and gradients of input, weight and bias, under bf16 autocast."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
    return [y, *torch.autograd.grad(y, [x, conv.weight, conv.bias], towards.to(y.dtype))]


def test_convolution_and_its_gradients_are_rounded_once() -> None:
    torch.manual_seed(0)
    conv, x, towards = nn.Conv2d(8, 6, 3, stride=2, padding=1), torch.randn(2, 8, 9, 11), torch.randn(2, 6, 5, 6)
    with EmulatedBf16() as mode:
        emulated = passes(conv, x, towards)
    assert mode.products == 2  # forward and backward
    for one, kernel in zip(emulated, passes(conv, x, towards), strict=True):
        assert one.dtype == kernel.dtype
        # The kernels of a processor without bf16 units round some partial sums of the gradients as well.
        assert (one - kernel).abs().max() <= 2**-5 * kernel.float().std()

    rounded = nn.Conv2d(8, 6, 3, stride=2, padding=1)
    rounded.load_state_dict({name: value.bfloat16().float() for name, value in conv.state_dict().items()})
    x = x.bfloat16().float().requires_grad_()
    y = rounded(x)
    exact = [y, *torch.autograd.grad(y, [x, rounded.weight, rounded.bias], towards.bfloat16().float())]
    assert all(torch.equal(one.float(), other.bfloat16().float()) for one, other in zip(emulated, exact, strict=True))


def test_matrix_products_are_rounded_and_other_types_are_left_alone() -> None:
    torch.manual_seed(0)
    left, right, bias = torch.randn(5, 7), torch.randn(7, 4), torch.randn(4)
    with EmulatedBf16() as mode:
        single = torch.addmm(bias, left, right)
        assert mode.products == 0 and torch.equal(single, torch.addmm(bias, left, right))
        half = [x.bfloat16() for x in (left, right, bias)]
        products = [half[0] @ half[1], half[0][None].bmm(half[1][None])[0], torch.addmm(half[2], half[0], half[1])]
    assert mode.products == 3
    wide = [x.float() for x in half]
    exact = [wide[0] @ wide[1], wide[0] @ wide[1], torch.addmm(wide[2], wide[0], wide[1])]
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(products, exact, strict=True))


def test_an_unknown_command_is_an_error(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark"])
    assert "train, evaluate" in capsys.readouterr().err.replace("'", "").splitlines()[-1]
