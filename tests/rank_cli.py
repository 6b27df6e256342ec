"""``vlmpo`` on one rank, started through torchrun, with FSDP2 on the CPU where the recipe asks for it."""

from __future__ import annotations

import tests.conftest  # noqa: F401  torchvision and threads, before anything else
from tests.ranks import sharded_on_cpu
from vlmpo.cli import main

if __name__ == "__main__":
    sharded_on_cpu()
    main()
