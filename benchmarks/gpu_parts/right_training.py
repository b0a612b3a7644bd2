"""Training steps on the device: half precision, one-device DDP and FSDP2, and checkpoints that change devices."""

import logging
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers.precision_cases import SIDE, make_tokenizer
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

import discrete_lit
from discrete_lit.checkpoints import instantiate
from discrete_lit.generators import Generator
from gpu_parts.part import Check, Setting, part
from gpu_parts.small_generators import CLASSES, ONE_OF_EACH, small_generator

STEPS = 6
TOKENIZERS = ("VQVAE", "VQGAN")


class Losses(Callback):
    """Keeps the training loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))


def batches(module: Any, count: int) -> DataLoader:
    """Random batches for a generator or a tokenizer, on the CPU as a loader gives them."""
    generator, made = torch.Generator().manual_seed(0), []
    for number in range(count):
        index = torch.arange(8) + 8 * number
        if isinstance(module, Generator):
            shape = (8, *module.token_shape)
            inputs = {"tokens": torch.randint(module.vocab_size, shape, generator=generator)}
        else:
            inputs = {"image": torch.rand(8, 3, SIDE, SIDE, generator=generator) * 2 - 1}
        made.append({**inputs, "label": index % CLASSES, "index": index})
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def fit(
    module: Any, setting: Setting, *, max_steps: int = -1, checkpoint: Path | None = None, **settings: Any
) -> tuple[Trainer, list[float]]:
    """Train on `STEPS` random batches, or up to a step; the Trainer, and the loss of every batch."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    losses = Losses()
    trainer = Trainer(
        **{"accelerator": setting.device.type, "devices": 1, **settings},
        max_epochs=1 if max_steps == -1 else -1,
        max_steps=max_steps,
        limit_val_batches=0,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=setting.output,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches(module, STEPS), ckpt_path=checkpoint, weights_only=False)
    return trainer, losses.values


def trainable(name: str, setting: Setting) -> Any:
    """A module of a family or a tokenizer, with an optimizer."""
    seed_everything(0, verbose=False)
    module = make_tokenizer(name) if name in TOKENIZERS else small_generator(name, setting)[0].cpu()
    module.optimizer = partial(torch.optim.AdamW, lr=1e-3)
    return module.train()


@part("training_steps", kind="right", seconds=40, what="steps in 16-mixed and bf16-mixed: finite, and they train")
def training_steps(setting: Setting) -> Iterator[Check]:
    for name in (*ONE_OF_EACH, *TOKENIZERS):
        for precision in ("bf16-mixed",) if setting.device.type == "cpu" else ("bf16-mixed", "16-mixed"):
            module = trainable(name, setting)
            before = {key: value.detach().clone() for key, value in module.named_parameters() if value.requires_grad}
            trainer, losses = fit(module, setting, precision=precision)
            weights = {key: value.detach().cpu() for key, value in module.named_parameters() if value.requires_grad}
            moved = sum(not torch.equal(weights[key], value) for key, value in before.items())
            finite = all(torch.tensor(losses).isfinite()) and all(value.isfinite().all() for value in weights.values())
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = f", gradient scale {scaler.get_scale():.0f}" if scaler is not None else ""
            yield Check(
                name=name,
                case=precision,
                ok=bool(finite) and moved > 0 and len(losses) == STEPS,
                what="finite losses and weights" if finite else "not finite",
                note=f"loss {losses[0]:.4g} to {losses[-1]:.4g}; {moved} of {len(before)} parameters moved{scale}",
            )


@part("one_device_strategies", kind="right", seconds=30, what="DDP and FSDP2 on one device against plain training")
def one_device_strategies(setting: Setting) -> Iterator[Check]:
    backend = "nccl" if setting.device.type == "cuda" else "gloo"
    for name in ("autoregressive, LlamaGen", "masked"):
        _, expected = fit(trainable(name, setting), setting)
        strategies = {
            "DDP": DDPStrategy(process_group_backend=backend),
            "FSDP2": ModelParallelStrategy(1, 1, save_distributed_checkpoint=False, process_group_backend=backend),
        }
        for title, strategy in strategies.items():
            _, losses = fit(trainable(name, setting), setting, strategy=strategy)
            error = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses, expected, strict=True))
            yield Check(
                name=title,
                case=f"{name}, {STEPS} steps, float32, {backend}",
                error=error,
                tolerance=1e-4,
                ok=error <= 1e-4,
                what="share of the loss",
            )
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@part("checkpoint_moves", kind="right", seconds=20, what="a checkpoint goes to a CPU and back, and training goes on")
def checkpoint_moves(setting: Setting) -> Iterator[Check]:
    settings = {
        "tokenizer": {
            "class_path": "discrete_lit.tokenizers.TokenGrid",
            "init_args": {"vocab_size": 64, "token_shape": [4, 4]},
        },
        "image_size": 16,
        "num_classes": CLASSES,
        "backbone": {
            "class_path": "discrete_lit.backbones.Transformer",
            "init_args": {"width": 64, "depth": 2, "heads": 2},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
    }
    config = {"class_path": "discrete_lit.generators.Masked", "init_args": settings}
    here, cpu, file = setting.device.type, "cpu", None
    module: Any = None
    for number, device in enumerate((here, cpu, here)):
        seed_everything(0, verbose=False)
        steps, source = 2 * (number + 1), module
        module = instantiate(config)
        trainer, losses = fit(module, setting, max_steps=steps, accelerator=device, checkpoint=file)
        file = setting.output / f"{number}.ckpt"
        trainer.save_checkpoint(file)
        loaded = discrete_lit.load(file)
        state = {key: value.cpu() for key, value in module.state_dict().items()}
        differing = [key for key, value in loaded.state_dict().items() if not torch.equal(value.cpu(), state[key])]
        went_on = trainer.global_step == steps and all(torch.tensor(losses).isfinite())
        yield Check(
            name="saved and loaded",
            case=f"{'trained' if source is None else 'goes on'} on {device}, {steps} steps",
            error=float(len(differing)),
            tolerance=0.0,
            ok=not differing and went_on and len(state) > 0,
            what=f"tensors of {len(state)} that differ",
            note="" if went_on else f"it ended at step {trainer.global_step}",
        )
    yield from same_outputs(Path(str(file)), setting)


@torch.no_grad()
def same_outputs(file: Path, setting: Setting) -> Iterator[Check]:
    """The loaded module predicts on the device what it predicts on a CPU."""
    tokens, labels = torch.arange(32).view(2, 16) % 65, torch.tensor([0, 1])
    on_cpu, there = discrete_lit.load(file), discrete_lit.load(file).to(setting.device)
    expected = on_cpu.backbone(tokens, labels)
    found = there.backbone(tokens.to(setting.device), labels.to(setting.device)).cpu()
    error = float((found - expected).abs().max() / expected.abs().max())
    yield Check(
        name="logits of the loaded module",
        case="device against CPU, float32",
        error=error,
        tolerance=1e-5,
        ok=error <= 1e-5,
        what="share of the largest logit",
    )
