"""Train on the upper half of one photograph, and find the coins in its lower half, which the model has not seen.

    python examples/coins.py coins.png runs/coins

coins.png is a file of scikit-image, which need not be installed: `pip download --no-deps scikit-image` and unzip
skimage/data/coins.png. It shows 24 Greek coins from Pompeii (Brooklyn Museum, no known copyright restrictions). Their
outlines are in coins.json, in labelme's format; those of the lower half are used to measure the result only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import solov2
from solov2.formats import labelme
from solov2.ops.fonts import load_font
from solov2.ops.masks import decode_rle, segmentation_to_mask
from solov2.tiles import predict_tiles

ENLARGED = 3  # factor by which the photograph is enlarged first, for smooth outlines in the picture
BORDER = 152 * ENLARGED  # row between the two halves, which touches no coin
SIDE = 192  # of a crop after resizing, in pixels: what the quickstart's network is made for
TILE = 96 * ENLARGED  # for prediction; crops are 90 to 152 original pixels large


class Crops(torch.utils.data.Dataset):
    """Random square crops of a photograph, with the masks of the coins in them."""

    class_names = ("coin",)

    def __init__(self, pixels: np.ndarray, masks: np.ndarray, count: int) -> None:
        self.pixels, self.masks, self.count = pixels, masks, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(image uint8 [SIDE, SIDE, 3], {masks uint8 [N, SIDE, SIDE], labels int64 [N]}), always the same."""
        rng = np.random.default_rng(index)
        height, width = self.pixels.shape[:2]
        side = int(rng.integers(90 * ENLARGED, height + 1))
        y, x = (int(rng.integers(0, end - side + 1)) for end in (height, width))
        planes = [self.pixels, *(255 * self.masks)]
        crops = [Image.fromarray(plane[y : y + side, x : x + side]) for plane in planes]
        image, *masks = (np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for crop in crops)
        seen = np.array([mask > 127 for mask in masks if (mask > 127).sum() >= 200])  # no slivers
        return image, {"masks": seen.astype(np.uint8), "labels": np.zeros(len(seen), dtype=np.int64)}


def read_coins(photograph: Path) -> tuple[np.ndarray, np.ndarray]:
    """The enlarged photograph, uint8 [H, W, 3], and the annotated coins, uint8 [24, H, W]."""
    [annotated] = labelme.read(Path(__file__).with_suffix(".json"), photograph.parent).images
    image = Image.open(photograph).convert("RGB")
    image = image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.BICUBIC)
    outlines = [(ENLARGED * np.array(coin.segmentation)).tolist() for coin in annotated.instances]
    masks = [segmentation_to_mask(outline, (image.height, image.width)).numpy() for outline in outlines]
    return np.asarray(image), np.array(masks)


def best_overlaps(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """For each of the masks `truth`, bool [T, H, W], its highest IoU with one of `found`, bool [F, H, W]."""
    ious = [[(one & other).sum() / (one | other).sum() for one in found] for other in truth]
    return np.array(ious).reshape(len(truth), len(found)).max(1, initial=0)


def draw(pixels: np.ndarray, result: dict[str, Any]) -> Image.Image:
    """The photograph with the instances of its lower half, and a line between the halves."""
    picture = Image.fromarray(pixels)
    pen, font = ImageDraw.Draw(picture), load_font(None, 22)
    pen.line([(0, BORDER), (picture.width, BORDER)], fill="white", width=2)
    pen.text((18, 24), "trained on this half", fill="white", font=font, anchor="lm")
    pen.text((18, picture.height - 24), "not seen in training", fill="white", font=font, anchor="lm")
    return solov2.draw_instances(picture, result, Crops.class_names, score_threshold=0.5)


def main(photograph: Path, output: Path, epochs: int = 12, crops: int = 240) -> None:
    """Train, predict, compare with the annotation and draw OUTPUT/coins.jpg."""
    pixels, masks = read_coins(photograph)
    upper = masks[:, :BORDER].any((1, 2))
    solov2.train(
        "quickstart",
        data={"train": Crops(pixels[:BORDER], masks[upper, :BORDER], crops)},
        output=output,
        overwrite=True,
        epochs=epochs,
        evaluate_every=0,
        color_jitter=[0.3, 0.3, 0, 0],
        shapes=False,
    )
    model = solov2.load(output / "last.pth").optimize()
    result = predict_tiles(model, pixels[BORDER:], TILE, score_threshold=0.5)
    truth = masks[~upper, BORDER:] > 0
    found = np.array([decode_rle(mask).numpy() > 0 for mask in result["masks"]]).reshape(-1, *truth.shape[1:])
    best = best_overlaps(found, truth)
    print(f"{len(found)} found; {(best > 0.5).sum()} of {len(truth)} coins are among them, mean IoU {best.mean():.3f}")
    result["masks"] = np.pad(found, ((0, 0), (BORDER, 0), (0, 0)))
    draw(pixels, result).save(output / "coins.jpg", quality=75)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
