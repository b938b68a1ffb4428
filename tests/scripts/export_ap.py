"""AP of exported files beside that of the model, on the validation images of a configuration.

    python tests/scripts/export_ap.py runs/quickstart/best.pth --data-root data/shapes --size 192 192

Each precision is exported, and int8 calibrated on the first 100 training images. The images must not be larger than
`--size` after resizing; the model sees them padded to that size, too, as files do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from solov2.build import build_model, resolve_config  # noqa: E402
from solov2.data.build import locate_data, prepare_data, split_paths, validation_dataset  # noqa: E402
from solov2.errors import InputError  # noqa: E402
from solov2.evaluation.coco import CocoEvaluator  # noqa: E402
from solov2.export.check import file_results, load_image, model_results  # noqa: E402
from solov2.export.files import NETWORK_TYPES, PRECISIONS, file_metadata, save_program  # noqa: E402
from solov2.export.graph import export_program  # noqa: E402
from solov2.export.runtimes import find_runtimes, open_file  # noqa: E402
from solov2.ops.image_files import find_images  # noqa: E402
from solov2.weights import find_checkpoint  # noqa: E402

CALIBRATION_IMAGES = 100


def main() -> int:
    """Print a row per file and runtime."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", metavar="FILE", help="checkpoint of this library")
    parser.add_argument("--data-root", metavar="DIR", required=True, help="folder in COCO's layout")
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("H", "W"), help="input of the files")
    args = parser.parse_args()
    try:
        checkpoint = find_checkpoint(args.weights, None)
    except InputError as error:
        parser.error(str(error))
    config = locate_data(resolve_config(None, checkpoint, {}), {"root": args.data_root})
    prepare_data(config, splits=["train", "val"])
    dataset = validation_dataset(config)
    records = [dataset.record(i) for i in range(len(dataset))]
    model, size = build_model(weights=checkpoint), tuple(args.size)
    batches = [load_image(dataset.image_root / record.file_name, size, model.input_scale) for record in records]
    calibrated = find_images(split_paths(config.data, "train")[1])[:CALIBRATION_IMAGES]

    def show(name: str, predict: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        evaluator, seconds = CocoEvaluator(dataset.coco, dataset.category_ids), []
        predict(batches[0])
        for record, batch in zip(records, batches):
            begin = time.perf_counter()
            found = predict(batch)
            seconds.append(time.perf_counter() - begin)
            evaluator.update([record.image_id], [found])
        figure = evaluator.summarize()["segm"]["AP"]
        print(f"{name:32} AP {figure:.2%}, {1e3 * statistics.median(seconds):6.1f} ms per image", flush=True)

    show("model, float32", lambda batch: model_results(model, batch))
    with tempfile.TemporaryDirectory() as folder:
        for suffix, precisions in PRECISIONS.items():
            for precision in precisions:
                path = Path(folder) / f"{precision}{suffix}"
                program = export_program(model, size, dtype=NETWORK_TYPES.get(precision, torch.float32))
                calibration = (load_image(image, size, model.input_scale) for image in calibrated)
                save_program(program, path, file_metadata(model), calibration if precision == "int8" else None)
                for runtime in find_runtimes(path):
                    run = open_file(path, runtime)
                    name = f"{runtime}, {precision}, {path.stat().st_size / 1e6:.1f} MB"
                    show(name, lambda batch, run=run: file_results(run, batch, model.settings.mask_threshold))
    return 0


if __name__ == "__main__":
    sys.exit(main())
