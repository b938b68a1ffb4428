"""Pure functions on tensors: images, sizes, masks, coordinates, Matrix NMS."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import solov2` loads it when it is first used, which a type checker cannot see
    from solov2.ops import matrix_nms as matrix_nms
