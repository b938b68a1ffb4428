"""The network and its post-processing; constructors take plain arguments, never a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported on first use by `solov2.__getattr__`, which type checkers cannot follow
    from solov2.models import solov2 as solov2
