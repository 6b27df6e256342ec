"""Generates responses, with a model here or at a server."""

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before any module here imports transformers, which imports torchvision
