"""Training runs for the tests of several ranks: the same function in one process and, as a script, on each rank.

As a script: `distributed_run.py OUT.pt SETTINGS.json`, with the environment variables of a rank (`LOCAL_RANK`, ...);
SETTINGS is a list of keyword dictionaries for `run`, which run one after another.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from discrete_lit import data as data_modules
from discrete_lit.callbacks import (
    ExponentialMovingAverage,
    GradientNorm,
    Preemption,
    ReconstructionGrid,
    SampleGrid,
    Throughput,
    TrainingGuard,
)
from discrete_lit.callbacks.image_grids import as_in_validation
from discrete_lit.checkpoints import instantiate
from discrete_lit.cli.resume import ContinueExactly
from discrete_lit.data import TokenWriter
from discrete_lit.fsdp2 import FSDP2Strategy
from discrete_lit.tokenizers import from_checkpoint

IMAGE_SIZE, CLASSES = 16, 4
NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 4, "multipliers": [1, 1, 2], "blocks": 1, "attention": False, "norm_groups": 2},
}
# A large eps keeps gradients that are zero but for rounding from being scaled up to whole steps.
OPTIMIZER = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "eps": 1e-4}}
SCHEDULER = {
    "class_path": "discrete_lit.optimization.WarmupCosine",
    "init_args": {"warmup_steps": 2, "total_steps": 12},
}


def tokenizer_config() -> dict[str, Any]:
    return {"class_path": "discrete_lit.tokenizers.FSQ", "init_args": {"network": NETWORK, "levels": [4, 3]}}


def vqvae_config() -> dict[str, Any]:
    settings = {"network": NETWORK, "codebook_size": 8, "code_dim": 4, "optimizer": OPTIMIZER}
    return {"class_path": "discrete_lit.tokenizers.VQVAE", "init_args": settings}


def vqgan_config(quantizer: dict[str, Any] | None = None, **adversarial: Any) -> dict[str, Any]:
    """Two steps of the discriminator alone, then an adaptive weight; LeCam and R1."""
    losses = "discrete_lit.tokenizers.losses"
    discriminator = {"width": 4, "layers": 1, **adversarial.pop("discriminator", {})}
    settings = {
        "discriminator": {"class_path": f"{losses}.discriminators.PatchGAN", "init_args": discriminator},
        **{"start_step": 2, "lead_steps": 1, "lecam_weight": 0.1, "lecam_decay": 0.5, "r1_weight": 0.1, "r1_every": 2},
        **adversarial,
    }
    quantizer = quantizer or {
        "class_path": "discrete_lit.tokenizers.quantizers.FiniteScalarQuantizer",
        "init_args": {"levels": [4, 3]},
    }
    arguments = {"network": NETWORK, "quantizer": quantizer, "optimizer": OPTIMIZER}
    arguments["adversarial_loss"] = {"class_path": f"{losses}.AdversarialLoss", "init_args": settings}
    return {"class_path": "discrete_lit.tokenizers.VQGAN", "init_args": arguments}


def generator_config(family: str, tokenizer_checkpoint: str) -> dict[str, Any]:
    return {
        "class_path": f"discrete_lit.generators.{family}",
        "init_args": {
            "tokenizer": {
                "class_path": "discrete_lit.tokenizers.from_checkpoint",
                "init_args": {"checkpoint": tokenizer_checkpoint},
            },
            "image_size": IMAGE_SIZE,
            "num_classes": CLASSES,
            "backbone": {
                "class_path": "discrete_lit.backbones.Transformer",
                "init_args": {"width": 16, "depth": 2, "heads": 2},
            },
            "label_dropout": 0.3,
            "optimizer": OPTIMIZER,
            "scheduler": SCHEDULER,
        },
    }


def write_tokens(folder: Path, tokenizer: str, counts: dict[str, int]) -> None:
    """Write token arrays of noise, whose ids tell the label, below a folder."""
    module = from_checkpoint(tokenizer)
    random = torch.Generator().manual_seed(0)
    for split, count in counts.items():
        TokenWriter.create(
            folder / split,
            count=count,
            token_shape=module.token_shape(IMAGE_SIZE),
            vocab_size=module.vocab_size,
            image_size=IMAGE_SIZE,
            num_classes=CLASSES,
            classes=[str(label) for label in range(CLASSES)],
            tokenizer=module.fingerprint(),
            source="noise",
        )
        writer = TokenWriter(folder / split)
        labels = torch.arange(count) % CLASSES
        tokens = (
            torch.randint(3, (count, *module.token_shape(IMAGE_SIZE)), generator=random) + 3 * labels[:, None, None]
        )
        writer.write(torch.arange(count), tokens, labels)
        writer.close()
        TokenWriter.finalise(folder / split)


class Record(Callback):
    """What every batch was and gave, by its number in the run."""

    def __init__(self) -> None:
        self.batches: dict[int, tuple[float, list[int]]] = {}
        self.validation: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(trainer.callback_metrics["train/loss"])
        self.batches[trainer.fit_loop.total_batch_idx] = (loss, batch["index"].tolist())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validation[trainer.global_step] = float(trainer.callback_metrics["validation/loss"])


class Spoil(Callback):
    """Puts a pixel that is not a number into a batch of one rank."""

    def __init__(self, batch: int, rank: int) -> None:
        self.batch, self.rank = batch, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and trainer.global_rank == self.rank:
            batch["image"][0, 0, 0, 0] = float("nan")


class Encode(Callback):
    """Encodes every batch of a tokenizer once more, behind its step."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with as_in_validation(trainer, pl_module):
            self.tokens.append(pl_module.encode(batch["image"]))  # type: ignore[operator]


class Signal(Callback):
    """Sends a signal to one rank's own process, or to each, in the training step of a batch."""

    def __init__(self, number: int, batch: int, rank: int | None) -> None:
        self.number, self.batch, self.rank = number, batch, rank

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


def run(
    module: dict[str, Any],
    data: dict[str, Any],
    folder: str,
    ranks: int,
    strategy: str = "auto",
    resume: bool | str = False,
    send: dict[str, Any] | None = None,
    spoil: dict[str, Any] | None = None,
    average: bool = False,
    encode: bool = False,
    agree_every: int = 1,
    **settings: Any,
) -> dict[str, Any]:
    """Train for two epochs, or resume.

    Args:
        module: configuration of the LightningModule.
        data: class and arguments of the DataModule; its batch size is that of each rank.
        folder: of the run.
        ranks: processes.
        strategy: `"auto"`, `"ddp"`, `"fsdp"` or, with sharded checkpoints, `"sharded"`.
        resume: go on from the folder's last checkpoint, or from the file that it names.
        send: arguments of `Signal`.
        spoil: arguments of `Spoil`; such batches are skipped.
        average: keep averaged weights.
        encode: encode the batches of a tokenizer once more behind their steps.
        agree_every: steps from one agreement of the ranks whether to end to the next.
        settings: further arguments of the Trainer.
    """
    seed_everything(0, verbose=False)
    record = Record()
    keeper = ModelCheckpoint(Path(folder) / "checkpoints", every_n_train_steps=4, save_last=True, save_top_k=0)
    preemption = Preemption(every_n_batches=agree_every)
    grids, encoder = [SampleGrid(count=2), ReconstructionGrid(count=2)], Encode()
    callbacks: list[Callback] = [record, GradientNorm(), Throughput(), *grids, preemption, keeper]
    callbacks += [encoder] if encode else []
    callbacks += [Signal(**send)] if send else []
    callbacks += [ContinueExactly()] if resume else []
    callbacks += [Spoil(**spoil), TrainingGuard(on_nonfinite="skip")] if spoil else []
    callbacks += [ExponentialMovingAverage(0.5)] if average else []
    trainer = Trainer(
        **{"max_epochs": 2, "log_every_n_steps": 1, **settings},
        accelerator="cpu",
        devices=ranks,
        strategy={
            "fsdp": lambda: ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False),
            "sharded": FSDP2Strategy,
        }.get(strategy, lambda: strategy)(),
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="", version="log"),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    lightning_module = instantiate(module)
    datamodule = getattr(data_modules, data["class"])(**data["arguments"])
    status, error = None, None
    try:
        trainer.fit(lightning_module, datamodule=datamodule, ckpt_path="last" if resume is True else resume or None)
    except SystemExit as end:
        status = end.code
    except ValueError as problem:
        error = str(problem)
    return {
        "batches": record.batches,
        "validation": record.validation,
        "tokens": encoder.tokens,
        "status": status,
        "error": error,
        "weights": {} if strategy in ("fsdp", "sharded") else dict(lightning_module.state_dict()),
    }


def run_all(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run several one after the other: for `several_ranks.on_ranks`."""
    return [run(**keywords) for keywords in settings]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out, settings = sys.argv[1:]
    results = []
    for keywords in json.loads(Path(settings).read_text()):
        results.append(run(**keywords))
        torch.save(results, f"{out}.{os.environ['LOCAL_RANK']}")


def on_two_ranks(folder, *settings, expect_kill=False):
    """Run settings on two processes; each rank's results, in order."""
    folder.mkdir(exist_ok=True)
    file, out = folder / "settings.json", folder / "results"
    file.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(out), str(file)]
    logs = [folder / f"rank-{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as stream:
            environment = {**os.environ, **shared, "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    text = "\n".join(log.read_text()[-5000:] for log in logs)
    assert codes == ([-signal.SIGKILL] * 2 if expect_kill else [0, 0]), text
    return [torch.load(f"{out}.{rank}") if Path(f"{out}.{rank}").exists() else None for rank in range(2)]


def joined(results):
    """Losses and indices of the global batches: `({batch: loss}, {batch: indices})`."""
    first, second = (result["batches"] for result in results)
    assert first.keys() == second.keys()
    for batch in first:
        assert first[batch][0] == second[batch][0], "the logged loss is the mean over ranks on both"
    losses = {batch: loss for batch, (loss, _) in first.items()}
    return losses, {batch: first[batch][1] + second[batch][1] for batch in first}


def alone(result):
    losses = {batch: loss for batch, (loss, _) in result["batches"].items()}
    return losses, {batch: indices for batch, (_, indices) in result["batches"].items()}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


if __name__ == "__main__":
    main()
