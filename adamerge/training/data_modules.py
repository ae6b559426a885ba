"""Data modules: calibration data as Lightning's ``Trainer`` takes them, made from the plain classes of ``adamerge.data``."""

from __future__ import annotations

from functools import cache
from types import new_class
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from adamerge.data import Calibration
from adamerge.data.loaders import on_device


class DataModule(Calibration, LightningDataModule):
    """Calibration data under Lightning; in public ``adamerge.Calibration``, which a user's own data derive from."""

    def __post_init__(self) -> None:
        """Begins as Lightning's data module and as calibration data: a plain class does not call Lightning's constructor."""
        LightningDataModule.__init__(self)
        super().__post_init__()

    @property
    def trainer(self) -> Trainer | None:
        """Returns the trainer of the fit, which is the loop that draws the batches."""
        return self.loop  # type: ignore[return-value]

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.loop = trainer

    def setup(self, stage: str) -> None:
        """Takes the preprocessing from the module that is being trained or tested."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if module is not None:
            self.serve(module.merged.backbone)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Returns the batch on the device; samples' numbers stay on the CPU, where they are read."""
        return on_device(batch, device)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Returns one loader per task that has a labelled validation split."""
        return [self.eval_dataloader(task, "validation") for task in self.labelled_tasks("validation")]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Returns one loader per task that has a labelled test split."""
        return [self.eval_dataloader(task, "test") for task in self.labelled_tasks("test")]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles data of a class that ``of`` made by the plain class, since no module holds the made one by name."""
        plain = type(self).__dict__.get("_plain")
        return super().__reduce_ex__(protocol) if plain is None else (_empty, (plain,), self.__dict__)


# configurations, errors and help call it by the plain class's name and words, as all that ``of`` makes
DataModule.__name__ = DataModule.__qualname__ = Calibration.__name__
DataModule.__doc__ = Calibration.__doc__


@cache
def of(kind: type[Calibration]) -> type[DataModule]:
    """Returns the data module of a plain class: of its name, derived from it and from ``adamerge.Calibration``.

    Args:
        kind: any class of calibration data; one that is a data module already is returned as it is.
    """
    if kind is Calibration:
        return DataModule
    if issubclass(kind, DataModule):
        return kind
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return new_class(kind.__name__, (kind, DataModule), exec_body=lambda body: body.update(named, _plain=kind))


def _empty(plain: type[Calibration]) -> DataModule:
    """Returns data of the class's data module whose state is still to be set, for unpickling."""
    made: Any = of(plain)
    return made.__new__(made)
