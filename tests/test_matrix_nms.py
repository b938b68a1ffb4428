"""Score decay: the reference's numbers for both kernels, and the cases of duplicates, classes and no masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.operations import Operations
from helpers.parity import NMS_SETS, stored_decay, stored_set
from torch._subclasses.fake_tensor import FakeTensorMode

from solov2.ops.matrix_nms import matrix_nms


def test_all_sets_are_present() -> None:
    assert len(NMS_SETS) == 12


# The stored scores were computed in float64; the reference's own float32 scores differ from them by 1.3e-7.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1.3e-7)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("name", NMS_SETS)
def test_decayed_scores(name: str, kernel: str, dtype: torch.dtype, tolerance: float) -> None:
    decayed = matrix_nms(*stored_set(name, dtype), kernel=kernel, sigma=2.0)
    assert decayed.dtype == dtype
    assert (decayed.double() - stored_decay(name, kernel)).abs().max() <= tolerance


def identical(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:4, 2:7] = True
    return mask.expand(count, -1, -1), torch.zeros(count, dtype=torch.int64), torch.linspace(0.9, 0.5, count)


def test_duplicate_masks() -> None:
    """The linear kernel zeroes every duplicate, for which the formula gives 0/0 from the third on."""
    masks, labels, scores = identical(4)
    assert matrix_nms(masks, labels, scores, kernel="linear").tolist() == [pytest.approx(0.9), 0, 0, 0]
    gaussian = matrix_nms(masks, labels, scores)
    assert torch.isfinite(gaussian).all()
    assert gaussian[1] == pytest.approx(scores[1].item() * np.exp(-2), rel=1e-6)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_masks_of_other_classes_and_disjoint_masks_keep_their_scores(kernel: str) -> None:
    masks, _, scores = identical(3)
    assert torch.equal(matrix_nms(masks, torch.arange(3), scores, kernel=kernel), scores)
    disjoint = torch.eye(3, dtype=torch.bool)[:, :, None].expand(-1, -1, 5)
    assert torch.equal(matrix_nms(disjoint, torch.zeros(3, dtype=torch.int64), scores, kernel=kernel), scores)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_decay_of_a_pair_by_hand(kernel: str) -> None:
    """IoU 1/3: two masks of 4 pixels share 2."""
    masks = torch.zeros(2, 1, 8, dtype=torch.bool)
    masks[0, 0, 0:4], masks[1, 0, 2:6] = True, True
    decayed = matrix_nms(masks, torch.zeros(2, dtype=torch.int64), torch.tensor([0.8, 0.6]), kernel=kernel, sigma=0.5)
    factor = np.exp(-0.5 / 9) if kernel == "gaussian" else 1 - 1 / 3
    assert decayed.tolist() == pytest.approx([0.8, 0.6 * factor])


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_scores_never_rise(kernel: str) -> None:
    """A suppressor that is itself suppressed counts less, but never raises a score. Empty masks are allowed."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(60, 9, 11, generator=generator) > 0.6
    masks[::7] = False
    scores = torch.rand(60, generator=generator).sort(descending=True).values
    decayed = matrix_nms(masks, torch.randint(0, 3, (60,), generator=generator), scores, kernel=kernel)
    assert (decayed <= scores).all() and (decayed >= 0).all()
    assert (decayed < scores).sum() > 30


def test_no_masks() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        decayed = matrix_nms(
            torch.zeros(0, 4, 5, dtype=torch.bool), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=dtype)
        )
        assert decayed.shape == (0,) and decayed.dtype == dtype


def test_half_scores_are_decayed_in_float32() -> None:
    """The area of 300 x 300 pixels is infinite in float16."""
    masks = torch.ones(2, 300, 300, dtype=torch.bool)
    masks[1, :150] = False
    decayed = matrix_nms(masks, torch.zeros(2, dtype=torch.int64), torch.tensor([0.5, 0.5], dtype=torch.float16))
    assert decayed.dtype == torch.float16
    assert decayed.tolist() == pytest.approx([0.5, 0.5 * np.exp(-2 * 0.25)], rel=1e-3)


def test_autocast_does_not_round_the_areas() -> None:
    """bfloat16 cannot represent 999 pixels."""
    inputs = stored_set("n50", torch.float32)
    wanted = matrix_nms(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matrix_nms(*inputs), wanted)


def test_inputs_are_left_untouched() -> None:
    inputs = stored_set("n50", torch.float32)
    copies = [tensor.clone() for tensor in inputs]
    matrix_nms(*inputs)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies))


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="kernel .*'soft'"):
        matrix_nms(*identical(2), kernel="soft")


def test_an_nvidia_card_multiplies_all_masks_at_once():
    """0 and 1 are exact in bf16, and tensor cores sum such products in float32."""
    with FakeTensorMode():
        masks = torch.empty(50, 20, 30, dtype=torch.bool, device="cuda")
        labels, scores = torch.empty(50, dtype=torch.int64, device="cuda"), torch.empty(50, device="cuda")
        with Operations() as seen:
            decayed = matrix_nms(masks, labels, scores)
    assert decayed.shape == (50,) and decayed.dtype == torch.float32 and decayed.device.type == "cuda"
    assert seen.names.count("mm") == 1 and seen.dtypes["mm"] == torch.bfloat16 and len(seen.names) <= 30
