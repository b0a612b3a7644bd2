"""The hang detector: what it writes of a run that is silent, and nothing of one that is not."""

import logging
import time
from pathlib import Path

import pytest
from lightning import Callback

from discrete_lit.callbacks import HangDetector


class Waits(Callback):
    """Is silent for some seconds in a batch."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.fit_loop.total_batch_idx == 1:
            time.sleep(self.seconds)


def test_the_stack_of_a_silent_rank_is_written(tokenizer, make_trainer, make_loader, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "discrete_lit")
    trainer = make_trainer(max_epochs=1, callbacks=[HangDetector(seconds=0.5), Waits(1.5)])
    trainer.fit(tokenizer, make_loader(4), make_loader(1))
    file = tmp_path / "stacks" / "rank-0.txt"
    text = file.read_text()
    assert text.startswith("rank 0, process ") and "silent for 0.5 s" in text
    assert "test_hang_detector.py" in text and "on_before_backward" in text and text.count("Timeout") == 1
    assert f"rank 0 was silent for more than 0.5 s; where it was is in {file}" in caplog.text


def test_nothing_is_left_of_a_run_that_is_not_silent(tokenizer, make_trainer, make_loader, tmp_path):
    make_trainer(max_epochs=1, callbacks=[HangDetector(seconds=30)]).fit(tokenizer, make_loader(4), make_loader(1))
    assert not (tmp_path / "stacks").exists()


def test_ranks_that_end_at_once_do_not_miss_the_folder(make_trainer, monkeypatch, tmp_path):
    """The last rank removes the folder; here it does so between another one's file and its look at the folder."""
    detector, unlink = HangDetector(seconds=30), Path.unlink

    def then_another_ends(path, **settings):
        unlink(path, **settings)
        path.parent.rmdir()

    detector.on_fit_start(make_trainer(max_epochs=1, callbacks=[]), None)
    monkeypatch.setattr(Path, "unlink", then_another_ends)
    detector._end()
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_wrong_settings(seconds):
    with pytest.raises(ValueError, match="seconds of HangDetector must be a positive number"):
        HangDetector(seconds)
