"""Where this package keeps what it has measured."""

import os
from pathlib import Path

#: Environment variable with the folder.
ENVIRONMENT = "MLX_OPTIQ_EXT_CACHE"


def cache_dir() -> Path:
    """Where measurements are kept: ``$MLX_OPTIQ_EXT_CACHE`` or ``~/.cache/mlx-optiq-ext``."""
    root = os.environ.get(ENVIRONMENT)
    return Path(root) if root else Path.home() / ".cache" / "mlx-optiq-ext"
