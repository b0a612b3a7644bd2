"""What a rank notes: its process, where the run is, and the samples of each of its batches."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from discrete_lit.core.files import atomic_write_text


class Ledger(Callback):
    """Writes `<folder>/<attempt>/rank-N.jsonl`, a line a batch, and `rank-N.phase`: moments, one after the other.

    Args:
        folder: of the whole series of kills; the attempt is in the environment, `KILLS_ATTEMPT`.
        pause: seconds that each batch takes longer, so that there is time to kill in.
    """

    def __init__(self, folder: str, *, pause: float = 0.03) -> None:
        self.folder = Path(folder) / os.environ.get("KILLS_ATTEMPT", "none")
        self.pause = pause

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank = trainer.global_rank
        atomic_write_text(self.folder / f"rank-{self.rank}.pid", str(os.getpid()))
        self._reach("loading")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        line = {"step": trainer.global_step, "ranks": trainer.world_size, "samples": samples_of(batch)}
        self._append("jsonl", json.dumps(line))
        self._reach("batch")
        time.sleep(self.pause)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._reach("save")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reach("validation")
        time.sleep(self.pause)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reach("end")

    def _reach(self, moment: str) -> None:
        self._append("phase", moment)

    def _append(self, kind: str, line: str) -> None:
        with (self.folder / f"rank-{self.rank}.{kind}").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def samples_of(batch: Any) -> list[list[Any]]:
    """Index and hash of each sample of a batch, as the ledger has them."""
    content = next(batch[name] for name in ("image", "tokens") if name in batch)
    return [
        [int(index), hashlib.sha256(sample.contiguous().numpy().tobytes()).hexdigest()[:16]]
        for index, sample in zip(batch["index"], content, strict=True)
    ]
