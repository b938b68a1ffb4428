"""The SOLOv2 model: backbone, FPN, head and mask feature head, with everything from image files to instances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solov2.compute import span
from solov2.errors import InputError
from solov2.models.fpn import FPN
from solov2.models.graphs import use_graphs
from solov2.models.head import SOLOv2Head
from solov2.models.mask_feature import MaskFeatureHead
from solov2.models.optimize import optimize_for_inference
from solov2.models.postprocess import postprocess
from solov2.models.resnet import ResNet
from solov2.models.saving import model_checkpoint
from solov2.models.semantic import SemanticHead
from solov2.ops.images import ImageLike
from solov2.predict import load_batch, predict_images
from solov2.settings import PanopticSettings, PostprocessSettings, rules


class SOLOv2(nn.Module):
    """SOLOv2 instance segmentation (Wang et al. 2020, arXiv 2003.10152); with a semantic head, panoptic segmentation.

    `solov2.build_model` and `solov2.load` construct it.

    Args:
        backbone, fpn, head, mask_feature_head: the four parts of the network.
        class_names: one name per class; label i is class_names[i]. The attribute `category_ids` holds the id of each
            label in annotation files: label + 1, unless `build_model` sets COCO's ids or those of the weights file.
        settings: post-processing thresholds and limits.
        pixel_mean, pixel_std: per channel in `channel_order`, in gray levels (0..255).
        channel_order: "rgb", or "bgr" for weights trained on BGR input (AdelaiDet).
        input_scale: (maximum long edge, maximum short edge) in pixels, to which `preprocess` resizes.
        semantic_head: makes the model panoptic; its classes are then the things.
        panoptic_settings: thresholds for merging instances and stuff; default: those of `PanopticSettings`.
        stuff_names: one name per stuff class; stuff label i is stuff_names[i].
        stuff_category_ids: id of each stuff label in annotation files; default: the ids that follow those of the
            classes.
    """

    divisor = 32  # images are padded to multiples of the coarsest backbone stride
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: ResNet,
        fpn: FPN,
        head: SOLOv2Head,
        mask_feature_head: MaskFeatureHead,
        *,
        class_names: Sequence[str],
        settings: PostprocessSettings,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        channel_order: str = "rgb",
        input_scale: tuple[int, int] = (1333, 800),
        semantic_head: SemanticHead | None = None,
        panoptic_settings: PanopticSettings | None = None,
        stuff_names: Sequence[str] = (),
        stuff_category_ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.fpn, self.head, self.mask_feature_head = backbone, fpn, head, mask_feature_head
        self.semantic_head = semantic_head
        self.config: dict[str, Any] | None = None  # name and model section, from `solov2.build_model`; `save` needs it
        self.auxiliary_head: SemanticHead | None = None  # of an auxiliary loss; see `solov2.build.add_auxiliary_head`
        self.class_names, self.stuff_names = list(class_names), list(stuff_names)
        self.category_ids = list(range(1, len(self.class_names) + 1))
        after = range(len(class_names) + 1, len(class_names) + len(stuff_names) + 1)
        self.stuff_category_ids = list(after if stuff_category_ids is None else stuff_category_ids)
        self.settings, self.panoptic_settings = settings, panoptic_settings or PanopticSettings()
        self.channel_order = channel_order
        self.input_scale = tuple(input_scale)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.pixel_mean.device

    @property
    def num_classes(self) -> int:
        """Number of classes C; labels are 0..C-1."""
        return len(self.class_names)

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """Grid size S of each level, finest first."""
        return self.head.grid_sizes

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Run the network.

        The outputs are the same in training and evaluation mode, except that an auxiliary head runs in training only.

        Args:
            images: float32 [B, 3, H, W], normalized and zero-padded as by `normalize`; H and W multiples of 32.

        Returns:
            category_logits: list over the levels of [B, C, S, S], before the sigmoid; kernels: list of [B, E, S, S];
            mask_features: [B, E, H / 4, W / 4]. With a semantic head also semantic_logits: [B, K + 1, H / 4, W / 4],
            one channel for each of the K stuff classes and the last one for all things; with an auxiliary head, in
            training mode, [B, C + 1, H / 4, W / 4], one channel per class and the last one for the background.

        Raises:
            InputError: `images` has another shape, or H or W is not a multiple of 32.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.divisor for side in images.shape[2:]):
            raise InputError(
                f"the network takes images of shape [B, 3, H, W] with H and W multiples of {self.divisor}, not "
                f"{list(images.shape)}; use SOLOv2.preprocess to pad images"
            )
        images = images.to(self.backbone.conv1.weight.dtype)  # differs where `optimize` cast the model
        with span("backbone"):
            stages = self.backbone(images)
        with span("FPN"):
            pyramid = self.fpn(stages)
        with span("head"):
            category_logits, kernels = self.head(pyramid)
        with span("mask features"):
            mask_features = self.mask_feature_head(pyramid[:4])
        raw = {"category_logits": category_logits, "kernels": kernels, "mask_features": mask_features}
        semantic_head = self.semantic_head
        if self.training and self.auxiliary_head is not None:
            semantic_head = self.auxiliary_head
        if semantic_head is not None:
            with span("semantic"):
                raw["semantic_logits"] = semantic_head(pyramid[:4])
        return raw

    def recompute_activations(self, recompute: bool) -> None:
        """Set whether the backbone, the mask branch and the semantic branch recompute activations to save memory."""
        for part in (self.backbone, self.mask_feature_head, self.semantic_head, self.auxiliary_head):
            if part is not None:
                part.recompute = recompute

    def optimize(self, *, precision: str = "float32", compile: bool = False, graphs: bool = False) -> SOLOv2:
        """Make a faster copy for inference, see `solov2.models.optimize.optimize_for_inference`.

        Args:
            precision: "float32", or "bf16" where the device is faster with it.
            compile: also compile the forward pass with `torch.compile`, once for all input sizes (on a CPU this needs a
                C++ compiler).
            graphs: launch the forward pass of one or two images as a CUDA graph, recorded once per input size, see
                `solov2.models.graphs.GraphedForward`; for inputs of few sizes on fast devices.

        Returns:
            The copy, in evaluation mode; it can be neither trained nor saved. This model is unchanged.

        Raises:
            ValueError: `precision` is unknown, or both `compile` and `graphs` are set.
            InputError: `graphs` is set, and the device has no CUDA graphs.
        """
        if precision not in ("float32", "bf16"):
            raise ValueError(f"precision must be 'float32' or 'bf16', got {precision!r}")
        if compile and graphs:
            raise ValueError("choose compile=True or graphs=True: a compiled forward pass is not recorded")
        model = optimize_for_inference(self, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        if compile:
            model.compile(dynamic=True)
        if graphs:
            use_graphs(model, model.device)
        return model

    def save(self, path: str | Path) -> None:
        """Write the model to a file that `solov2.load` reads; an existing file is replaced.

        The file contains the weights, the configuration with the model's current thresholds and limits, the names and
        the category ids. It contains nothing of a training run.

        Args:
            path: file to write; in the safetensors format (extra `hub`) if its name ends in .safetensors, otherwise in
                torch's. Folders are created as needed.

        Raises:
            InputError: the model was not built by `solov2.build_model` or `solov2.load`, or is an optimized copy; or
                safetensors is not installed.
            OSError: the disk is full or there is no permission; an existing file is left unchanged.
        """
        checkpoint = model_checkpoint(self, str(path))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path)

    def normalize(self, pixels: Tensor, sizes: Tensor) -> Tensor:
        """Normalize a padded batch, on its device and without synchronizing with the host.

        Args:
            pixels: uint8 [B, 3, H, W], RGB, on the device of the model.
            sizes: int64 [B, 2], (height, width) of each image before padding, on the same device.

        Returns:
            float32 [B, 3, H, W] with the channels in `channel_order`: (pixels - `pixel_mean`) / `pixel_std`, and 0 in
            the padding.
        """
        if self.channel_order == "bgr":
            pixels = pixels.flip(1)
        images = (pixels - self.pixel_mean) / self.pixel_std
        rows = torch.arange(pixels.shape[-2], device=pixels.device)
        columns = torch.arange(pixels.shape[-1], device=pixels.device)
        inside_rows = rows < sizes[:, :1]  # [B, H]
        inside_columns = columns < sizes[:, 1:]  # [B, W]
        return images * (inside_rows[:, None, :, None] & inside_columns[:, None, None, :])

    def preprocess(self, images: Iterable[ImageLike] | ImageLike) -> tuple[Tensor, Tensor, Tensor]:
        """Load images, resize them to `input_scale`, pad and normalize them: the inputs of `forward`.

        Args:
            images: as for `predict`.

        Returns:
            images: float32 [B, 3, H, W], H and W multiples of 32; sizes: int64 [B, 2], (height, width) of each image
            before padding; original_sizes: int64 [B, 2], before resizing. All on the device of the model.

        Raises:
            ValueError: there are no images, or an image cannot be read or has an unsupported dtype, shape or value
                range; the message names it.
            TypeError: an image has an unsupported type.
        """
        batch = self.load_batch(images)
        sizes, original_sizes = batch["sizes"].to(self.device), batch["original_sizes"].to(self.device)
        return self.normalize(batch["pixels"].to(self.device), sizes), sizes, original_sizes

    def load_batch(self, images: Iterable[ImageLike] | ImageLike) -> dict[str, Tensor]:
        """Load images, resize them to `input_scale` and pad them: a batch for `Predictor.launch`.

        The batch is on the host, except that tensors that are all on one accelerator stay there.

        Args:
            images: as for `predict`.

        Returns:
            pixels: uint8 [B, 3, H, W], RGB; sizes: int64 [B, 2], (height, width) of each image before padding;
            original_sizes: int64 [B, 2], before resizing.

        Raises:
            ValueError, TypeError: as in `preprocess`.
        """
        return load_batch(images, self.input_scale, self.divisor)

    def postprocess(
        self,
        raw: dict[str, Any],
        sizes: Tensor | Sequence[Sequence[int]],
        original_sizes: Tensor | Sequence[Sequence[int]],
        *,
        mask_format: str = "bool",
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Turn raw outputs into one result per image (paper sections 2.1.3 and 2.2).

        Args:
            raw: what `forward` returned.
            sizes: int64 [B, 2], (height, width) of each image before padding.
            original_sizes: int64 [B, 2], (height, width) of the masks to return.
            mask_format: "bool" for masks bool [N, H, W], "rle" for a list of N COCO RLEs.
            settings: fields of `PostprocessSettings` to override for this call, e.g. score_threshold, max_instances.

        Returns:
            As `predict`, see `solov2.models.postprocess.postprocess`.

        Raises:
            ValueError: `mask_format` is unknown, or a setting has an invalid value.
            TypeError: a setting is unknown.
        """
        return postprocess(raw, sizes, original_sizes, replace(self.settings, **settings), mask_format=mask_format)

    def postprocess_panoptic(
        self,
        raw: dict[str, Any],
        sizes: Tensor | Sequence[Sequence[int]],
        original_sizes: Tensor | Sequence[Sequence[int]],
        *,
        mask_format: str = "bool",
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """Turn raw outputs into instances and one segment per pixel.

        Args:
            raw, sizes, original_sizes, mask_format: as for `postprocess`.
            settings: fields of `PostprocessSettings` and `PanopticSettings` to override for this call.

        Returns:
            As `predict_panoptic`, see `solov2.models.panoptic.postprocess_panoptic`.

        Raises:
            InputError: the model has no semantic head.
            ValueError, TypeError: as in `postprocess`.
        """
        from solov2.models.panoptic import postprocess_panoptic  # instance models never need it

        self.check_panoptic()
        merging = {name: settings.pop(name) for name in rules(PanopticSettings) if name in settings}
        instances, segments = replace(self.settings, **settings), replace(self.panoptic_settings, **merging)
        return postprocess_panoptic(raw, sizes, original_sizes, instances, segments, mask_format=mask_format)

    def check_panoptic(self) -> None:
        """Raise InputError if the model has no semantic head."""
        if self.semantic_head is None:
            raise InputError("the model has no semantic head; build a panoptic one, such as solov2_panoptic_r50_fpn_3x")

    def predict(
        self,
        images: Iterable[ImageLike] | ImageLike,
        *,
        score_threshold: float | None = None,
        max_instances: int | None = None,
        batch_size: int = 1,
        mask_format: str = "bool",
        precision: str = "tf32",
    ) -> list[dict[str, Any]]:
        """Segment the instances of each image.

        Args:
            images: any number of images, or a single one. An image is a path, the contents of an image file (bytes), or
                a file opened in binary mode (EXIF orientation applied); a PIL image (EXIF orientation ignored; call
                `PIL.ImageOps.exif_transpose` first); an array [H, W, 3] in RGB, [H, W, 4] (alpha dropped) or gray
                [H, W]; a tensor [3, H, W] in RGB or gray [1, H, W]. Arrays and tensors are uint8, or float in 0..1.
                Kinds may be mixed. For a folder, pass `solov2.find_images(folder)`.
            score_threshold: minimum final score; default: the model's (0.05).
            max_instances: maximum number of instances per image, 0 for no limit; default: the model's (100).
            batch_size: images per forward pass. The images of a batch are padded to a common size, which shifts the
                grids slightly: 1 gives the published behavior.
            mask_format: "bool" for full-size masks; "rle" for COCO RLEs, which are made without full-size masks (100
                of these take 1.2 GB for a 12-megapixel image).
            precision: of the network: "tf32" (float32, but NVIDIA cards round the inputs of convolutions to 10 bits of
                mantissa), "float32", "bf16" or "fp16" for mixed precision, or "auto" for the fastest of the device.

        Returns:
            One dictionary per image: scores float32 [N] descending; labels int64 [N]; masks bool [N, H, W] at the size
            of the input image, or a list of N RLEs; boxes float32 [N, 4], tight around the masks, as x1, y1, x2, y2 in
            pixels, maximum exclusive. Tensors are on the device of the model. All results are in memory together;
            `predict_iter` returns one at a time.

        Raises:
            ValueError: an image cannot be read or has an unsupported dtype, shape or value range; `batch_size` is
                below 1; `mask_format` or `precision` is unknown; or a limit is out of range.
            TypeError: an image has an unsupported type.
        """
        limits = {"score_threshold": score_threshold, "max_instances": max_instances}
        return list(predict_images(self, images, batch_size, mask_format, precision, limits))

    def predict_iter(
        self,
        images: Iterable[ImageLike] | ImageLike,
        *,
        score_threshold: float | None = None,
        max_instances: int | None = None,
        batch_size: int = 1,
        mask_format: str = "bool",
        precision: str = "tf32",
    ) -> Iterator[dict[str, Any]]:
        """Segment the instances of each image, with only one batch of images and results in memory.

        Arguments, results and errors are those of `predict`. `images` may be an infinite generator: it is read one
        batch at a time. An image that cannot be read raises when its turn comes, and ends the iteration; invalid
        arguments raise at once. Between batches, the model is in the mode in which the caller left it.
        """
        limits = {"score_threshold": score_threshold, "max_instances": max_instances}
        return predict_images(self, images, batch_size, mask_format, precision, limits)

    def predict_panoptic(
        self,
        images: Iterable[ImageLike] | ImageLike,
        *,
        score_threshold: float | None = None,
        max_instances: int | None = None,
        panoptic_score_threshold: float | None = None,
        panoptic_overlap_threshold: float | None = None,
        stuff_area_limit: int | None = None,
        batch_size: int = 1,
        mask_format: str = "bool",
        precision: str = "tf32",
    ) -> list[dict[str, Any]]:
        """Segment the instances of each image, and assign every pixel to one of them, to a stuff class or to nothing.

        Args:
            images, score_threshold, max_instances, batch_size, mask_format, precision: as for `predict`.
            panoptic_score_threshold: minimum score of an instance that becomes a segment; default: the model's (0.3).
            panoptic_overlap_threshold: maximum fraction of an instance that better ones may cover; default: the model's
                (0.5).
            stuff_area_limit: minimum area of a stuff segment, in pixels of the input image; default: the model's (4096,
                for images of about 640 x 480).

        Returns:
            Per image, what `predict` returns, and in addition: panoptic_map int32 [H, W] on the host, the id of each
            pixel's segment, or 0; and segments, a list of dictionaries in ascending order of id, with id; label, an
            index into `class_names` or `stuff_names`; is_thing; score, and instance, an index into the instances (both
            None for stuff); area in pixels; box (x1, y1, x2, y2), maximum exclusive.

        Raises:
            InputError: the model has no semantic head.
            ValueError, TypeError: as in `predict`.
        """
        settings = {
            "score_threshold": score_threshold,
            "max_instances": max_instances,
            "panoptic_score_threshold": panoptic_score_threshold,
            "panoptic_overlap_threshold": panoptic_overlap_threshold,
            "stuff_area_limit": stuff_area_limit,
        }
        return list(predict_images(self, images, batch_size, mask_format, precision, settings, panoptic=True))
