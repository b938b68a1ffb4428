"""The network and its post-processing; constructors take plain arguments, never a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `import solov2` loads it when it is first used, which a type checker cannot see
    from solov2.models import solov2 as solov2
