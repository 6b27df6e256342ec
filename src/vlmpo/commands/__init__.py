"""The commands: one file each. Only these print, and only these know the recipe."""

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before any module here imports transformers, which imports torchvision
