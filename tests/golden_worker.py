"""One rank of the golden record's runs over two ranks, started through torchrun: ``golden_worker.py FOLDER RUNS``.

RUNS is JSON: names of tests.golden_runs, each with the settings to change in it (none: the record itself).
What rank R says of a run goes to ``NAME/rankR.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch import distributed

import tests.conftest  # noqa: F401  torchvision and threads, before anything else
from tests.golden_runs import do_run


def main() -> None:
    """Do the runs, one after another in the same process group."""
    folder, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, changes in runs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        said = do_run(name, folder / name, **changes)
        (folder / name / f"rank{os.environ['RANK']}.json").write_text(json.dumps(said))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a process that is torn down in order


if __name__ == "__main__":
    main()
