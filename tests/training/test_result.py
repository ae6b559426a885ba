"""The result of a fit is settled once: a step is chosen, then buffers are recomputed for it, whoever asks first."""

from types import SimpleNamespace

import pytest
from lightning import Callback, LightningModule, Trainer

from adamerge.training.result import Chooser, Result

from .test_descent import QUIET, images, module_of, w


class Stand(Chooser):
    """Notes when it was asked."""

    def __init__(self, notes, choice):
        self.notes, self.choice = notes, choice

    def choose(self, merged):
        self.notes.append("choose")
        return self.choice


@pytest.fixture
def place(monkeypatch):
    notes = []
    merged = SimpleNamespace(
        to=lambda device: notes.append(f"to {device}"), cpu=lambda: None, replace_buffers=lambda values: None
    )
    monkeypatch.setattr(
        "adamerge.training.result.recalibrate", lambda *given: notes.append("recalibrate") or {"buffers": "new"}
    )
    trainer = SimpleNamespace(callbacks=[Callback(), Stand(notes, {"step": 3})])
    return SimpleNamespace(notes=notes, merged=merged, trainer=trainer, strategy=SimpleNamespace(root_device="there"))


def test_each_is_done_once_and_the_next_fit_begins_anew(place):
    result = Result(place.merged, recalibrated=True)
    for _ in range(2):
        result.begin()
        assert result.choice == result.recalibration == {}
        for _ in range(3):
            result.choose(place.trainer)
            result.recalibrate(None, place.strategy)
        assert result.choice == {"step": 3} and result.recalibration == {"buffers": "new"}
    assert place.notes == ["choose", "to there", "recalibrate"] * 2


def test_buffers_stay_the_bases_where_nothing_is_wanted(place):
    result = Result(place.merged, recalibrated=False)
    result.recalibrate(None, place.strategy)
    assert not place.notes and not result.recalibration


class Puts(Callback, Chooser):
    """Chooses coefficients of 0.5."""

    def choose(self, merged):
        merged.parametrization.w.data.fill_(0.5)
        return {"step": 1}


class Reads(Callback):
    """Looks at the coefficients where it is called, as what writes the file does."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.finish()
        self.seen = w(pl_module).clone()


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_callbacks_does_not_matter(first, pool, image_folders):
    module, reads = module_of(pool), Reads()
    callbacks = [Puts(), reads] if first else [reads, Puts()]
    trainer = Trainer(max_steps=2, max_epochs=1, limit_val_batches=0, callbacks=callbacks, **QUIET)
    trainer.fit(module, images(image_folders))
    assert (reads.seen == 0.5).all() and module.coefficients().step == 1
