"""The weights that others have published: where each file is, its hash, its AP and its license."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from solov2.errors import InputError, printable

FAMILIES = ("mmdet", "authors", "adelaidet")


@dataclass(frozen=True)
class PublishedFile:
    """A weights file published by others.

    Args:
        model: name of the model in this library.
        family: who published it, one of `FAMILIES`.
        urls: addresses of the file, tried in turn.
        mask_ap: mask AP of this file on COCO val2017, in percent, as its publisher states it.
        license: of the repository that publishes it.
        sha256: its SHA-256 as far as it is known: all 64 digits, the first eight, or "".
        size: in bytes; 0 if unknown.
    """

    model: str
    family: str
    urls: tuple[str, ...]
    mask_ap: float
    license: str
    sha256: str = ""
    size: int = 0

    @property
    def name(self) -> str:
        """The name that its publisher gave it; two families have a SOLOv2_R50_3x.pth."""
        return self.urls[0].rpartition("/")[2]

    @property
    def cache_name(self) -> str:
        """Its unique name in the cache, such as "authors-65997520-SOLOv2_R50_3x.pth"."""
        return f"{self.family}-{self.sha256[:8] or 'unverified'}-{self.name}"

    @property
    def cached(self) -> Path:
        """Its path once it is downloaded: in torch's hub cache, which TORCH_HOME moves."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.cache_name


def _mmdet(model: str, build: str, mask_ap: float) -> PublishedFile:
    """A file of mmdetection's, whose names end in the first eight digits of the SHA-256."""
    url = f"https://download.openmmlab.com/mmdetection/v2.0/solov2/{model}_coco/{model}_coco_{build}.pth"
    return PublishedFile(model, "mmdet", (url,), mask_ap, "Apache-2.0", build.rpartition("-")[2])


def _authors(model: str, name: str, mask_ap: float, sha256: str = "") -> PublishedFile:
    url = f"https://huggingface.co/xinlongwang/SOLO/resolve/main/{name}.pth"
    return PublishedFile(model, "authors", (url,), mask_ap, "academic use", sha256)


def _adelaidet(model: str, name: str, mask_ap: float, sha256: str, size: int) -> PublishedFile:
    url = f"https://huggingface.co/ZjuCv/AdelaiDet/resolve/main/{name}.pth"
    return PublishedFile(model, "adelaidet", (url,), mask_ap, "academic use", sha256, size)


# Of each model, the first file is the one that "official" means. Licenses are those of the repositories.
PUBLISHED_FILES = (
    _mmdet("solov2_r50_fpn_1x", "20220512_125858-a357fa23", 34.8),
    _authors(
        "solov2_r50_fpn_1x", "SOLOv2_R50_1x", 34.8, "17e10fe2198665c573b363c504a1547e6a917e22fa94e926d7f8646432d8a506"
    ),
    _mmdet("solov2_r50_fpn_3x", "20220512_125856-fed092d4", 37.5),
    _authors(
        "solov2_r50_fpn_3x", "SOLOv2_R50_3x", 37.5, "659975203266ca2d00167790796fde961d09930c01124377d3ee3a8be3a3a660"
    ),
    _adelaidet(
        "solov2_r50_fpn_3x",
        "SOLOv2_R50_3x",
        37.6,
        "361eb419f4398c7d7ef1292c007b767746c01a277a3b5393de84f05cdacf1d05",
        371_953_777,
    ),
    _authors(
        "solov2_r101_fpn_3x", "SOLOv2_R101_3x", 39.1, "7126c25eee6575ef405fc689b46510493b4dc991ebf758a12645109ed906c55f"
    ),
    _mmdet("solov2_r101_fpn_3x", "20220511_095119-c559a076", 39.1),
    _adelaidet(
        "solov2_r101_fpn_3x",
        "SOLOv2_R101_3x",
        39.0,
        "689b8ce6dd82b3a1a2f8f146266e88e8e807bffaf5def04d2fd886b4a8f71aa9",
        524_083_079,
    ),
    _mmdet("solov2_r101_dcn_fpn_3x", "20220513_214734-16c966cb", 41.2),
    _authors(
        "solov2_r101_dcn_fpn_3x",
        "SOLOv2_R101_DCN_3x",
        41.4,
        "3cd436711e57047bf00a733fb606262097b4eff7121d3251305aeab3ccc249c5",
    ),
    _mmdet("solov2_x101_dcn_fpn_3x", "20220513_214337-aef41095", 42.4),
    _authors(
        "solov2_x101_dcn_fpn_3x",
        "SOLOv2_X101_DCN_3x",
        42.4,
        "e0ef1edcb04d4e468b5bd7cc63d8de4d8267402ee180679c6c0ddbeda51f7d46",
    ),
    _mmdet("solov2_light_r18_fpn_3x", "20220511_083717-75fa355b", 29.7),
    _authors(
        "solov2_light_r18_fpn_3x",
        "SOLOv2_LIGHT_448_R18_3x",
        29.6,
        "4f89669be79143566e02bdc51428fc10c83a3974a53326fcae1cf7e336dc6997",
    ),
    _authors(
        "solov2_light_r34_fpn_3x",
        "SOLOv2_LIGHT_448_R34_3x",
        32.0,
        "9243f7b9e64e4ae0a77517fed392a7f170ab3e5cad7028caa7b062c34d87d3c5",
    ),
    _mmdet("solov2_light_r34_fpn_3x", "20220511_091839-e51659d3", 31.9),
    _mmdet("solov2_light_r50_fpn_3x", "20220512_165256-c93a6074", 33.7),
    _authors("solov2_light_r50_fpn_3x", "SOLOv2_LIGHT_448_R50_3x", 33.7),
    _authors("solov2_light_r50_dcn_fpn_3x", "SOLOv2_LIGHT_512_DCN_R50_3x", 36.4),  # DCNv1
)
PUBLISHED_WEIGHTS = {file.model: file for file in reversed(PUBLISHED_FILES)}  # model -> the file that "official" means


def find_published(model: str, family: str = "") -> PublishedFile:
    """Find the published file of a model.

    Args:
        model: name of the model.
        family: one of `FAMILIES`, or "" for the file that "official" means.

    Raises:
        InputError: there is none; the message lists what has been published.
    """
    files = [file for file in PUBLISHED_FILES if file.model == model]
    if not files:
        models = ", ".join(dict.fromkeys(file.model for file in PUBLISHED_FILES))
        raise InputError(f"no weights are published for {printable(model)}, only for {models}; give a file instead")
    found = next((file for file in files if family in ("", file.family)), None)
    if found is None:
        known = ", ".join(f"official:{file.family}" for file in files)
        raise InputError(f"no weights of {model} are published as official:{printable(family)}, only as {known}")
    return found
