"""Every published model builds, trains and predicts, and its configuration has the published schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from solov2.build import build_assigner, build_criterion, build_model
from solov2.config import list_models, load_config, replace_model
from solov2.settings import PanopticSettings
from solov2.training.optim import build_optimizer

FULL_SCALES, LIGHT_SCALES = (800, 768, 736, 704, 672, 640), (512, 480, 448, 416, 384, 352)
# epochs, epochs of decay, warm-up start, training short edges, training long edge, test (long, short)
RECIPES = {
    **dict.fromkeys(
        ("solov2_r50_fpn_1x", "solov2_panoptic_r50_fpn_1x"), (12, (8, 11), 0.001, (800,), 1333, (1333, 800))
    ),
    **dict.fromkeys(
        (
            "solov2_r50_fpn_3x",
            "solov2_r101_fpn_3x",
            "solov2_r101_dcn_fpn_3x",
            "solov2_x101_dcn_fpn_3x",
            "solov2_panoptic_r50_fpn_3x",
            "solov2_panoptic_r101_fpn_3x",
            "solov2_r50_fpn_3x_plus",
        ),
        (36, (27, 33), 1 / 3, FULL_SCALES, 1333, (1333, 800)),
    ),
    **dict.fromkeys(
        (
            "solov2_light_r18_fpn_3x",
            "solov2_light_r34_fpn_3x",
            "solov2_light_r50_fpn_3x",
            "solov2_light_r50_fpn_3x_plus",
        ),
        (36, (27, 33), 1 / 3, LIGHT_SCALES, 768, (768, 448)),
    ),
    "solov2_light_r50_dcn_fpn_3x": (36, (27, 33), 1 / 3, LIGHT_SCALES, 852, (852, 512)),
}


def test_recipes_are_the_published_ones() -> None:
    assert set(RECIPES) | {"quickstart", "quickstart_panoptic"} == set(list_models())
    for name, (epochs, decay, start, scales, long_edge, test_scale) in RECIPES.items():
        config = load_config(name)
        train, data = config.train, config.data
        assert (train.epochs, train.step_epochs, train.warmup_start) == (epochs, decay, pytest.approx(start)), name
        assert (data.train_scales, data.train_long_edge, config.model.input_scale) == (scales, long_edge, test_scale)
        assert (train.warmup_steps, train.schedule, train.optimizer) == (500, "step", "sgd")
        assert (train.learning_rate, train.momentum, train.weight_decay) == (0.01, 0.9, 1e-4)
        assert (train.reference_batch_size, train.clip_norm, train.mask_weight) == (16, 35, 3)
        assert train.decay_norms and data.flip_probability == 0.5 and not data.keep_empty
        assert config.model.frozen_stages == 1 and config.model.frozen_batch_norm
        plus = name.endswith("_plus")
        assert ((train.ema_decay, data.aspect_groups, data.crop_share) == (0.9999, 5, (0.3, 1))) == plus
        assert (data.scale_jitter, data.copy_paste) == ((1, 1), 0) and any(data.color_jitter) == plus
        if "panoptic" in name:
            assert (config.model.num_stuff, config.model.semantic_channels, train.semantic_weight) == (53, 128, 0.5)
            assert config.model.panoptic_settings == PanopticSettings()
            assert data.val_annotations == "annotations/panoptic_val2017.json"


@pytest.mark.parametrize("name", list_models())
def test_every_model_takes_a_step_and_predicts(name: str) -> None:
    """At full width, but on a small image and small grids, which determine the cost of the head."""
    ranges = ((1, 24), (16, 40), (32, 64), (48, 96), (80, 400))
    config = replace_model(load_config(name).model, {"grid_sizes": (8, 6, 5, 4, 3), "scale_ranges": ranges})
    torch.manual_seed(0)
    model = build_model(config, input_scale=(96, 64)).train()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=generator)
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 8:40, 10:50], masks[1, 20:60, 40:90] = 1, 1
    truth = {
        "boxes": torch.tensor([[10.0, 8, 50, 40], [40, 20, 90, 60]]),
        "labels": torch.tensor([0, 3]),
        "masks": masks,
        **({"semantic": torch.zeros(64, 96, dtype=torch.uint8)} if config.num_stuff else {}),
    }
    targets = build_assigner(config)([truth], (64, 96))
    criterion = build_criterion(config)
    optimizer = build_optimizer(
        model, name="sgd", learning_rate=1e-3, momentum=0.9, weight_decay=1e-4, decay_norms=True
    )
    images = model.normalize(pixels, torch.tensor([[64, 96]]))
    losses = criterion(model(images), targets)
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    without_gradient = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not without_gradient
    before = [parameter.detach().clone() for parameter in model.head.parameters()]
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.head.parameters()))
    with torch.no_grad():
        model.head.category_predictor.bias.fill_(0.0)  # otherwise nothing in a random network passes the threshold
        (result,) = model.predict([np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)])
    count = len(result["scores"])
    assert count and result["masks"].shape == (count, 50, 70) and result["boxes"].shape == (count, 4)
