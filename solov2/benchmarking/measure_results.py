"""Timing of what follows the network: Matrix NMS, post-processing, and the evaluation of results."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor

from solov2.benchmarking.measure import SEED, Workload, measure
from solov2.benchmarking.measure_network import count_candidates, photo_size, staged_postprocess
from solov2.benchmarking.roofline import Lap
from solov2.benchmarking.synthetic import ellipses, synthetic_instances, synthetic_raw
from solov2.build import construct
from solov2.compute import HALF_TYPES, Compute
from solov2.data.categories import default_class_names
from solov2.evaluation.coco import CocoEvaluator
from solov2.ops.masks import encode_rle
from solov2.ops.matrix_nms import matrix_nms

NMS_SIZE = (200, 304)  # masks of an 800 x 1216 input at stride 4
PLANE_SIZE = (480, 640)  # of the photographs whose results are evaluated
DETECTIONS = 100  # per image, the most that COCO evaluates
SCENES = 4  # different images whose results repeat, so that memory does not grow with their number
NOISE = 0.03  # shift of near duplicates, as a share of the image


def nms_masks(count: int, generator: torch.Generator) -> Tensor:
    """Ellipses bool [N, 200, 304], half of them near duplicates of the others, as the cells of one object give."""
    drawn = ellipses(-(-count // 2), *NMS_SIZE, generator) > 0
    shift = int(NOISE * NMS_SIZE[0])
    return torch.cat([drawn, drawn.roll((shift, -shift), dims=(1, 2))])[:count]


def coco_labels(count: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Classes as frequent as in COCO, class k about as 1 / (k + 1): int64 [N]; near duplicates share theirs."""
    half = -(-count // 2)
    if half == 0:
        return torch.zeros(0, dtype=torch.int64)
    frequency = 1 / torch.arange(1, num_classes + 1.0)
    return torch.multinomial(frequency, half, replacement=True, generator=generator).repeat(2)[:count]


def measure_nms(workload: Workload) -> dict[str, dict[str, Any]]:
    """Matrix NMS of `workload.candidates` masks of 200 x 304, and the whole way from network outputs to instances.

    Returns:
        "nms_coco_classes" and "nms_one_class", per image: `measure`'s keys and masks, their number; "postprocess" and
        "postprocess_rle", per batch with masks as planes and as run lengths: `measure`'s keys and what was decoded.
    """
    generator = torch.Generator().manual_seed(SEED)
    count = workload.candidates
    masks = nms_masks(count, generator).to(workload.compute.device)
    scores = torch.rand(count, generator=generator).sort(descending=True).values.to(workload.compute.device)
    mixed = coco_labels(count, workload.config.model.num_classes, generator).to(workload.compute.device)
    report = {}
    for name, labels in (("nms_coco_classes", mixed), ("nms_one_class", torch.zeros_like(mixed))):

        def step(lap: Lap, labels: Tensor = labels) -> None:
            matrix_nms(masks, labels, scores)
            lap("matrix NMS")

        report[name] = {**measure(step, replace(workload, batch_size=1)), "masks": count}
    return report | _measure_postprocess(workload)


def empty_raw(workload: Workload) -> dict[str, Any]:
    """Network outputs of a batch in shape and type, without running the network."""
    model = workload.config.model
    with torch.device("meta"):
        network = construct(model, default_class_names(model.num_classes)).eval()
        raw = network(torch.empty(workload.batch_size, 3, *workload.size))
    dtype = HALF_TYPES[workload.compute.precision] or torch.float32

    def real(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [real(item) for item in value]
        return torch.empty(value.shape, dtype=dtype, device=workload.compute.device)

    return {name: real(value) for name, value in raw.items()}


def _measure_postprocess(workload: Workload) -> dict[str, dict[str, Any]]:
    with torch.device("meta"):
        settings = construct(workload.config.model, default_class_names(workload.config.model.num_classes)).settings
    raw = synthetic_raw(empty_raw(workload), workload.candidates, torch.Generator().manual_seed(SEED))
    sizes = torch.tensor([workload.size] * workload.batch_size)
    original_sizes = torch.tensor([photo_size(workload)] * workload.batch_size)
    report = {}
    for name, mask_format in (("postprocess", "bool"), ("postprocess_rle", "rle")):
        results: list[dict[str, Any]] = []

        @torch.no_grad()
        def step(lap: Lap, mask_format: str = mask_format, results: list[dict[str, Any]] = results) -> None:
            results[:] = staged_postprocess(raw, sizes, original_sizes, settings, lap, mask_format)

        report[name] = {
            **measure(step, workload),
            "photo_size": list(photo_size(workload)),
            "candidates_per_image": count_candidates(raw, settings.category_threshold) / workload.batch_size,
            "instances_per_image": sum(len(result["scores"]) for result in results) / workload.batch_size,
        }
    return report


def measure_evaluation(workload: Workload, images: int) -> dict[str, dict[str, Any]]:
    """Boolean masks of 100 instances on each of some images to run lengths, and COCO's AP of masks and boxes.

    Returns:
        "evaluation": `measure`'s keys, images, detections, detections_per_second (all stages but the AP), ap_ms and
        mask_AP, that of the synthetic results.
    """
    generator = torch.Generator().manual_seed(SEED)
    num_classes = workload.config.model.num_classes
    scenes = [
        synthetic_instances(max(1, workload.instances), PLANE_SIZE, num_classes, generator) for _ in range(SCENES)
    ]
    results = [_found(scene, num_classes, generator) for scene in scenes]
    coco = _ground_truth(scenes, images, num_classes)

    figures: list[float] = []

    def step(lap: Lap) -> None:
        evaluator = CocoEvaluator(coco, list(coco.cats))
        lap("ground truth")
        for image in range(images):
            result = results[image % SCENES]
            masks = encode_rle(result["masks"])
            lap("run lengths")
            evaluator.update([image + 1], [{**result, "masks": masks}])
            lap("collect")
        figures[:] = [evaluator.summarize()["segm"]["AP"]]
        lap("AP")

    part = measure(step, replace(workload, compute=Compute(torch.device("cpu")), batch_size=images))
    detections = images * DETECTIONS
    ap_ms = part["stages"]["AP"]["median_ms"]
    per_second = 1000 * detections / (part["stages"]["total"]["median_ms"] - ap_ms)
    return {
        "evaluation": {
            **part,
            "images": images,
            "detections": detections,
            "detections_per_second": per_second,
            "ap_ms": ap_ms,
            "mask_AP": figures[0],
        }
    }


def _found(scene: dict[str, Tensor], num_classes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A result that finds the instances of a scene and fills up with others."""
    others = synthetic_instances(DETECTIONS, PLANE_SIZE, num_classes, generator)
    joined = {key: torch.cat([scene[key], others[key]])[:DETECTIONS] for key in scene}
    scores = torch.rand(DETECTIONS, generator=generator).sort(descending=True).values
    return {**joined, "masks": joined["masks"].bool(), "scores": scores}


def _ground_truth(scenes: list[dict[str, Tensor]], images: int, num_classes: int) -> COCO:
    coco = COCO()
    height, width = PLANE_SIZE
    encoded = [encode_rle(scene["masks"].bool()) for scene in scenes]
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        scene = scenes[image % SCENES]
        for label, (x1, y1, x2, y2), mask, plane in zip(
            scene["labels"].tolist(), scene["boxes"].tolist(), encoded[image % SCENES], scene["masks"], strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image + 1,
                    "category_id": label + 1,
                    "segmentation": mask,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(plane.sum()),
                    "iscrowd": 0,
                }
            )
    coco.dataset = {
        "images": [{"id": image + 1, "height": height, "width": width} for image in range(images)],
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(default_class_names(num_classes))],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
