"""Exports effdet's own model to ONNX, with given weights; run where effdet is installed.

    .venv-peers/bin/python benchmarks/effdet_onnx.py tf_efficientdet_d0 FOLDER 1 3 512 512

FOLDER holds weights.pth, the state dict of the edet model of that name, and gets one ONNX file per
part; the numbers are the images' shape. benchmarks/cpu.py calls it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import effdet
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a program, only this file's own folder is searched

from benchmarks import rivals  # noqa: E402


def main() -> None:
    """Exports what the command line names."""
    name, folder, *shape = sys.argv[1:]
    batch, channels, height, width = map(int, shape)
    config = effdet.get_efficientdet_config(name)
    config.update({"image_size": (height, width)})
    model = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    model.load_state_dict(torch.load(Path(folder) / "weights.pth"))
    images = torch.randn(batch, channels, height, width)
    rivals.export_parts(model, images, Path(folder))


if __name__ == "__main__":
    main()
