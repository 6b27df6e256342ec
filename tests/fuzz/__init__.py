"""Broken input for every reader: ``make fuzz``."""

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before peft or transformers are imported
