"""From every kind of image to instances: normalize, preprocess and predict."""

from __future__ import annotations

import io
import itertools
import weakref
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.tiny_models import lively, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

from solov2.errors import InputError
from solov2.models.solov2 import SOLOv2


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth RGB image, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    phases = np.random.default_rng(seed).uniform(0, 6, 3)
    return np.stack([127 + 120 * np.sin(x / 9 + y / 13 + phase) for phase in phases], 2).astype(np.uint8)


@pytest.fixture(scope="module")
def predictor() -> SOLOv2:
    return lively(tiny_model(input_scale=(96, 64)))


def test_normalize() -> None:
    """(pixel - mean) / std inside `sizes`, zero outside; input untouched."""
    model, pixels = tiny_model(), torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    kept, sizes = pixels.clone(), torch.tensor([[32, 64], [20, 33]])
    images = model.normalize(pixels, sizes)
    assert images.dtype == torch.float32 and torch.equal(pixels, kept)
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    for image, pixel, (height, width) in zip(images, pixels, sizes.tolist()):
        wanted = torch.zeros(3, 32, 64)
        wanted[:, :height, :width] = ((pixel - mean) / std)[:, :height, :width]
        assert torch.allclose(image, wanted, atol=1e-6)


def test_normalize_in_bgr_order() -> None:
    """For weights trained on BGR the channels are reversed; mean and std are in BGR order."""
    model = tiny_model(channel_order="bgr", pixel_mean=(103.53, 116.28, 123.675), pixel_std=(1.0, 2.0, 4.0))
    pixels = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(-1, -1, 32, 32)
    images = model.normalize(pixels, torch.tensor([[32, 32]]))
    assert images[0, :, 5, 5].tolist() == pytest.approx([30 - 103.53, (20 - 116.28) / 2, (10 - 123.675) / 4], rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 60, 96), (2, 3, 64, 97), (3, 64, 96), (1, 1, 64, 96)])
def test_unsupported_input_shape(predictor: SOLOv2, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        predictor(torch.zeros(shape))
    message = str(caught.value)
    assert all(part in message for part in ("[B, 3, H, W]", "multiples of 32", str(list(shape)), "SOLOv2.preprocess"))


def test_compiled_network_rejects_unsupported_sizes(predictor: SOLOv2) -> None:
    """A size it was compiled for runs in one graph; an unsupported size still raises the same error."""
    compiled = torch.compile(predictor.forward, backend="eager", dynamic=False)
    compiled(torch.zeros(1, 3, 64, 96))
    with pytest.raises(InputError, match="multiples of 32"):
        compiled(torch.zeros(1, 3, 60, 96))


def test_properties_of_a_model(predictor: SOLOv2) -> None:
    assert predictor.num_classes == len(predictor.class_names) == predictor.head.category_predictor.out_channels == 3
    assert predictor.device == torch.device("cpu") and tiny_model().to("meta").device == torch.device("meta")


def test_preprocess(predictor: SOLOv2) -> None:
    """Resized to the model's scale at a fixed ratio; one batch padded with zeros to multiples of 32."""
    given = [picture(200, 300), torch.from_numpy(picture(120, 60)).permute(2, 0, 1)]
    images, sizes, original_sizes = predictor.preprocess(given)
    assert original_sizes.tolist() == [[200, 300], [120, 60]] and original_sizes.dtype == torch.int64
    assert sizes.tolist() == [[64, 96], [96, 48]] and sizes.dtype == torch.int64
    assert images.shape == (2, 3, 96, 96) and images.dtype == torch.float32
    for image, (height, width) in zip(images, sizes.tolist()):
        assert not image[:, height:].any() and not image[:, :, width:].any()
        assert image[:, height - 1].any() and image[:, :, width - 1].any()


def test_images_on_an_accelerator_stay_there(predictor: SOLOv2) -> None:
    """Without one: fake tensors have a device but no values, and would fail if any were read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = [torch.empty(channels, 50, 61, dtype=torch.uint8, device="cuda") for channels in (1, 3)]
        batch = predictor.load_batch(images)
    assert batch["pixels"].device.type == "cuda"
    assert batch["sizes"].device.type == batch["original_sizes"].device.type == "cpu"  # read on the host


def test_every_kind_of_image_gives_the_same_result(predictor: SOLOv2, tmp_path: Path) -> None:
    """str, Path, bytes, file, PIL image, array and tensor, mixed in one call; inputs are not modified."""
    array = picture(80, 110)
    PIL.Image.fromarray(array).save(tmp_path / "image.png")
    forms = [
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        (tmp_path / "image.png").read_bytes(),
        io.BytesIO((tmp_path / "image.png").read_bytes()),
        PIL.Image.fromarray(array),
        array,
        torch.from_numpy(array).permute(2, 0, 1),
        (array / 255).astype(np.float32),
        torch.from_numpy(array).permute(2, 0, 1) / 255,
    ]
    kept = array.copy()
    results = predictor.predict(forms)
    assert np.array_equal(array, kept)
    assert len(results) == len(forms) and len(results[0]["scores"]) > 3
    for result in results:
        assert result["masks"].shape[1:] == (80, 110)
        assert all(torch.equal(result[key], results[0][key]) for key in results[0])
    for form in forms:
        (single,) = predictor.predict(form)
        assert torch.equal(single["scores"], results[0]["scores"])


def test_predict_in_batches(predictor: SOLOv2) -> None:
    """For images of one padded size the batch size does not matter."""
    given = [picture(64, 96, seed) for seed in range(3)]
    single, batched = predictor.predict(given), predictor.predict(given, batch_size=2)
    for one, other in zip(single, batched, strict=True):
        assert torch.allclose(one["scores"], other["scores"], atol=1e-4)


def test_single_images_generators_and_mistakes(predictor: SOLOv2) -> None:
    given = [picture(64, 96), picture(40, 80, seed=1)]
    (first, second), (again, last) = predictor.predict(given), predictor.predict(image for image in given)
    assert torch.equal(first["masks"], again["masks"]) and torch.equal(second["masks"], last["masks"])
    assert torch.equal(predictor.preprocess(given[0])[0], predictor.preprocess(given[:1])[0])
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size .*{batch_size}"):
            predictor.predict(given, batch_size=batch_size)
    for value, name in (([None], "NoneType"), (None, "NoneType"), (5, "int"), ({"a.jpg": 1}, "dict"), ([[1]], "list")):
        with pytest.raises(TypeError, match=f"an image must be a path, .*not {name}"):
            predictor.predict(value)
    for batch in (np.zeros((2, 64, 96, 3), dtype=np.uint8), torch.zeros(2, 3, 64, 96)):
        with pytest.raises(InputError, match="as a list"):
            predictor.predict(batch)
    with pytest.raises(InputError, match=r"tests is a folder.*solov2\.find_images"):
        predictor.predict(Path(__file__).parent)
    with pytest.raises(InputError, match="is a URL"):
        predictor.predict("https://example.org/street.jpg")


def test_results_one_at_a_time(predictor: SOLOv2) -> None:
    """The results of `predict`, from a generator without end that is read one batch ahead."""
    given, taken = [picture(64, 96, seed) for seed in range(3)], []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield given[number % 3]

    wanted = predictor.predict(given, max_instances=4)
    results = predictor.predict_iter(endless(), max_instances=4, batch_size=2)
    assert taken == []
    for number, result in enumerate(itertools.islice(results, 7)):
        assert len(taken) == number + 2 - number % 2
        assert torch.allclose(result["scores"], wanted[number % 3]["scores"], atol=1e-4)
    (single,) = predictor.predict_iter(given[0], mask_format="rle", max_instances=4)
    assert all(rle["size"] == [64, 96] for rle in single["masks"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_results_that_were_used_are_not_kept(predictor: SOLOv2, batch_size: int) -> None:
    results = predictor.predict_iter([picture(64, 96, seed) for seed in range(4)], batch_size=batch_size)
    for result in results:
        masks = weakref.ref(result["masks"])
        del result
        assert masks() is None


def test_mistakes_are_found_before_the_first_result(predictor: SOLOv2) -> None:
    for wrong in ({"batch_size": 0}, {"mask_format": "png"}, {"precision": "int8"}):
        with pytest.raises(ValueError, match=str(*wrong)):
            predictor.predict_iter([], **wrong)
    with pytest.raises(TypeError, match="not NoneType"):
        predictor.predict_iter(None)
    results = predictor.predict_iter([picture(64, 96), b"", picture(64, 96)])
    assert len(next(results)["scores"]) > 3  # an image that cannot be read raises in its turn
    with pytest.raises(InputError, match="empty"):
        next(results)


def test_precision_of_predictions(predictor: SOLOv2) -> None:
    (full,), (mixed,) = (predictor.predict(picture(64, 96), precision=name) for name in ("float32", "bf16"))
    assert mixed["scores"].dtype == torch.float32 and not torch.equal(full["scores"][:3], mixed["scores"][:3])
    assert torch.allclose(full["scores"][:3], mixed["scores"][:3], atol=0.05)


def test_predict_settings(predictor: SOLOv2) -> None:
    (everything,) = predictor.predict(picture(64, 96))
    threshold = everything["scores"][4].item()
    (high,) = predictor.predict(picture(64, 96), score_threshold=threshold)
    (few,) = predictor.predict(picture(64, 96), max_instances=2)
    assert torch.equal(high["scores"], everything["scores"][:5])
    assert torch.equal(few["scores"], everything["scores"][:2])
    (runs,) = predictor.postprocess(predictor(torch.zeros(1, 3, 64, 96)), [(64, 96)], [(64, 96)], mask_format="rle")
    assert all(rle["size"] == [64, 96] for rle in runs["masks"])


def test_nothing_to_predict_and_nothing_found(predictor: SOLOv2) -> None:
    assert predictor.predict([]) == []
    (result,) = predictor.predict(picture(50, 70), score_threshold=1.0)
    assert [tuple(result[key].shape) for key in ("scores", "labels", "masks", "boxes")] == [
        (0,),
        (0,),
        (0, 50, 70),
        (0, 4),
    ]
    assert [result[key].dtype for key in ("scores", "labels", "masks", "boxes")] == [
        torch.float32,
        torch.int64,
        torch.bool,
        torch.float32,
    ]


def test_predict_keeps_the_mode_of_the_model() -> None:
    model = tiny_model("nothing frozen, batch norm").train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    (result,) = model.predict(picture(64, 96))
    assert model.training and model.head.training
    assert not result["scores"].requires_grad
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with pytest.raises(ValueError):
        model.predict([np.full((4, 4, 3), 255, dtype=np.float32)])
    assert model.training
    for _ in model.predict_iter([picture(64, 96)] * 2):
        assert model.training  # between results
    model.eval().predict(picture(64, 96))
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_predicts(dtype: torch.dtype) -> None:
    model = lively(tiny_model("deformable everywhere", input_scale=(96, 64)))
    (wanted,), (result,) = model.predict(picture(64, 96)), model.to(dtype).predict(picture(64, 96))
    assert result["scores"].dtype == result["boxes"].dtype == torch.float32
    assert torch.allclose(result["scores"][:3], wanted["scores"][:3], atol=0.05)
