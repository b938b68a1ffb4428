"""Two folders of pictures for those who have none at hand: one annotated in labelme's format, one to predict.

    python examples/sample_photos.py photos new_photos

They show textured shapes (solov2.data.shapes) and stand in for your photographs: photos/ is what a folder looks like
after annotating in labelme, with IMG_0001.json beside IMG_0001.jpg, and new_photos/ has pictures only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from solov2.data.generate import save_image, scene_generator
from solov2.data.shapes import CLASSES, draw_scene
from solov2.formats import labelme
from solov2.formats.annotated import AnnotatedImage, AnnotatedInstance

NAMES = {number: name for name, number in CLASSES.items()}


def write_photos(folder: Path, count: int, size: int, split: str) -> list[AnnotatedImage]:
    """Write `count` pictures of `size` x `size` pixels to a new folder; returns their annotations."""
    folder.mkdir(parents=True)
    images = []
    for index in range(count):
        pixels, objects = draw_scene(scene_generator(1, split, index), size, 0)  # 0: never empty, no crowds
        image = AnnotatedImage(f"IMG_{index + 1:04d}.jpg", size, size)
        save_image(folder / image.file_name, pixels)
        for entry in objects:
            image.instances.append(AnnotatedInstance(NAMES[entry["category_id"]], entry["segmentation"]))
        images.append(image)
    return images


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("annotated", type=Path, help="folder to create, of annotated pictures")
    parser.add_argument("new", type=Path, help="folder to create, of other pictures without annotations")
    parser.add_argument("--count", type=int, default=400, help="number of annotated pictures (default: 400)")
    parser.add_argument("--size", type=int, default=192, help="side in pixels (default: 192)")
    args = parser.parse_args()
    images = write_photos(args.annotated, args.count, args.size, "train2017")
    labelme.write(images, args.annotated, args.annotated)
    write_photos(args.new, 20, args.size, "val2017")
    objects = sum(len(image.instances) for image in images)
    print(f"{args.annotated}: {len(images)} pictures with {objects:,} outlines; {args.new}: 20 pictures without")


if __name__ == "__main__":
    main()
