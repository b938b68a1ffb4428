"""Files of exported programs: .pt2 and .onnx, their precisions, and their metadata about the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from solov2.errors import InputError
from solov2.export.quantize import quantize_convolutions
from solov2.models.solov2 import SOLOv2
from solov2.outputs import replace_file

PRECISIONS = {".pt2": ("float32", "bf16"), ".onnx": ("float32", "fp16", "int8")}
NETWORK_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # int8 is made from the float32 graph


def check_format(path: str | Path, precision: str = "float32") -> None:
    """Check that `save_program` can write this kind of file here.

    Args:
        path: the file.
        precision: of the network in it.

    Raises:
        InputError: the suffix of the file name is unknown, the format does not support the precision, or a package is
            not installed.
    """
    suffix = Path(path).suffix
    if suffix not in PRECISIONS:
        raise InputError(f"{path}: the name must end in {' or '.join(PRECISIONS)}")
    if precision not in PRECISIONS[suffix]:
        possible = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in PRECISIONS.items())
        raise InputError(f"{path}: {suffix} files have no precision {precision} (possible are {possible})")
    if suffix == ".onnx":
        try:
            import onnxscript  # noqa: F401

            if precision == "int8":
                import onnxruntime.quantization  # noqa: F401
        except ImportError as error:
            raise InputError("ONNX export needs additional packages: pip install 'solov2[export]'") from error


def file_metadata(model: SOLOv2) -> dict[str, str]:
    """What a program must know about the model to use its file: {name: JSON}.

    Returns:
        class_names, and of a panoptic model stuff_names: a name per label; input_scale: [maximum long edge, maximum
        short edge] in pixels to which images are resized; mask_threshold: a pixel above this probability is set.
    """
    metadata = {
        "class_names": model.class_names,
        "stuff_names": model.stuff_names,
        "input_scale": model.input_scale,
        "mask_threshold": model.settings.mask_threshold,
    }
    return {key: json.dumps(value) for key, value in metadata.items() if value != []}


def save_program(
    program: torch.export.ExportedProgram,
    path: str | Path,
    metadata: Mapping[str, str],
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a program to a file, atomically: an existing file is replaced completely or not at all.

    Args:
        program: from `solov2.export.graph.export_program`.
        path: .pt2 for `torch.export.load`, .onnx for ONNX.
        metadata: from `file_metadata`; extra files NAME.json of a .pt2, metadata entries NAME in ONNX.
        calibration: inputs of the program, for an .onnx whose convolutions are quantized to int8, see
            `solov2.export.quantize.quantize_convolutions`; None keeps the program's precision.

    Raises:
        InputError: as in `check_format`.
        OSError: disk full, no permission.
    """
    check_format(path, "float32" if calibration is None else "int8")
    onnx = _to_onnx(program, metadata, calibration) if Path(path).suffix == ".onnx" else None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        if onnx is None:
            torch.export.save(program, file, extra_files={f"{key}.json": value for key, value in metadata.items()})
        else:
            file.write(onnx)


def _to_onnx(
    program: torch.export.ExportedProgram,
    metadata: Mapping[str, str],
    calibration: Iterable[Mapping[str, Tensor]] | None,
) -> bytes:
    outputs = program.module()(*program.example_inputs[0])
    names = [
        name if isinstance(value, Tensor) else f"{name}_{level}"
        for name, value in outputs.items()
        for level in range(1 if isinstance(value, Tensor) else len(value))
    ]
    exported = torch.onnx.export(program, output_names=names, verbose=False)
    assert exported is not None
    model = exported.model_proto
    if calibration is not None:
        model = quantize_convolutions(model, calibration)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()
