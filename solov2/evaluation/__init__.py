"""Figures of merit: COCO average precision (`coco`) and the bound that the training targets set (`oracle`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import solov2` loads it when it is first used, which a type checker cannot see
    from solov2.evaluation import coco as coco
