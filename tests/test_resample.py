"""Masks at the original size equal those of two full interpolations, at a fraction of the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.operations import Operations
from torch.utils._python_dispatch import TorchDispatchMode

from solov2.ops.masks import decode_rle, encode_rle, masks_to_boxes
from solov2.ops.resample import MaskResampler

# (size of the maps, of the image inside the padded input, of the original image)
SIZES = {
    "larger": ((50, 76), (190, 300), (480, 640)),
    "much larger": ((50, 76), (200, 304), (1500, 2000)),
    "smaller": ((50, 76), (200, 304), (33, 47)),
    "other ratio": ((50, 76), (197, 260), (500, 333)),
    "one pixel": ((8, 8), (20, 32), (1, 1)),
    "one row": ((8, 16), (30, 64), (1, 100)),
}


def blobs(height: int, width: int, dtype: torch.dtype, count: int = 12) -> torch.Tensor:
    """Smooth probabilities [count, h, w]; then nothing, everything, and single cells in a corner and on an edge."""
    generator = torch.Generator().manual_seed(0)
    noise = 4 * torch.randn(1, count, max(2, height // 8), max(2, width // 8), generator=generator, dtype=dtype) - 3
    soft = F.interpolate(noise, size=(height, width), mode="bicubic")[0].sigmoid()
    extra = torch.zeros(4, height, width, dtype=dtype)
    extra[1], extra[2, -1, -1], extra[3, 0, width // 2] = 1, 1, 0.9
    return torch.cat([soft, extra])


def interpolated(soft: torch.Tensor, size: tuple[int, int], original_size: tuple[int, int]) -> torch.Tensor:
    """The two interpolations of the reference."""
    padded = [4 * side for side in soft.shape[1:]]
    whole = F.interpolate(soft[None], size=padded, mode="bilinear", align_corners=False)
    return F.interpolate(whole[..., : size[0], : size[1]], size=original_size, mode="bilinear", align_corners=False)[0]


def resampler(case: str, dtype: torch.dtype) -> MaskResampler:
    return MaskResampler(*SIZES[case], 0.5, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SIZES)
def test_masks_equal_those_of_two_interpolations(case: str, dtype: torch.dtype) -> None:
    """Rounding may flip a pixel only where the probability is within 1e-5 of 0.5."""
    soft = blobs(*SIZES[case][0], dtype)
    values = interpolated(soft, *SIZES[case][1:])
    masks, boxes = resampler(case, dtype).to_masks(soft)
    assert masks.dtype == torch.bool and boxes.dtype == torch.float32
    differing = masks != (values > 0.5)
    assert not (differing & ((values - 0.5).abs() > 1e-5)).any()
    assert differing.sum() <= 2
    assert torch.equal(boxes, masks_to_boxes(masks))
    assert not masks[-4].any() and masks[-3].all()


@pytest.mark.parametrize("case", SIZES)
def test_rles_equal_the_masks(case: str) -> None:
    soft = blobs(*SIZES[case][0], torch.float32)
    masks, boxes = resampler(case, torch.float32).to_masks(soft)
    rles, same_boxes = resampler(case, torch.float32).to_rles(soft)
    assert rles == encode_rle(masks)  # the same string, not only the same pixels
    assert torch.equal(boxes, same_boxes)
    assert all(torch.equal(decode_rle(rle).bool(), mask) for rle, mask in zip(rles, masks))


@pytest.mark.parametrize("planes", [1, 5, 100])
@pytest.mark.parametrize("case", SIZES)
def test_the_form_for_accelerators_gives_the_same_masks(
    case: str, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of one, of some and of all masks."""
    height, width = SIZES[case][2]
    monkeypatch.setattr("solov2.ops.resample.PLANE_BYTES", 8 * planes * height * width)
    soft = blobs(*SIZES[case][0], torch.float32)
    masks, boxes = resampler(case, torch.float32).to_masks(soft)
    same_masks, same_boxes = resampler(case, torch.float32).planes_to_masks(soft)
    assert torch.equal(masks, same_masks) and torch.equal(boxes, same_boxes)
    rles, rle_boxes = resampler(case, torch.float32).planes_to_rles(soft)
    assert rles == encode_rle(masks) and torch.equal(boxes, rle_boxes)


def test_an_accelerator_launches_as_much_for_many_masks_as_for_one() -> None:
    """And waits once: only `nonzero` has a shape that the host does not know."""
    launched = []
    for count in (1, 100):
        soft = blobs(50, 76, torch.float32, count=count)
        with Operations() as seen:
            resampler("larger", torch.float32).planes_to_rles(soft)
        launched.append(seen.names)
    assert launched[0] == launched[1] and len(launched[0]) <= 40
    assert launched[0].count("nonzero") == 1
    assert not {"_local_scalar_dense", "item", "is_nonzero"} & set(launched[0])


def test_no_maps() -> None:
    nothing = torch.zeros(0, 50, 76)
    for form in ("to_masks", "planes_to_masks"):
        masks, boxes = getattr(resampler("larger", torch.float32), form)(nothing)
        assert masks.shape == (0, 480, 640) and masks.dtype == torch.bool and boxes.shape == (0, 4)
    for form in ("to_rles", "planes_to_rles"):
        rles, boxes = getattr(resampler("larger", torch.float32), form)(nothing)
        assert rles == [] and boxes.shape == (0, 4)


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.max_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.max_bytes = max(self.max_bytes, tensor.numel() * tensor.element_size())
        return result


def test_rles_of_a_large_image_need_no_full_mask() -> None:
    """A mask over a full 24-megapixel image is computed in bands; 100 masks would take no more memory."""
    soft = torch.full((1, 200, 304), 0.9)
    large = MaskResampler((200, 304), (800, 1216), (4000, 6000), 0.5, dtype=torch.float32, device=torch.device("cpu"))
    with LargestTensor() as memory:
        (rle,), _ = large.to_rles(soft)
    assert decode_rle(rle).all()
    assert memory.max_bytes <= 8 * 2**20
