"""What every test needs: torchvision importable beside a CPU torch, and one thread.

The models are tiny: a second thread only waits for the first, and on a busy machine makes the suite many times slower.
"""

import torch

from vlmpo.torchvision_shim import ensure_torchvision

ensure_torchvision()  # before peft or transformers are imported
torch.set_num_threads(1)
