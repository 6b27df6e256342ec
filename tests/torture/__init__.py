"""Killed runs, damaged checkpoints and full disks: ``make torture``."""

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before peft or transformers are imported
