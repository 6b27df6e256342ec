"""Builds tiny models for the demo, the tests and the benchmarks."""

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before any module here imports transformers, which imports torchvision
