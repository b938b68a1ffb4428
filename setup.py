"""Packaging of the library; the settings of the tools are in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

FAST = ["faster-coco-eval>=1.8"]
# setuptools builds the wheel that tests/test_packaging.py looks into
TEST = ["pytest>=8.0", "hypothesis>=6.100", "setuptools>=77", *FAST]

setup(
    name="solov2",
    version="0.1.0",
    description="SOLOv2 instance segmentation in pure PyTorch: train, evaluate, benchmark and predict.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["instance segmentation", "SOLOv2", "PyTorch", "COCO"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10",
    # The configurations stay at the top of the checkout, where they are edited, and travel inside the package.
    packages=[*find_packages(include=["solov2", "solov2.*"]), "solov2.configs", "solov2.configs.base"],
    package_dir={"solov2.configs": "configs", "solov2.configs.base": "configs/base"},
    package_data={"solov2.configs": ["*.yaml"], "solov2.configs.base": ["*.yaml"]},
    install_requires=[
        "torch>=2.10",  # weights_only=True had two holes before it: CVE-2025-32434 and CVE-2026-24747
        "torchvision>=0.25",
        "pycocotools>=2.0.7",
        "numpy>=1.26",
        "pillow>=10.3",
        "pyyaml>=6.0",
        "tqdm>=4.65",
    ],
    extras_require={
        "test": TEST,
        "dev": [*TEST, "ruff>=0.9", "import-linter>=2.3", "mypy>=1.15", "types-PyYAML", "types-tqdm"],
        "fast": FAST,
        "tensorboard": ["tensorboard>=2.14"],
        "export": ["onnx>=1.17", "onnxscript>=0.5"],  # ONNX alone; .pt2 needs nothing further
    },
    entry_points={
        "console_scripts": [
            "solov2 = solov2.__main__:main",
            "solov2-train = solov2.commands.train:main",
            "solov2-eval = solov2.commands.evaluate:main",
            "solov2-benchmark = solov2.commands.benchmark:main",
            "solov2-predict = solov2.commands.predict:main",
            "solov2-check-data = solov2.commands.check_data:main",
            "solov2-export = solov2.commands.export:main",
        ]
    },
)
