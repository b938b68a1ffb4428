"""Evaluation: COCO average precision (`coco`) and the upper bound set by the training targets (`oracle`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import solov2` loads it lazily, which a type checker cannot see
    from solov2.evaluation import coco as coco
