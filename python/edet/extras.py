"""Imports of optional packages, with an error that says which extra installs them."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Imports ``module``.

    Raises:
        ImportError: it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'{package} is needed here: pip install "edet-kernels[{extra}]" ({error})'
        ) from error
