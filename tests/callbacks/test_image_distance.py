"""The distance while training: by hand, on averaged weights, on any ranks, and a training that is not touched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.means_extractor import ColourMeans
from helpers.several_ranks import on_ranks
from helpers.stored_images import pixels, save_folder
from helpers.synthetic_data import SyntheticImages
from helpers.tiny_runs import TOKENIZER
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from discrete_lit.callbacks import ExponentialMovingAverage, ImageDistance
from discrete_lit.checkpoints import instantiate
from discrete_lit.core.images import to_uint8
from discrete_lit.data import ImageFolder
from discrete_lit.evaluation.feature_statistics import FeatureMeter, Measurement
from discrete_lit.metrics.frechet import frechet_distance
from discrete_lit.metrics.moments import Moments
from discrete_lit.metrics.precision_recall import Manifold, precision_and_recall


@pytest.fixture
def reference(tmp_path: Path) -> str:
    """24 images of four classes."""
    return save_folder(tmp_path / "reference", pixels(24, 0), np.arange(24) % 4)


def statistics(images: Tensor) -> Measurement:
    meter = FeatureMeter(ColourMeans(), len(images))
    meter.update(images, None, torch.arange(len(images)))
    return meter.measurement()


def stored(reference: str) -> Tensor:
    order = np.argsort(np.arange(24) % 4, kind="stable")
    return torch.from_numpy(pixels(24, 0)[order]).movedim(-1, 1)


def samples(generator: Any, count: int, seed: int = 0) -> Tensor:
    generator.eval()
    labels = torch.arange(count) % generator.num_classes
    return to_uint8(generator.tokenizer.decode(generator.sample(labels, seed=seed)))


def test_samples_every_n_steps_and_in_validation(generator, make_trainer, make_loader, read_scalars, reference) -> None:
    callback = ImageDistance(reference, 10, extractor=ColourMeans(), every_n_steps=2, batch_size=4, seed=3)
    watched = Images()
    watched.watch(callback)
    trainer = make_trainer(
        callbacks=[callback], max_steps=4, log_every_n_steps=50, val_check_interval=4, limit_val_batches=1
    )
    trainer.fit(generator, make_loader(4), make_loader(1))
    name = "validation/gFD-Means_10"
    logged = read_scalars(name)
    assert list(logged) == [1, 3]  # as the logger counts steps, from 0
    assert watched.batches == 2 * 3  # the validation behind step 4 draws nothing again

    made, real = statistics(samples(generator, 10, seed=3)), statistics(stored(reference))
    assert logged[3] == pytest.approx(frechet_distance(made.moments, real.moments), rel=1e-5)
    assert logged[1] != logged[3]
    mean = (made.moments.mean - real.moments.mean).square().sum()
    assert read_scalars(f"{name}_mean_term")[3] == pytest.approx(float(mean), rel=1e-5)
    assert read_scalars(f"{name}_covariance_term")[3] == pytest.approx(logged[3] - float(mean), rel=1e-4)
    precision, recall = precision_and_recall(made.features, Manifold(real.features, 3))
    assert read_scalars("validation/gprecision-Means_10")[3] == pytest.approx(precision)
    assert read_scalars("validation/grecall-Means_10")[3] == pytest.approx(recall)
    kept = (Path(trainer.default_root_dir) / "references").iterdir()
    assert sorted(file.name.partition(".")[2] for file in kept) == ["features.npy", "npz", "radii-3.npy"]


class Follow(Callback):
    """The weights and the next random number behind every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.modes: list[list[bool]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.modes.append([part.training for part in pl_module.modules()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.weights.append({**state, "random": torch.get_rng_state()})


def test_training_is_not_touched_and_checkpoints_do_not_grow(
    tokenizer, make_trainer, make_loader, reference, tmp_path
) -> None:
    runs = []
    for measured in (False, True):
        seed_everything(0, verbose=False)
        module = make_masked(tokenizer)
        follow = Follow()
        callbacks: list[Callback] = [follow, ExponentialMovingAverage(0.5)]
        if measured:
            callbacks.insert(0, ImageDistance(reference, 6, extractor=ColourMeans(), every_n_steps=1))
        trainer = make_trainer(callbacks=callbacks, max_steps=4, val_check_interval=2, limit_val_batches=1)
        trainer.fit(module, make_loader(4), make_loader(1))
        trainer.save_checkpoint(tmp_path / f"{measured}.ckpt")
        runs.append((follow, torch.load(tmp_path / f"{measured}.ckpt", weights_only=True)))
    (plain, saved), (watched, also_saved) = runs
    assert plain.modes == watched.modes
    for before, after in zip(plain.weights, watched.weights, strict=True):
        assert all(torch.equal(after[name], value) for name, value in before.items())
    assert also_saved["state_dict"].keys() == saved["state_dict"].keys() and also_saved.keys() == saved.keys()
    sizes = [(tmp_path / f"{measured}.ckpt").stat().st_size for measured in (False, True)]
    assert abs(sizes[1] - sizes[0]) < 1000


def make_masked(tokenizer: Any) -> Any:
    from functools import partial

    from discrete_lit.backbones import Transformer
    from discrete_lit.generators import Masked

    return Masked(
        tokenizer,
        8,
        num_classes=4,
        backbone=partial(Transformer, width=16, depth=2, heads=2),
        optimizer=partial(torch.optim.SGD, lr=0.5),
    )


def test_the_averaged_weights_are_measured(tokenizer, make_trainer, make_loader, read_scalars, reference) -> None:
    seed_everything(0, verbose=False)
    module = make_masked(tokenizer)
    for parameter in module.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    callbacks = [
        ImageDistance(reference, 8, extractor=ColourMeans(), every_n_steps=3),
        ExponentialMovingAverage(0.9, warmup=False),
    ]
    follow = Follow()
    trainer = make_trainer(callbacks=[*callbacks, follow], max_steps=3, limit_val_batches=0)
    trainer.fit(module, make_loader(3))
    real = statistics(stored(reference)).moments
    averaged = frechet_distance(statistics(samples(module, 8)).moments, real)  # which it has after training
    raw = {name: value for name, value in follow.weights[-1].items() if name != "random"}
    module.load_state_dict(raw)
    assert read_scalars("validation/gFD-Means_8")[2] == pytest.approx(averaged, rel=1e-5)
    assert frechet_distance(statistics(samples(module, 8)).moments, real) != pytest.approx(averaged, rel=1e-5)


def test_the_best_is_kept_by_it(tokenizer, make_trainer, make_loader, read_scalars, reference, tmp_path) -> None:
    module = make_masked(tokenizer)
    keeper = ModelCheckpoint(
        tmp_path / "best", monitor="validation/gFD-Means_8", every_n_train_steps=1, filename="{step}"
    )
    distance = ImageDistance(reference, 8, extractor=ColourMeans(), every_n_steps=1)
    trainer = make_trainer(callbacks=[keeper, distance], max_steps=4, limit_val_batches=0, enable_checkpointing=True)
    trainer.fit(module, make_loader(4))
    logged = read_scalars("validation/gFD-Means_8")
    assert len(logged) == 4 and len(set(logged.values())) > 1
    assert Path(keeper.best_model_path).stem == f"step={min(logged, key=lambda step: logged[step]) + 1}"


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_logs_what_the_whole_one_does(
    tokenizer, make_trainer, make_loader, read_scalars, reference, tmp_path
) -> None:
    logged = []
    batches = DataLoader(list(make_loader(1)) * 4, batch_size=None)  # equal ones: a plain loader begins anew
    for steps, resumed in ((4, None), (2, None), (4, tmp_path / "2.ckpt")):
        seed_everything(0, verbose=False)
        distance = ImageDistance(reference, 8, extractor=ColourMeans(), every_n_steps=1)
        trainer = make_trainer(
            callbacks=[ExponentialMovingAverage(0.5), distance], max_steps=steps, limit_val_batches=0
        )
        trainer.fit(make_masked(tokenizer), batches, ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        logged.append(float(trainer.callback_metrics["validation/gFD-Means_8"]))
    assert logged[0] == logged[2] != logged[1]


def test_reconstructions_of_the_validation_batches(tokenizer, make_trainer, make_loader, read_scalars) -> None:
    trainer = make_trainer(callbacks=[ImageDistance(extractor=ColourMeans())], max_epochs=2)
    trainer.fit(tokenizer, make_loader(2), make_loader(3))
    logged = read_scalars("validation/rFD-Means_18")
    tokenizer.eval()
    with torch.no_grad():
        images = torch.cat([batch["image"] for batch in make_loader(3)])
        rebuilt = tokenizer.decode(tokenizer.encode(images))
    expected = frechet_distance(statistics(to_uint8(rebuilt)).moments, statistics(to_uint8(images)).moments)
    assert len(logged) == 2 and logged[max(logged)] == pytest.approx(expected, rel=1e-4)
    assert logged[max(logged)] != logged[min(logged)]


def test_reconstructions_of_the_reference(tokenizer, make_trainer, make_loader, read_scalars, reference) -> None:
    callback = ImageDistance(
        reference, extractor=ColourMeans(), every_n_steps=1, num_reference=12, image_size=8, batch_size=5
    )
    trainer = make_trainer(callbacks=[callback], max_steps=1, limit_val_batches=0)
    trainer.fit(tokenizer, make_loader(1))
    images = stored(reference)[[0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20]]
    tokenizer.eval()
    with torch.no_grad():
        rebuilt = to_uint8(tokenizer.decode(tokenizer.encode(images.float() / 127.5 - 1)))
    expected = frechet_distance(statistics(rebuilt).moments, statistics(images).moments)
    assert read_scalars("validation/rFD-Means_12")[0] == pytest.approx(expected, rel=1e-4)
    assert 0 <= read_scalars("validation/rprecision-Means_12")[0] <= 1


def test_validate_and_test_measure_too(tokenizer, make_trainer, make_loader, reference, tmp_path) -> None:
    module = make_masked(tokenizer)
    callback = ImageDistance(reference, 8, extractor=ColourMeans())
    (validated,) = make_trainer(callbacks=[callback]).validate(module, make_loader(1), verbose=False)
    (tested,) = make_trainer(callbacks=[callback]).test(module, make_loader(1), verbose=False)
    expected = frechet_distance(statistics(samples(module, 8)).moments, statistics(stored(reference)).moments)
    assert validated["validation/gFD-Means_8"] == tested["test/gFD-Means_8"] == pytest.approx(expected, rel=1e-5)

    real = statistics(stored(reference)).moments
    real.save(tmp_path / "moments.npz")
    callback = ImageDistance(str(tmp_path / "moments.npz"), 8, extractor=ColourMeans())
    (moments,) = make_trainer(callbacks=[callback]).validate(module, make_loader(1), verbose=False)
    assert moments["validation/gFD-Means_8"] == pytest.approx(expected, rel=1e-5)
    assert "validation/gprecision-Means_8" not in moments


def test_mistakes_are_refused(tokenizer, make_trainer, make_loader, reference, tmp_path) -> None:
    with pytest.raises(ValueError, match="num_samples of at least 2"):
        ImageDistance(num_samples=1)
    with pytest.raises(ValueError, match="every_n_steps=5 of ImageDistance measures outside of validation"):
        ImageDistance(every_n_steps=5)
    module = make_masked(tokenizer)

    def validate(callback: ImageDistance, validated: Any = module, batches: Any = None) -> None:
        make_trainer(callbacks=[callback]).validate(validated, batches or make_loader(1), verbose=False)

    with pytest.raises(ValueError, match="'missing' is no image set"):
        validate(ImageDistance("missing", extractor=ColourMeans()))
    with pytest.raises(ValueError, match=r"needs the image_size of reference="):
        validate(ImageDistance(reference, extractor=ColourMeans()), tokenizer)
    Moments(torch.zeros(4).double(), torch.eye(4).double()).save(tmp_path / "m.npz")
    with pytest.raises(ValueError, match=r"m\.npz' has 4 features, Means gives 6"):
        validate(ImageDistance(str(tmp_path / "m.npz"), extractor=ColourMeans()))
    statistics(stored(reference)).moments.save(tmp_path / "moments.npz")
    with pytest.raises(ValueError, match="has no images to reconstruct every 2 steps"):
        validate(ImageDistance(str(tmp_path / "moments.npz"), extractor=ColourMeans(), every_n_steps=2), tokenizer)
    with pytest.raises(ValueError, match="samples are of 8x8 pixels, image_size of the reference is 16x16"):
        validate(ImageDistance(reference, 4, extractor=ColourMeans(), image_size=16))
    tokens = [{"tokens": torch.zeros(2, 4, 4, dtype=torch.int64), "label": torch.zeros(2, dtype=torch.int64)}]
    with pytest.raises(ValueError, match="and these hold none: give reference"):
        validate(ImageDistance(extractor=ColourMeans(), num_samples=4), batches=DataLoader(tokens, batch_size=None))


# Several ranks.


class Images(Callback):
    """Hashes the images that are measured, by their numbers."""

    def __init__(self) -> None:
        self.seen: dict[int, bytes] = {}
        self.batches = 0

    def watch(self, distance: ImageDistance) -> None:
        draw = distance._draw

        def watched(module: Any, indices: Tensor) -> Tensor:
            images = draw(module, indices)
            self.batches += 1
            self.seen |= {int(i): image.numpy().tobytes() for i, image in zip(indices, images, strict=True)}
            return images

        distance._draw = watched


def train(config: dict[str, Any], reference: str, folder: str, ranks: int, strategy: str = "auto") -> dict[str, Any]:
    """Train a Masked for two steps with a distance behind each and in validation."""
    seed_everything(0, verbose=False)
    module = instantiate(config)
    for parameter in module.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    distance = ImageDistance(reference, 10, extractor=ColourMeans(), every_n_steps=1, batch_size=5)
    watched = Images()
    watched.watch(distance)
    sharded = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=sharded if strategy == "fsdp" else strategy,
        callbacks=[distance, ExponentialMovingAverage(0.5)],
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version="log"),
        max_steps=2,
        limit_val_batches=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, SyntheticImages(count=8, batch_size=4, num_classes=3))
    return {
        "images": watched.seen,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items() if "Means" in name},
    }


def evaluate_on_data(configs: list[dict[str, Any]], folder: str, ranks: int, count: int) -> dict[str, float]:
    """Validate and test modules on images of the data alone, with the distance of their reconstructions."""
    found: dict[str, float] = {}
    for number, config in enumerate(configs):
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            callbacks=[ImageDistance(extractor=ColourMeans())],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        images = save_folder(Path(folder) / f"images{trainer.global_rank}", pixels(count, 4), np.arange(count) % 2)
        data = ImageFolder(images, images, image_size=8, batch_size=2, num_workers=0)
        seed_everything(0, verbose=False)
        module = instantiate(config)
        for run in (trainer.validate, trainer.test):
            (logged,) = run(module, data, verbose=False)
            found |= {f"{number} {name}": value for name, value in logged.items()}
    return found


@pytest.mark.slow
@pytest.mark.ddp
def test_figures_of_the_data_on_three_ranks(tmp_path: Path) -> None:
    """Seven images: the last rank has three. Two images: one rank has none, and all say so instead of waiting."""
    classifier = {"num_classes": 2, "channels": [4, 8]}
    classifier = {"class_path": "discrete_lit.evaluation.classifier.ImageClassifier", "init_args": classifier}
    configs = [TOKENIZER["model"], classifier]
    alone = evaluate_on_data(configs, str(tmp_path / "one"), 1, 7)
    several = on_ranks(3, evaluate_on_data, tmp_path / "b", configs, str(tmp_path / "three"), 3, 7)
    for found in several:
        assert found == pytest.approx(alone, rel=1e-5)
    names = {"rFD-Means_7", "rFD-Means_7_mean_term", "psnr", "codebook_usage"}
    assert {f"0 {stage}/{name}" for stage in ("validation", "test") for name in names} < set(alone)
    assert {"1 validation/accuracy", "1 test/accuracy"} < set(alone)
    with pytest.raises(AssertionError, match=r"has 2 samples, and 1 of the 3 ranks get none"):
        on_ranks(3, evaluate_on_data, tmp_path / "c", configs[:1], str(tmp_path / "few"), 3, 2)


def masked_config(tmp_path: Path, rate: float = 0.0) -> dict[str, Any]:
    from discrete_lit.checkpoints import save

    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {"channels": 4, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2},
    }
    tokenizer = {"class_path": "discrete_lit.tokenizers.FSQ", "init_args": {"levels": [4, 3], "network": network}}
    save(instantiate(tokenizer), tmp_path / "tokenizer.ckpt")
    frozen = {
        "class_path": "discrete_lit.tokenizers.from_checkpoint",
        "init_args": {"checkpoint": str(tmp_path / "tokenizer.ckpt")},
    }
    backbone = {
        "class_path": "discrete_lit.backbones.Transformer",
        "init_args": {"width": 16, "depth": 2, "heads": 2},
    }
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": rate, "momentum": 0.5}}
    arguments = {"tokenizer": frozen, "image_size": 8, "num_classes": 3, "backbone": backbone, "optimizer": optimizer}
    return json.loads(json.dumps({"class_path": "discrete_lit.generators.Masked", "init_args": arguments}))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ddp"), (3, "ddp"), (3, "fsdp")])
def test_the_same_images_and_figures_on_several_ranks(
    tmp_path: Path, reference: str, ranks: int, strategy: str
) -> None:
    """Ten samples in two batches: of three ranks one has none. Nothing is learned, so the weights are the same."""
    config = masked_config(tmp_path)
    (alone,) = on_ranks(1, train, tmp_path / "a", config, reference, str(tmp_path / "one"), 1)
    several = on_ranks(ranks, train, tmp_path / "b", config, reference, str(tmp_path / "several"), ranks, strategy)
    images = {number: image for result in several for number, image in result["images"].items()}
    assert images == alone["images"] and len(images) == 10
    for result in several:
        assert result["metrics"] == several[0]["metrics"]  # to the bit, or ranks would keep different checkpoints
        assert result["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
    assert "validation/grecall-Means_10" in alone["metrics"]


def train_averages(config: dict[str, Any], reference: str, folder: str, ranks: int) -> dict[str, Any]:
    """Train a Masked for four steps on averaged weights, every rank on the same batches.

    Of several ranks each has a shard of the weights; these resume, and validate a checkpoint, too.
    """
    batch = next(iter(SyntheticImages(batch_size=4, num_classes=3).train_dataloader()))
    data: Any = DataLoader([batch] * 4, batch_size=None)  # equal ones: a plain loader begins anew

    def run(name: str, steps: int, resumed: str | None = None, precision: str = "32-true") -> tuple[Trainer, Any]:
        seed_everything(0, verbose=False)
        keeper = ModelCheckpoint(f"{folder}/{name}", every_n_train_steps=2, save_top_k=-1, filename="{step}")
        sharded = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False)
        trainer = Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy=sharded if ranks > 1 else "auto",
            precision=precision,  # type: ignore[arg-type]
            callbacks=[keeper, ImageDistance(reference, 10, extractor=ColourMeans()), ExponentialMovingAverage(0.7)],
            default_root_dir=folder,
            logger=False,
            max_steps=steps,
            val_check_interval=2,
            limit_val_batches=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        module = instantiate(config)
        for parameter in module.backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        if steps:
            trainer.fit(module, data, data, ckpt_path=resumed)
        return trainer, module

    found: dict[str, Any] = {}
    runs = [("whole", 4, None), ("begun", 2, None), ("resumed", 4, f"{folder}/begun/step=2.ckpt")]
    for name, steps, resumed in runs if ranks > 1 else runs[:2]:
        trainer, module = run(name, steps, resumed)
        found[name] = float(trainer.callback_metrics["validation/gFD-Means_10"])
        found[f"loss {name}"] = float(trainer.callback_metrics["validation/loss"])
        trainer.strategy.barrier()
        file = f"{folder}/{name}/step={steps}.ckpt"
        found[f"file {name}"] = torch.load(file, weights_only=True) if trainer.is_global_zero else {}
    if ranks == 1:
        return found
    trainer, module = run("validated", 0)
    (again,) = trainer.validate(module, data, ckpt_path=f"{folder}/whole/step=4.ckpt", verbose=False)
    found["validated"] = again["validation/gFD-Means_10"]
    try:
        run("half", 1, precision="bf16-true")
    except ValueError as error:
        found["half"] = str(error)
    return found


@pytest.mark.slow
@pytest.mark.ddp
def test_averages_of_sharded_weights_are_measured_kept_and_resumed(tmp_path: Path, reference: str) -> None:
    config = masked_config(tmp_path, rate=0.5)
    (alone,) = on_ranks(1, train_averages, tmp_path / "a", config, reference, str(tmp_path / "one"), 1)
    several = on_ranks(2, train_averages, tmp_path / "b", config, reference, str(tmp_path / "two"), 2)
    for result in several:
        for name in ("whole", "begun", "loss whole", "loss begun"):
            assert result[name] == pytest.approx(alone[name], rel=1e-4), name
        assert result["whole"] == result["resumed"] == result["validated"]
        assert "is sharded and of torch.bfloat16" in result["half"]
    assert alone["whole"] != alone["begun"]

    whole, resumed, one = several[0]["file whole"], several[0]["file resumed"], alone["file whole"]
    for part in ("state_dict", "current_model_state"):  # the averages, and the raw weights
        assert whole[part].keys() == one[part].keys()
        torch.testing.assert_close(whole[part], one[part], rtol=1e-4, atol=1e-6)
        assert all(torch.equal(value, whole[part][name]) for name, value in resumed[part].items())
    moved = [n for n, value in whole["state_dict"].items() if not torch.equal(value, whole["current_model_state"][n])]
    assert all(any(n.startswith(f"backbone.{part}") for n in moved) for part in ("blocks", "head"))
