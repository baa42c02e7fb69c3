"""The command ``edet`` and ``python -m edet``."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; says what to install when its packages are missing."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f'Error: {package} is needed here: pip install "edet-kernels[cli]"')
    cli.main()


if __name__ == "__main__":
    main()
