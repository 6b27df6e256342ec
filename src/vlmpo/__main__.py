"""``python -m vlmpo``, also under ``torchrun -m vlmpo`` and ``accelerate launch -m vlmpo``."""

from vlmpo.cli import main

if __name__ == "__main__":
    main()
