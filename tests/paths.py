"""Where data lies that is used in tests but not shipped: beside the checkout. Absent: those tests skip."""

from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"
