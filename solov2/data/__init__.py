"""Datasets, transforms and data loaders: from COCO annotations to batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import solov2` loads it lazily, which a type checker cannot see
    from solov2.data import coco as coco
