"""Progress bar: steps, rate and time left are those of the whole fit, over its epochs and after a resume."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from lora_gan.callbacks.progress import StepProgressBar, total_steps


class Slow(L.Callback):
    """Each step takes a tenth of a second; notes what the bar says after it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        time.sleep(0.1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (bar,) = (callback for callback in trainer.callbacks if isinstance(callback, StepProgressBar))  # type: ignore[attr-defined]
        self.seen.append(bar.train_progress_bar.format_dict | {"text": str(bar.train_progress_bar)})


def fit(slow: Slow, checkpoint: str | None = None, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        limit_train_batches=3,
        limit_val_batches=0,
        logger=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[StepProgressBar(), slow],
        **settings,
    )
    trainer.fit(BoringModel(), ckpt_path=checkpoint)
    return trainer


@pytest.fixture(autouse=True)
def _here(work_in: Any) -> None: ...


def test_the_time_left_counts_from_the_start_of_the_fit_in_every_epoch() -> None:
    """Three steps an epoch at 0.1 s: 12 of 30 take 1.2 s, 18 are left; counted from the epoch's start it were 8 s."""
    slow = Slow()
    fit(slow, max_steps=30, max_epochs=4, enable_checkpointing=False)
    assert [(each["n"], each["initial"], each["total"]) for each in slow.seen] == [(n, 0, 12) for n in (3, 6, 9, 12)]
    last = slow.seen[-1]
    assert last["n"] / last["elapsed"] == pytest.approx(10, rel=0.4), "steps per second"


def test_after_a_resume_the_rate_counts_the_new_steps_only() -> None:
    trainer = fit(Slow(), max_epochs=1)
    slow = Slow()
    fit(slow, trainer.checkpoint_callback.best_model_path, max_epochs=3)  # type: ignore[union-attr]
    assert [(each["n"], each["initial"], each["total"]) for each in slow.seen] == [(6, 3, 9), (9, 3, 9)]


def test_slow_steps_are_shown_in_seconds() -> None:
    bar = StepProgressBar()
    shown = bar.init_train_tqdm()
    shown.total, shown.n, shown.start_t = 10, 5, shown._time() - 225
    assert "45.00s/step" in str(shown) and "03:45<03:45" in str(shown)


@pytest.mark.parametrize(
    ("settings", "end"),
    [({"max_steps": 7, "max_epochs": -1}, 7), ({"max_epochs": 2}, 6), ({"max_steps": 5, "max_epochs": 9}, 5)],
)
def test_the_end_of_a_fit(settings: dict[str, int], end: int) -> None:
    seen: list[int | None] = []

    class Note(Slow):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            seen.append(total_steps(trainer))

    fit(Note(), enable_checkpointing=False, **settings)
    assert set(seen) == {end}
