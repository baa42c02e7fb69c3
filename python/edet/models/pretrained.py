"""Models that come with their weights, in the folder ``weights`` of this package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1] / "weights"

#: Their names, and what they find. Beside each file of weights lies its model card, NAME.md.
PRETRAINED = {"edet_lite0_person": "people in photographs"}


def pretrained_file(name: str) -> Path | None:
    """The weights of the model ``name``, or None when it is no model with weights of its own."""
    return _FOLDER / f"{name}.safetensors" if name in PRETRAINED else None
