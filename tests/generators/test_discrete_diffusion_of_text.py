"""Text by the same generator: from characters to bits per character and to text."""

from math import log, log2
from pathlib import Path

import torch
from helpers.tiny_runs import run, write_settings

import discrete_lit
from discrete_lit.data.text import write_text


def test_a_model_of_characters_learns_its_letters(tmp_path: Path) -> None:
    """Three letters in turn: a chunk of eight has log2(3) bits, and each letter as many if their order is not seen."""
    write_text("abc" * 2000, tmp_path / "tokens", length=8, source="letters")
    settings = {
        "model": {
            "class_path": "discrete_lit.generators.DiscreteDiffusion",
            "init_args": {
                "tokenizer": {"class_path": "discrete_lit.tokenizers.Characters"},
                "image_size": 8,
                "num_classes": 1,
                "label_dropout": 0.0,
                "backbone": {
                    "class_path": "discrete_lit.backbones.Transformer",
                    "init_args": {"width": 32, "depth": 2, "heads": 2},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "discrete_lit.data.TokenArrays",
            "init_args": {
                "train": str(tmp_path / "tokens" / "train"),
                "validation": str(tmp_path / "tokens" / "validation"),
                "batch_size": 32,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_steps": 80,
            "val_check_interval": 80,
            "check_val_every_n_epoch": None,
        },
        "run_dir": str(tmp_path / "run"),
    }
    run("fit", "--config", write_settings(tmp_path / "settings.yaml", settings))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_folder = next(path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(log_folder))
    events.Reload()
    (nats,), (bits,) = (events.Scalars(f"validation/{name}") for name in ("loss", "bits_per_token"))
    assert abs(bits.value - nats.value / log(2)) < 1e-5
    # Its letters are learned soon, its order later.
    assert log2(3) / 8 < bits.value < log2(3) + 0.2
    generator = discrete_lit.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    texts = generator.tokenizer.texts(generator.sample(torch.zeros(20, dtype=torch.int64)))
    assert len(texts) == 20 and sum(letter in "abc" for letter in "".join(texts)) >= 150
