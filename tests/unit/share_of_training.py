"""One of two processes that train together; ``torchrun`` starts it. Writes what it has in the end into a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scala_model.train.parallel import processes
from tests.unit.test_train import SHARED, trainer


def main(folder: Path, stop_at: int | None) -> None:
    exchanges, all_reduce = 0, dist.all_reduce

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal exchanges
        exchanges += 1
        return all_reduce(*args, **options)

    dist.all_reduce = counted
    torch.set_num_threads(1)
    with processes("cpu") as (group, device):
        run = trainer(folder, SHARED, device=device, processes=group)
        run.resume()

        def progress(step: int, text: str) -> None:
            if step == stop_at and group.rank == 1:  # asked of one process only
                run.stop()

        run.run(log_every=1, progress=progress)
        state = {"model": run.model.state_dict(), "step": run.step, "exchanges": exchanges}
        torch.save(state, folder / f"rank{group.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
