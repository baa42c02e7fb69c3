"""Predicts the CUDA kernels' times from their machine code: see docs/gpu-model.md."""
