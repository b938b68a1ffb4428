"""Segment images with a file of `solov2 export` in ONNX Runtime; needs neither torch nor this library.

    pip install onnxruntime numpy pillow
    python onnxruntime_predict.py mine.onnx street.jpg ...

The files detections.py and panoptic_merge.py must be beside this one.
"""

from __future__ import annotations

import json
import sys
from typing import Any, BinaryIO

import onnxruntime
from detections import describe, instances, load


def open_file(path: str) -> onnxruntime.InferenceSession:
    """Load an exported file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def predict(session: onnxruntime.InferenceSession, image: str | BinaryIO, **options: Any) -> list[dict[str, Any]]:
    """The instances in an image file, see `detections.instances`."""
    metadata = session.get_modelmeta().custom_metadata_map
    padded = session.get_inputs()[0].shape[2:]
    pixels, sizes, original = load(image, padded, json.loads(metadata["input_scale"]))
    scores, labels, masks = session.run(["scores", "labels", "masks"], {"pixels": pixels, "sizes": sizes})
    return instances(scores[0], labels[0], masks[0], sizes[0], original, metadata, **options)


if __name__ == "__main__":
    session = open_file(sys.argv[1])
    for path in sys.argv[2:]:
        print(json.dumps({"file": path, "instances": describe(predict(session, path))}))
