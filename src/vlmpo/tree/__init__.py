"""Prompts and their responses in packed rows: layout, attention, log-probs."""

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before any module here imports transformers, which imports torchvision
