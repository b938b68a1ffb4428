"""Segment images with a file of `solov2 export` in OpenVINO; needs neither torch nor this library.

    pip install openvino numpy pillow
    python openvino_predict.py mine.onnx street.jpg ...

The files detections.py and panoptic_merge.py must be beside this one.
"""

from __future__ import annotations

import json
import sys
from typing import Any, BinaryIO

import openvino
from detections import describe, instances, load


def open_file(path: str) -> tuple[openvino.CompiledModel, dict[str, str]]:
    """Load an exported file: the network on the CPU, and the metadata."""
    core = openvino.Core()
    model = core.read_model(path)
    metadata = model.get_rt_info("framework").value
    # Without the hint, OpenVINO computes in bf16 on CPUs that have it.
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}), metadata


def predict(
    opened: tuple[openvino.CompiledModel, dict[str, str]], image: str | BinaryIO, **options: Any
) -> list[dict[str, Any]]:
    """The instances in an image file, see `detections.instances`."""
    model, metadata = opened
    padded = [int(side.get_length()) for side in model.input("pixels").get_partial_shape()[2:]]
    pixels, sizes, original = load(image, padded, json.loads(metadata["input_scale"]))
    outputs = model({"pixels": pixels, "sizes": sizes})
    scores, labels, masks = (outputs[name][0] for name in ("scores", "labels", "masks"))
    return instances(scores, labels, masks, sizes[0], original, metadata, **options)


if __name__ == "__main__":
    opened = open_file(sys.argv[1])
    for path in sys.argv[2:]:
        print(json.dumps({"file": path, "instances": describe(predict(opened, path))}))
