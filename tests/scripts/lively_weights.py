"""Write random weights with which a model finds something: dozens of instances per image, with masks of all sizes.

python tests/scripts/lively_weights.py solov2_light_r50_fpn_3x random.pth --image street.jpg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.tiny_models import save_content  # noqa: E402

from solov2.build import build_model  # noqa: E402
from solov2.config import load_config  # noqa: E402
from solov2.errors import InputError  # noqa: E402


@torch.no_grad()
def main() -> int:
    """Scale the two predictors of the head so that their outputs spread, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="model name or YAML file")
    parser.add_argument("output", type=Path, metavar="FILE", help="checkpoint to write")
    parser.add_argument("--image", required=True, metavar="FILE", help="an image to measure the spread on")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(args.model)
    try:
        pixels, _, _ = model.preprocess(args.image)
    except InputError as error:
        parser.error(str(error))
    categories, kernels = model.head.category_predictor, model.head.kernel_predictor
    categories.weight.mul_(1.5 / _levels(model(pixels)["category_logits"]).std())
    logits = _levels(model(pixels)["category_logits"])  # [1, C, cells]
    means = logits.mean((0, 2))
    best = (logits - means[:, None]).amax(1)
    categories.bias.sub_(means + best.quantile(0.98) + 2.2)  # 2 % of the cells above 0.1, the category threshold
    kernels.weight.sub_(
        kernels.weight.mean(0)
    )  # features are mostly positive: kernels of one sign would set all pixels
    raw = model(pixels)
    logits = _levels(raw["kernels"])[0].T @ raw["mask_features"][0].flatten(1)  # [cells, pixels]
    kernels.weight.mul_(4 / logits.std(1).mean())
    content = {"config": load_config(args.model, []).to_dict(), "class_names": model.class_names}
    save_content(args.output, {"model": model.state_dict(), **content})
    return 0


def _levels(maps: list[torch.Tensor]) -> torch.Tensor:
    """The cells of all levels: list of [B, C, S, S] -> [B, C, cells]."""
    return torch.cat([level.flatten(2) for level in maps], dim=2)


if __name__ == "__main__":
    sys.exit(main())
