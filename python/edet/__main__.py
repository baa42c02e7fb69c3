"""The command ``edet`` and ``python -m edet``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; says what to install when its packages are missing."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f'Error: {error.name} is needed here: pip install "edet-kernels[cli]"')
    cli.main()


if __name__ == "__main__":
    main()
