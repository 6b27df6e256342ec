"""What every test needs: torchvision importable beside a CPU torch, before peft or transformers are imported."""

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()
