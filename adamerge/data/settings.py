"""Settings: the arguments that all kinds of calibration data share, in one place, refused where they are out of range."""

from __future__ import annotations

from dataclasses import dataclass

from adamerge.errors import ConfigError


@dataclass(eq=False, kw_only=True)
class CalibrationSettings:
    """The settings that all calibration data have, whatever their samples are.

    Args:
        batch_size: samples per task and step, over all processes.
        seed: of the order of batches, of samples that are drawn, and of splits that are unless ``splits_seed`` is given.
        transductive: calibrate on the inputs of the test split, as the papers do; written into the summary and the card.
        labelled: hand the labels to the objective; needed by labelled objectives, refused by the others.
        calibration_samples: use so many of each task's calibration samples; all when None.
        train_samples: calibrate on so many samples of each task's train split too, or on all there are where that is less.
        eval_batch_size: samples per batch in validation and test.
        workers: processes that decode; 0 decodes in the main process.
        shots: calibrate on so many samples of each class, drawn by ``seed``; needs ``labelled``.
        only: calibrate and validate on these tasks alone, though the pool has experts of others; all when None.
        unusable_share: of a split's rows that may be skipped because nothing can be made of them.
        splits_seed: of splits that are drawn, where other seeds shall keep them; ``seed`` when None.
        held_out: share of each task's calibration inputs that no step sees, drawn by ``seed``: at least 32 of a task, at most
            half of them. A step can be chosen by them without labels. With 0 a fit sees all.

    Raises:
        ConfigError: a number is out of range, shots of data whose labels may not be read or that are held out, or samples of
            train beside the papers' transductive setting.
    """

    batch_size: int = 16
    seed: int = 0
    transductive: bool = False
    labelled: bool = False
    calibration_samples: int | None = None
    train_samples: int = 0
    eval_batch_size: int = 256
    workers: int = 0
    shots: int | None = None
    only: list[str] | None = None
    unusable_share: float = 0.05
    splits_seed: int | None = None
    held_out: float = 0.0

    def __post_init__(self) -> None:
        """Refuses numbers out of range, before any data set is opened."""
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("workers", 0), ("train_samples", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"data: {name} must be at least {least}, got {getattr(self, name)}")
        for name in ("calibration_samples", "shots"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"data: {name} must be at least 1, got {getattr(self, name)}")
        if self.shots is not None and not self.labelled:
            raise ConfigError(
                "data: shots are chosen by their labels, which an unlabelled objective may not use",
                expected="labelled: true, or calibration_samples instead of shots",
                got="labelled: false",
            )
        if not 0 <= self.held_out <= 0.5:
            raise ConfigError(f"data: held_out must be from 0 to 0.5, got {self.held_out}")
        if self.shots is not None and self.held_out:
            raise ConfigError(
                "data: of few samples of each class none are held out: a class would lose all of its own",
                expected="shots or held_out",
                got=f"shots: {self.shots}, held_out: {self.held_out}",
            )
        if self.transductive and self.train_samples:
            raise ConfigError(
                "data: transductive calibrates on the test split's inputs alone, and train_samples adds others",
                expected="one of them",
                got=f"transductive: true, train_samples: {self.train_samples}",
            )
        if not 0 <= self.unusable_share <= 1:
            raise ConfigError(f"data: unusable_share must be from 0 to 1, got {self.unusable_share}")
