"""How long the ranks may wait for one another: when the time is longer, and when not."""

import pytest
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from discrete_lit.callbacks import CollectiveTimeout, collective_timeout


class Moments(Callback):
    """Notes the batches and checkpoints between the times that are set."""

    def __init__(self, noted):
        self.noted = noted

    def on_train_batch_end(self, *_):
        self.noted.append("batch")

    def on_save_checkpoint(self, *_):
        self.noted.append("save")


def test_longer_up_to_the_first_batch_and_around_checkpoints(
    tokenizer, make_trainer, make_loader, tmp_path, monkeypatch
):
    noted = []
    monkeypatch.setattr(collective_timeout, "set_timeouts", noted.append)
    keeper = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1)
    callbacks = [CollectiveTimeout(5, long_seconds=50), Moments(noted), keeper]
    make_trainer(max_steps=5, callbacks=callbacks, enable_checkpointing=True).fit(tokenizer, make_loader(8))
    batches = ["batch", 5, "batch", "batch", 50, "save", 5, "batch", "batch"]
    assert noted[: 2 + len(batches)] == [50, 50, *batches]


@pytest.mark.parametrize(
    ("seconds", "long_seconds"), [(0, 10), (20, 10), (-1, 10), (1, float("inf")), (float("nan"), 10)]
)
def test_wrong_settings(seconds, long_seconds):
    with pytest.raises(ValueError, match="CollectiveTimeout needs 0 < seconds <= long_seconds"):
        CollectiveTimeout(seconds, long_seconds=long_seconds)
