"""The runtimes of exported files, on the CPU: torch for .pt2, ONNX Runtime and OpenVINO for .onnx."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solov2.errors import InputError

Run = Callable[[Tensor, Tensor], dict[str, Tensor]]  # pixels uint8 [B, 3, H, W], sizes int64 [B, 2] -> outputs


def find_runtimes(path: str | Path) -> list[str]:
    """The runtimes, of those installed here, for a file with this name.

    Raises:
        InputError: none of them is installed.
    """
    found = [name for name, (suffix, module, _) in RUNTIMES.items() if Path(path).suffix == suffix and _has(module)]
    if not found:
        raise InputError(f"{path}: no runtime for it is installed: pip install 'solov2[export]'")
    return found


def open_file(path: str | Path, runtime: str) -> Run:
    """Load a file in one of `find_runtimes`.

    Raises:
        InputError: the runtime cannot run the file, for example because it lacks an operator of the graph.
    """
    try:
        return RUNTIMES[runtime][2](str(path))
    except Exception as error:  # every runtime has its own kinds
        missing = re.search(r"No conversion rule found for operations: (\w+)", str(error))
        reason = f"it has no operator {missing[1]}" if missing else str(error).strip().splitlines()[0]
        raise InputError(f"{runtime} cannot run {path}: {reason}") from error


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _open_torch(path: str) -> Run:
    module = torch.export.load(path).module()

    def run(pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return module(pixels, sizes)

    return run


def _open_onnxruntime(path: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # of half-precision constants it warns that it does not fold them
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {"pixels": pixels.numpy(), "sizes": sizes.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, outputs)}

    return run


def _open_openvino(path: str) -> Run:
    import openvino

    # Else it computes in bf16 where the CPU has it.
    model: Any = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.get_any_name() for output in model.outputs]

    def run(pixels: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        outputs = model({"pixels": pixels.numpy(), "sizes": sizes.numpy()})
        return {name: torch.from_numpy(outputs[name].copy()) for name in names}

    return run


RUNTIMES: dict[str, tuple[str, str, Callable[[str], Run]]] = {  # suffix, module, how to open a file
    "torch": (".pt2", "torch", _open_torch),
    "ONNX Runtime": (".onnx", "onnxruntime", _open_onnxruntime),
    "OpenVINO": (".onnx", "openvino", _open_openvino),
}
