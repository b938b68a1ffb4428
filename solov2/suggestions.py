"""Suggestions for names that do not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Our name -> names of the same setting in other libraries.
OTHER_NAMES = {
    "accumulate": "accumulate_grad_batches accum grad_accum gradient_accumulation_steps",
    "backbone": "arch encoder",
    "batch_size": "bs batch batch_size_per_gpu samples_per_gpu ims_per_batch images_per_batch",
    "center_sigma": "pos_scale sigma",
    "checkpoint_every": "checkpoint_interval save_every save_interval save_period",
    "clip_norm": "clip_grad clip_gradients grad_clip grad_norm gradient_clip_val max_grad_norm max_norm",
    "deformable_stages": "dcn",
    "ema_decay": "ema model_ema",
    "epochs": "max_epoch max_epochs n_epochs num_epochs total_epochs",
    "evaluate_every": "eval_interval eval_period val_interval val_period",
    "flip_probability": "flip flip_prob fliplr flip_ratio",
    "frozen_stages": "freeze freeze_at freeze_layers",
    "grid_sizes": "num_grids",
    "input_scale": "image_size img_scale img_size imgsz input_size resolution",
    "keep_checkpoints": "max_keep_ckpts save_total_limit",
    "learning_rate": "base_lr lr lr0 max_lr",
    "log_every": "log_interval print_freq",
    "mask_threshold": "mask_thr",
    "max_candidates": "nms_pre pre_nms",
    "max_instances": "detections_per_image max_det max_dets max_per_img topk",
    "memory_format": "channels_last",
    "nms_sigma": "sigma",
    "num_classes": "n_classes nc num_cls",
    "optimizer": "opt optim",
    "pixel_mean": "image_mean mean",
    "pixel_std": "image_std std",
    "precision": "amp autocast bf16 dtype fp16 half mixed_precision",
    "pretrained_backbone": "pretrained",
    "root": "data_dir data_path data_root dataset_root path",
    "schedule": "lr_policy lr_schedule lr_scheduler scheduler",
    "score_threshold": "conf conf_thres conf_threshold confidence filter_thr score_thr score_thresh",
    "seed": "manual_seed random_seed random_state",
    "step_epochs": "lr_steps milestones steps",
    "train_scales": "image_size img_scale img_size imgsz input_size resolution min_size",
    "warmup_start": "warmup_factor warmup_ratio",
    "warmup_steps": "warmup warmup_epochs warmup_iters",
    "weight_decay": "wd",
    "workers": "n_workers num_workers workers_per_gpu",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean A or B?)' for the end of an error message, or an empty string.

    Suggests our names for what other libraries call `name`, or else the closest names.

    Args:
        name: what was typed. Sections and the dashes of flags are ignored, here and in `known`: 'train.lr' and '--lr'
            suggest 'train.learning_rate' and '--learning-rate'.
        known: the names that exist.
    """
    candidates = {_normalize(each): each for each in known}
    typed, names = _normalize(name), list(candidates)
    close = (
        [each for each in names if each == typed]
        or [own for own, others in OTHER_NAMES.items() if typed in others.split() and own in candidates]
        or difflib.get_close_matches(typed, names, cutoff=0.9)
        or difflib.get_close_matches(typed, names)
    )
    return f" (did you mean {' or '.join(candidates[each] for each in close)}?)" if close else ""


def _normalize(name: str) -> str:
    return name.rpartition(".")[2].lstrip("-").replace("-", "_").lower()
