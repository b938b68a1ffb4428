"""The reference's half of compare.py: does one step of work per line on standard input and answers how long it took.

python peer_worker.py PEER_DIR THREADS      runs under the reference's own Python and knows nothing of this library

A line is a JSON object with "do" and that step's arguments; the answer is one JSON object per line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class Worker:
    """The reference's model and what the steps share."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer

    def setup(self, config: str, size: list[int], candidates: int, folder: str, device: str = "cpu") -> dict[str, Any]:
        """Build and calibrate the model; its weights and the image (uint8 BGR [3, H, W]) go into the folder."""
        self.model, self.config = self.peer.build(config, 0)
        self.size = tuple(size)
        self.image = self.peer.rand_image(*self.size, 0)
        sample = self.peer.make_sample(self.size, self.size)
        data = self.model.data_preprocessor({"inputs": [self.image], "data_samples": [sample]}, False)
        self.inputs = data["inputs"]
        self.meta = data["data_samples"][0].metainfo
        self.peer.perturb(self.model, 0, self.inputs, candidates)
        self.model.eval()
        self.weights = Path(folder) / "weights.pth"
        torch.save({"state_dict": self.model.state_dict()}, self.weights)
        torch.save({"image": self.image}, Path(folder) / "image.pth")
        self.device = torch.device(device)
        self.model.to(self.device)
        self.inputs = self.inputs.to(self.device)
        if self.device.type != "cpu":
            use_plain_focal_loss()
        return {}

    @torch.no_grad()
    def infer(self) -> dict[str, Any]:
        """Normalized image to full-size masks."""
        start = time.perf_counter()
        features = self.model.extract_feat(self.inputs)
        neck = time.perf_counter()
        raw = self.model.mask_head(features)
        head = time.perf_counter()
        (result,) = self.model.mask_head.predict_by_feat(*raw, batch_img_metas=[self.meta])
        end = time.perf_counter()
        return {"seconds": end - start, "parts": [neck - start, head - neck, end - head], "found": len(result.scores),
                "score_sum": float(result.scores.sum())}  # fmt: skip

    def speed(self, what: str, images: int, warm_ups: int, iterations: int) -> dict[str, Any]:
        """Mean seconds of "network", "inference" (network and post-processing) or "training" on a batch of the image,
        with a single wait for the device after the last iteration.
        """
        inputs, metas = self.inputs.repeat(images, 1, 1, 1), [self.meta] * images
        self.model.train(what == "training")

        def step() -> None:
            if what == "training":
                self.update(self.prepare(images))
                return
            with torch.no_grad():
                raw = self.model.mask_head(self.model.extract_feat(inputs))
                if what == "inference":
                    self.model.mask_head.predict_by_feat(*raw, batch_img_metas=metas)

        for _ in range(warm_ups):
            step()
        self.wait()
        start = time.perf_counter()
        for _ in range(iterations):
            step()
        self.wait()
        return {"seconds": (time.perf_counter() - start) / iterations}

    def wait(self) -> None:
        """Wait until the device has finished its queued work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def open_head(self, head: dict[str, Any], mask_branch: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
        """A head of another size, whose weights play no part in `postprocess`."""
        _, config = self.peer.build("solov2_r50", 0)
        from mmdet.registry import MODELS

        settings = config.model.mask_head
        settings.update(head)
        settings.mask_feature_head.update(mask_branch)
        settings.test_cfg = {**config.model.test_cfg, **test}
        self.model = SimpleNamespace(mask_head=MODELS.build(settings))
        return {}

    def postprocess(
        self, file: str, size: list[int], original_size: list[int], save: str | None = None
    ) -> dict[str, Any]:
        """Raw outputs of a file to masks of the original size, which go into the file `save`."""
        raw = torch.load(file, weights_only=True)
        meta = {"img_shape": tuple(size), "ori_shape": tuple(original_size)}
        with torch.no_grad():
            start = time.perf_counter()
            (result,) = self.model.mask_head.predict_by_feat(
                raw["kernels"], raw["category_logits"], raw["mask_features"], batch_img_metas=[meta]
            )
            seconds = time.perf_counter() - start
        if save is not None:
            torch.save({key: result[key] for key in ("scores", "labels", "masks")}, save)
        return {"seconds": seconds, "found": len(result.scores), "score_sum": float(result.scores.sum()),
                "pixels": int(result.masks.sum())}  # fmt: skip

    def open_panoptic(self, file: str, limits: dict[str, Any]) -> dict[str, Any]:
        """The heads of its Panoptic FPN for COCO, and the logits [1, 54, h, w] and instances of a file."""
        self.peer.build("solov2_light_r18", 0)  # makes the next imports possible
        from mmdet.registry import MODELS
        from mmengine.config import ConfigDict
        from mmengine.structures import InstanceData

        self.semantic = MODELS.build({"type": "PanopticFPNHead", "num_things_classes": 80, "num_stuff_classes": 53})
        self.semantic.forward = lambda logits: {"seg_preds": logits}
        self.fusion = MODELS.build({"type": "HeuristicFusionHead", "test_cfg": ConfigDict(limits)})
        given = torch.load(file, weights_only=True)
        self.logits = given["logits"]
        self.instances = InstanceData(
            **{key: given[key] for key in ("scores", "labels", "masks")}, bboxes=given["boxes"]
        )
        return {}

    @torch.no_grad()
    def panoptic(self, size: list[int], original_size: list[int], save: str | None = None) -> dict[str, Any]:
        """Logits and instances to the panoptic map: class + 1000 x instance, which goes into the file `save`."""
        padded = [4 * side for side in self.logits.shape[2:]]
        meta = {"batch_input_shape": tuple(padded), "img_shape": tuple(size), "ori_shape": tuple(original_size)}
        forget_peak()
        before = resident("VmRSS")
        start = time.perf_counter()
        logits = self.semantic.predict(self.logits, [meta], rescale=True)
        middle = time.perf_counter()
        (result,) = self.fusion.predict([self.instances], logits)
        end = time.perf_counter()
        peak = resident("VmHWM")
        if save is not None:
            torch.save(result.sem_seg[0], save)
        return {"seconds": end - start, "parts": [middle - start, end - middle], "before": before, "peak": peak}

    def nms(self, file: str) -> dict[str, Any]:
        """Matrix NMS of the masks, labels and scores of a file."""
        from mmdet.models.layers import mask_matrix_nms

        given = torch.load(file, weights_only=True)
        area = given["masks"].sum((1, 2)).float()
        start = time.perf_counter()
        scores, *_ = mask_matrix_nms(given["masks"], given["labels"], given["scores"], mask_area=area, nms_pre=500,
                                     max_num=500, kernel="gaussian", sigma=2.0, filter_thr=-1)  # fmt: skip
        return {"seconds": time.perf_counter() - start, "score_sum": float(scores.sum())}

    def open_data(self, config: str, annotations: str, images: str, scale: list[int], flip: float) -> dict[str, Any]:
        """The training pipeline over a COCO folder, on one thread; answers ids and instances of the usable images."""
        import cv2

        self.head = self.peer.build(config, 0)[0].mask_head  # first: it makes the next import possible
        from mmdet.datasets import CocoDataset

        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        pipeline = [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
            {"type": "Resize", "scale": tuple(scale), "keep_ratio": True},
            {"type": "RandomFlip", "prob": flip},
            {"type": "PackDetInputs"},
        ]
        self.dataset = CocoDataset(ann_file=annotations, data_prefix={"img": images}, pipeline=pipeline,
                                   filter_cfg={"filter_empty_gt": True, "min_size": 32})  # fmt: skip
        return {"image_ids": [self.dataset.get_data_info(i)["img_id"] for i in range(len(self.dataset))]}

    def load(self, targets: bool) -> dict[str, Any]:
        """Seconds per image of one pass; with targets, masks are padded and assigned as in its training step."""
        from mmdet.models.utils import unpack_gt_instances

        taken, instances, positives, pixels = 0.0, 0, 0, 0
        for index in range(len(self.dataset)):
            start = time.perf_counter()
            sample = self.dataset[index]["data_samples"]
            if targets:
                size = tuple(-(-side // 32) * 32 for side in sample.img_shape)
                sample.gt_instances.masks = sample.gt_instances.masks.pad(size, pad_val=0)
                sample.gt_instances.bboxes = sample.gt_instances.bboxes.tensor
                truth, *_ = unpack_gt_instances([sample])
                quarter = [side // self.head.mask_stride for side in size]
                masks, _, _, cells = self.head._get_targets_single(truth[0], featmap_sizes=quarter)
            taken += time.perf_counter() - start
            instances += len(sample.gt_instances)
            if targets:
                positives += sum(map(len, cells))
                pixels += sum(int(level.sum()) for level in masks)
        return {"seconds": taken / len(self.dataset), "instances": instances, "positives": positives, "pixels": pixels}

    def truth(self, instances: int, file: str) -> dict[str, Any]:
        """Ground truth for `train`, written for the other side too; training starts from the first weights again."""
        self.model.load_state_dict(torch.load(self.weights, weights_only=True)["state_dict"])
        truth = self.peer.synth_gt(*self.size, self.model.mask_head.num_classes, 0, instances)
        np.savez(file, boxes=truth[0], labels=truth[1], masks=truth[2])
        self.sample = self.peer.make_sample(self.size, self.size, truth)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-5, momentum=0.9, weight_decay=1e-4)
        return {}

    def train(self, images: int = 1) -> dict[str, Any]:
        """One training step: targets, forward, losses, backward, clipping, SGD."""
        self.model.train()
        data = self.prepare(images)
        forget_peak()
        before = resident("VmRSS")
        start = time.perf_counter()
        losses = self.update(data)
        self.wait()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "before": before, "peak": resident("VmHWM"),
                "losses": {key: float(value.detach()) for key, value in losses.items()}}  # fmt: skip

    def prepare(self, images: int) -> dict[str, Any]:
        """A batch of the image and its ground truth, normalized and on the device."""
        given = {"inputs": [self.image] * images, "data_samples": [self.sample] * images}
        return self.model.data_preprocessor(given, True)

    def update(self, data: dict[str, Any]) -> dict[str, Any]:
        """The training step itself; returns its losses on the device."""
        losses = self.model.loss(data["inputs"], data["data_samples"])
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 35)
        self.optimizer.step()
        return losses


def use_plain_focal_loss() -> None:
    """Compute the focal loss with torch, as the reference does on a CPU; elsewhere it calls a part of mmcv that would
    have to be compiled.
    """
    from mmdet.models.losses import focal_loss

    def plain(pred: torch.Tensor, target: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        classes = pred.size(1)
        one_hot = torch.nn.functional.one_hot(target, num_classes=classes + 1)[:, :classes]
        return focal_loss.py_sigmoid_focal_loss(pred, one_hot, *arguments, **named)

    focal_loss.sigmoid_focal_loss = plain


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> None:
    """Start VmHWM again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Answer line by line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the reference prints is no answer
    sys.path.insert(0, sys.argv[1])
    import peer  # only here: the folder is an argument

    torch.set_num_threads(int(sys.argv[2]))
    worker = Worker(peer)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
