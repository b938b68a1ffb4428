"""Packaging of the library; tool settings are in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    """Copies the configurations, which are at the top of the checkout, into the package."""

    def run(self) -> None:
        """Also copy the configurations; an editable install finds them next to the package."""
        super().run()
        if not self.editable_mode:
            for path in Path("configs").rglob("*.yaml"):
                copy = Path(self.build_lib, "solov2", path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


REPORT = ["faster-coco-eval>=1.8"]  # AP of boundaries
FAST = [*REPORT, "opencv-python-headless>=4.9"]
TENSORBOARD = ["tensorboard>=2.14"]
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]  # for .onnx; .pt2 needs nothing more
DOCS = ["mkdocs-material>=9.5"]
TIMM = ["timm>=1.0"]
COMPLETION = ["shtab>=1.7"]
HUB = ["huggingface_hub>=0.30", "safetensors>=0.4"]
VIDEO = ["av>=12.0"]
SUPERVISION = ["supervision>=0.25"]
# setuptools builds the wheel that tests/test_packaging.py inspects
TEST = [
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "setuptools>=77",
    "torchmetrics>=1.4",
    *FAST,
    *EXPORT,
    *SUPERVISION,
    *COMPLETION,
    *HUB,
    "fastapi>=0.110",  # of examples/server.py
    "httpx>=0.27",
    *VIDEO,
]

setup(
    name="solov2",
    version="1.0.0",
    description="SOLOv2 instance segmentation in pure PyTorch: train, evaluate, benchmark and predict.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url="https://arxiv.org/abs/2003.10152",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["instance segmentation", "SOLOv2", "PyTorch", "COCO"],
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["solov2", "solov2.*"]),
    # Makes setuptools add a path entry for an editable install instead of an import finder. Python consults a finder
    # too late: started in the folder above a clone named `solov2`, it would import that folder as the package.
    package_dir={"": "."},
    package_data={"solov2": ["py.typed"]},
    cmdclass={"build_py": BuildWithConfigurations},
    install_requires=[
        "torch>=2.10",  # older versions have two holes in weights_only=True: CVE-2025-32434 and CVE-2026-24747
        "torchvision>=0.25",
        "pycocotools>=2.0.7",
        "numpy>=1.26",
        "pillow>=10.3",
        "pyyaml>=6.0",
        "tqdm>=4.65",
    ],
    extras_require={
        "test": TEST,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, "ruff>=0.9", "import-linter>=2.3", "mypy>=1.15", "types-PyYAML", "types-tqdm"],
        "fast": FAST,
        "report": REPORT,
        "tensorboard": TENSORBOARD,
        "export": EXPORT,
        "completion": COMPLETION,
        "timm": TIMM,
        "hub": HUB,
        "video": VIDEO,
        "all": [*FAST, *TENSORBOARD, *EXPORT, *COMPLETION, *TIMM, *HUB, *SUPERVISION, *VIDEO],
    },
    entry_points={
        "console_scripts": [
            "solov2 = solov2.commands.main:main",
            "solov2-train = solov2.commands.train:main",
            "solov2-eval = solov2.commands.evaluate:main",
            "solov2-benchmark = solov2.commands.benchmark:main",
            "solov2-predict = solov2.commands.predict:main",
            "solov2-check-data = solov2.commands.check_data:main",
            "solov2-export = solov2.commands.export:main",
        ]
    },
)
