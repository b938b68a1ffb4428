"""Pure functions on tensors: images, sizes, masks, coordinates, Matrix NMS."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported on first use by `solov2.__getattr__`, which type checkers cannot follow
    from solov2.ops import matrix_nms as matrix_nms
