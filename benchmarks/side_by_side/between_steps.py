"""A Trainer's steps, and a bare loop that runs between two blocks of them."""

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer

from side_by_side.timing import Seconds, clock, milliseconds, ratio, since


class BetweenSteps(Callback):
    """Times blocks of the Trainer's steps from the start of a batch, and a bare block between two of them.

    Args:
        bare: called with the Trainer and the module where training starts; gives what runs a number of bare steps.
        steps: of a block.
        warmup: steps of both before anything is timed.
    """

    def __init__(
        self, bare: Callable[[Trainer, LightningModule], Callable[[int], None]], steps: int, warmup: int
    ) -> None:
        self.make_bare, self.steps, self.warmup = bare, steps, warmup
        self.run_bare: Callable[[int], None] | None = None
        self.started = Seconds(0.0, 0.0)
        self.trained: list[Seconds] = []
        self.bare: list[Seconds] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_bare = self.make_bare(trainer, pl_module)
        self.run_bare(self.warmup)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        done = trainer.global_step - self.warmup
        if done < 0 or done % self.steps:
            return
        assert self.run_bare is not None
        if done:
            self.trained.append(since(self.started, self.steps))
        start = clock()
        self.run_bare(self.steps)
        self.bare.append(since(start, self.steps))
        self.started = clock()

    def report(self, name: str, target: str) -> None:
        """Print both arms and their ratio; each block of steps stands between two bare ones, whose mean it meets."""
        around = [
            Seconds(*((before + after) / 2 for before, after in zip(*pair, strict=True)))
            for pair in zip(self.bare[:-1], self.bare[1:], strict=True)
        ]
        print(f"{name:10s} {milliseconds(self.trained)} a step")
        print(f"{'bare':10s} {milliseconds(self.bare)} a step")
        print(f"{'ratio':10s} {ratio(self.trained, around, target)}")
