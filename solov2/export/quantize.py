"""int8: the convolutions of an ONNX graph quantized by ONNX Runtime, with ranges measured on the user's images."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from onnx import ModelProto

# Their convolutions are nearly all of the work. Mask features, and everything that is computed from them, keep float32:
# every pixel of a mask depends on them.
QUANTIZED = ("model.backbone", "model.fpn", "model.head")


def quantize_convolutions(model: ModelProto, calibration: Iterable[Mapping[str, Tensor]]) -> ModelProto:
    """Quantize the convolutions of backbone, FPN and head to int8, statically, in QDQ form.

    Weights have a scale per channel, and each activation the symmetric range that it takes on the calibration inputs.

    Args:
        model: a float32 graph, in which torch noted the modules that its nodes come from; its weights are changed.
        calibration: inputs of the graph: pixels and sizes.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, batches: Iterator[Mapping[str, Tensor]]) -> None:
            self.batches = batches

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch[name].numpy() for name in ("pixels", "sizes")}

    _split_weights(model)
    nodes = [node.name for node in model.graph.node if node.op_type == "Conv" and _is_quantized(node)]
    logging.disable(logging.WARNING)  # advice to fold batch norms first, which is done
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_static(
                model,
                path,
                Reader(iter(calibration)),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                nodes_to_quantize=nodes,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={"ActivationSymmetric": True},  # with zero points, OpenVINO loses 2 AP on the quickstart
            )
            return onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)


def _is_quantized(node: Any) -> bool:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
    return any(f"'{part}'" in scopes for part in QUANTIZED)


def _split_weights(model: ModelProto) -> None:
    """Compute the nodes that split weights, in place: only a weight that is a constant is quantized as one."""
    from onnx import numpy_helper

    graph = model.graph
    constants = {constant.name: constant for constant in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Split" and constants.keys() >= set(node.input)]:
        weight, sizes = (numpy_helper.to_array(constants[name]) for name in node.input)
        axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
        parts = np.split(weight, sizes.cumsum()[:-1], axis)
        graph.initializer.extend(numpy_helper.from_array(part, name) for part, name in zip(parts, node.output))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for constant in constants.values():
        if constant.name not in used:
            graph.initializer.remove(constant)
