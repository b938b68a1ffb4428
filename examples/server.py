"""An HTTP server for a file of `solov2 export` in ONNX Runtime; uploads are bounded in bytes and pixels.

    pip install onnxruntime numpy pillow fastapi uvicorn
    MODEL=mine.onnx uvicorn server:app
    curl --data-binary @street.jpg localhost:8000/predict

The files onnxruntime_predict.py, detections.py and panoptic_merge.py must be beside this one.
"""

from __future__ import annotations

import io
import os
from typing import Any

from detections import describe
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from onnxruntime_predict import open_file, predict
from PIL import Image

MAX_BYTES, MAX_PIXELS = 20 * 2**20, 25_000_000  # of an upload
app, session = FastAPI(), open_file(os.environ["MODEL"])


def segment(upload: bytes) -> list[dict[str, Any]]:
    """The instances in an uploaded image file; 413 for one of too many pixels, 400 for what is no image."""
    try:
        with Image.open(io.BytesIO(upload)) as image:  # reads the header only
            width, height = image.size
        if width * height > MAX_PIXELS:
            raise HTTPException(413, f"the image has more than {MAX_PIXELS} pixels")
        return describe(predict(session, io.BytesIO(upload)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(400, "the upload is no image that can be read") from error


@app.post("/predict")
async def predict_upload(request: Request) -> list[dict[str, Any]]:
    """The body of the request is an image file; the answer has its instances, best first."""
    upload = bytearray()
    async for chunk in request.stream():
        upload += chunk
        if len(upload) > MAX_BYTES:
            raise HTTPException(413, f"the upload has more than {MAX_BYTES} bytes")
    return await run_in_threadpool(segment, bytes(upload))
