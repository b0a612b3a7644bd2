"""Compiled training is training: the same losses, checkpoints of the same names, and a resume of either kind."""

from functools import partial

import pytest
import torch
from helpers.tiny_runs import TOKENIZER, generator_settings, run, write_settings
from lightning import Callback, Trainer
from torch.utils.data import DataLoader

from discrete_lit.backbones import Transformer
from discrete_lit.callbacks import Compile, throughput
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.generators import Autoregressive

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]))


@pytest.fixture
def fit(tmp_path, make_tokenizer):
    """`fit(compiled, steps, ckpt_path=None)`: losses, the module and where the checkpoint is."""

    def run(compiled: bool, steps: int, ckpt_path: str | None = None):
        torch._dynamo.reset()
        torch.manual_seed(0)
        generator = Autoregressive(
            make_tokenizer("fsq"),
            16,
            num_classes=3,
            backbone=partial(Transformer, width=16, depth=2, heads=2, positions="rope_2d", conditioning="adaln"),
            optimizer=partial(torch.optim.AdamW, lr=0.01),
        )
        labels = torch.tensor([0, 1, 2, 1])
        batch = {"tokens": torch.arange(64).view(4, 4, 4) % 12, "label": labels, "index": torch.arange(4)}
        losses = Losses()
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[losses, *([Compile("aot_eager")] if compiled else [])],
        )
        trainer.fit(generator, DataLoader([batch] * 8, batch_size=None), ckpt_path=ckpt_path)
        path = str(tmp_path / f"{'compiled' if compiled else 'plain'}.ckpt")
        trainer.save_checkpoint(path)
        return losses.values, generator, path

    yield run
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_runs_and_plain_ones_go_on_from_each_other(fit) -> None:
    expected, plain, _ = fit(compiled=False, steps=4)
    first, _, path = fit(compiled=False, steps=2)
    rest, compiled, _ = fit(compiled=True, steps=4, ckpt_path=path)
    assert all(block._compiled_call_impl is not None for block in compiled.backbone.blocks)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert first + rest == pytest.approx(expected, rel=1e-5)
    whole, _, path = fit(compiled=True, steps=2)
    assert set(torch.load(path)["state_dict"]) == set(plain.state_dict())
    rest, _, _ = fit(compiled=False, steps=4, ckpt_path=path)
    assert whole + rest == pytest.approx(expected, rel=1e-5)


def test_one_setting_of_the_command_compiles(tmp_path, monkeypatch) -> None:
    """The line that `lightning_configs/trainer/gpu.yaml` gives, in its precision."""
    compiled = []
    monkeypatch.setattr(throughput, "compile_blocks", lambda backbone, **options: compiled.append(options))
    save(instantiate(TOKENIZER["model"]), tmp_path / "tokenizer.ckpt")
    file = write_settings(tmp_path / "settings.yaml", generator_settings(tmp_path / "tokenizer.ckpt"))
    run("fit", "--config", file, "--trainer.callbacks+=Compile", "--trainer.precision=bf16-mixed")
    assert compiled == [{"backend": "inductor", "mode": None}]


def test_a_tokenizer_has_no_blocks_to_compile(make_tokenizer) -> None:
    with pytest.raises(ValueError, match="backbone of a Generator, this is a FSQ"):
        Compile().setup(Trainer(logger=False, accelerator="cpu"), make_tokenizer("fsq"), "fit")
