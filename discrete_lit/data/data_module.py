"""A DataModule that resumes exactly: the base of all, with loaders of its splits and a state that survives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning import LightningDataModule

from discrete_lit.core import distributed
from discrete_lit.core.images import pixels_as_floats
from discrete_lit.data.loaders import BatchSource, EvaluationLoader, TrainingLoader

Split = Literal["train", "validation"]
# Far above what anybody uses. The workers are processes, and each takes some hundred megabytes.
_LARGEST_BATCH, _MOST_WORKERS, _LARGEST_SEED = 2**24, 512, 2**63 - 1


class ResumableDataModule(LightningDataModule, ABC):
    """A DataModule whose training continues exactly, in the middle of an epoch.

    The state of the training loader is written twice: by Lightning as the loader's, and here as the DataModule's.
    Lightning forgets the first where the model reads `trainer.estimated_stepping_batches`
    (Lightning-AI/pytorch-lightning#20550).

    Args:
        train: where the training split is.
        validation: where the validation split is.
        batch_size: samples of a batch on each rank.
        num_workers: processes that load; 0 loads in the training process.
        seed: decides the order and the augmentation.
        max_bad_fraction: fraction of a split's samples that may be unreadable before a run fails.
        persistent_workers: keep the processes between epochs.
    """

    modality: ClassVar[Literal["image", "audio", "video"]] = "image"
    """The kind of its samples, and the name that they have in a batch, unless they were encoded."""

    def __init__(
        self,
        train: str | list[str] | None,
        validation: str | list[str] | None,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        max_bad_fraction: float,
        persistent_workers: bool,
    ):
        super().__init__()
        self.locations: dict[Split, Any] = {"train": train, "validation": validation}
        if train is None and validation is None:
            raise ValueError(f"{type(self).__name__} was given no data: set `train`, `validation` or both")
        for name, value, least, most in (
            ("batch_size", batch_size, 1, _LARGEST_BATCH),
            ("num_workers", num_workers, 0, _MOST_WORKERS),
            ("seed", seed, 0, _LARGEST_SEED),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must be in {least}..{most:,}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {max_bad_fraction}; it must be between 0 and 1")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.persistent_workers = persistent_workers
        # A small validation set on many ranks leaves some of them without a batch, which is not an error.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._training_loader: TrainingLoader | None = None
        self._saved_state: Mapping[str, Any] | None = None

    def has_split(self, split: Split) -> bool:
        """Whether the DataModule was given this split."""
        return self.locations[split] is not None

    @abstractmethod
    def training_source(self, rank: int, world_size: int) -> BatchSource:
        """The training batches of a rank."""

    @abstractmethod
    def evaluation_source(self, split: Split, rank: int, world_size: int) -> BatchSource:
        """Every sample of a split, for one rank."""

    def training_loader(self, rank: int | None = None, world_size: int | None = None) -> TrainingLoader:
        """The training batches of one rank; of this process by default."""
        self._require("train")
        source = self.training_source(*self._rank(rank, world_size))
        accumulated = self.trainer.accumulate_grad_batches if self.trainer else 1
        return TrainingLoader(
            source,
            self.num_workers,
            max_bad_fraction=self.max_bad_fraction,
            persistent_workers=self.persistent_workers,
            start_epoch=self.trainer.current_epoch if self.trainer else 0,
            batches_per_epoch=self._trainer_limit(source.batches // accumulated * accumulated),
            repeat_epoch=bool(getattr(self.trainer, "overfit_batches", 0)),
            accumulated=accumulated,
        )

    def evaluation_loader(
        self,
        split: Split,
        rank: int | None = None,
        world_size: int | None = None,
        max_bad_fraction: float | None = None,
    ) -> EvaluationLoader:
        """Every sample of `split` once over all ranks, in evaluation mode; `index` is its position in the split.

        Args:
            split: train or validation.
            rank: by default, this process's.
            world_size: by default, this process's.
            max_bad_fraction: by default, the DataModule's; 0 where no sample may be missing.
        """
        self._require(split)
        source = self.evaluation_source(split, *self._rank(rank, world_size))
        accepted = self.max_bad_fraction if max_bad_fraction is None else max_bad_fraction
        return EvaluationLoader(source, self.num_workers, max_bad_fraction=accepted)

    def train_dataloader(self) -> TrainingLoader:
        loader = self.training_loader()
        if self._saved_state is not None:
            loader.load_state_dict(self._saved_state)
            self._saved_state = None
        self._training_loader = loader
        return loader

    def val_dataloader(self) -> EvaluationLoader | list:
        return self._shared(self.evaluation_loader("validation")) if self.has_split("validation") else []

    def test_dataloader(self) -> EvaluationLoader:
        return self._shared(self.evaluation_loader("validation"))

    def predict_dataloader(self) -> EvaluationLoader:
        return self.evaluation_loader("validation" if self.has_split("validation") else "train")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return pixels_as_floats(batch)

    def state_dict(self) -> dict[str, Any]:
        return self._training_loader.state_dict() if self._training_loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_state = state_dict or None

    def training_source_of(self, state: Mapping[str, Any] | None, rank: int, world_size: int) -> BatchSource:
        """The training batches of a rank in the order of a run that saved a state; None is a run of these settings."""
        source = self.training_source(rank, world_size)
        if state and (layout := state.get("layout")):
            source.follow(layout)
        return source

    @property
    def resumed_batches(self) -> int:
        """Batches of today's size that a resumed training had taken of its epoch; 0 between two epochs."""
        return self._training_loader.consumed if self._training_loader else 0

    def setup(self, stage: str) -> None:
        # Lightning calls this before it loads a checkpoint, so a state that an earlier `validate` loaded ends here.
        self._saved_state = None

    def _require(self, split: Split) -> None:
        if split not in ("train", "validation"):
            raise ValueError(f"split {split!r} is not known; it is 'train' or 'validation'")
        if not self.has_split(split):
            raise ValueError(f"{type(self).__name__} was given no {split} data: set its `{split}` argument")

    def _shared(self, loader: EvaluationLoader) -> EvaluationLoader:
        """Refuse a loader that is empty on one rank: Lightning leaves that rank out, and the others wait for it."""
        samples = distributed.gather_objects(loader.source.samples)
        if 0 in samples and any(samples):
            raise ValueError(
                f"the validation data has {sum(samples):,} samples, and {samples.count(0)} of the {len(samples)} ranks "
                "get none of them: use fewer ranks (trainer.devices), or more validation data"
            )
        return loader

    def _rank(self, rank: int | None, world_size: int | None) -> tuple[int, int]:
        if rank is not None and world_size is not None:
            return rank, world_size
        # With tensor parallelism several processes share a batch, and only the strategy knows which.
        if self.trainer and (replicas := self.trainer.distributed_sampler_kwargs):
            return replicas["rank"], replicas["num_replicas"]
        return distributed.rank(), distributed.world_size()

    def _trainer_limit(self, batches: int) -> int:
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return int(batches * limit) if isinstance(limit, float) else min(batches, limit)
