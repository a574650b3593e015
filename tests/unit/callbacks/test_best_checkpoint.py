"""Best checkpoint: which validation it keeps, by which metric, and what a resumed or moved run makes of it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_gan.callbacks import BestCheckpoint
from lora_gan.callbacks.best_checkpoint import ANSWER, EXACT, LOSS, REWARD
from lora_gan.errors import LoraGANError


class Planned(L.LightningModule):
    """Logs the given values, one at each validation."""

    def __init__(self, **values: Sequence[float]) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.values = {name.replace("__", "/"): iter(given) for name, given in values.items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(batch).sum()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log_dict({name: next(values) for name, values in self.values.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: Planned, callback: BestCheckpoint, folder: Path, steps: int, ckpt_path: Path | None = None
) -> L.Trainer:
    """A validation after every step."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        max_epochs=-1,
        max_steps=steps,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = DataLoader(torch.ones(99, 1))
    trainer.fit(module, batches, DataLoader(torch.ones(1, 1)), ckpt_path=ckpt_path, weights_only=True)  # type: ignore[arg-type]
    return trainer


def best_of(folder: Path, steps: int = 3, **values: Sequence[float]) -> tuple[str, str]:
    """The metric chosen, and the files left."""
    callback = BestCheckpoint()
    fit(Planned(**values), callback, folder, steps)
    assert Path(callback.best_model_path).is_file()
    return str(callback.monitor), " ".join(path.name for path in (folder / "checkpoints").iterdir())


def test_exact_match_of_free_text_does_not_make_the_first_validation_the_best(tmp_path: Path) -> None:
    """N1: exact match is 0 at every validation, and ties kept the first."""
    found = best_of(tmp_path, text__exact_match=[0, 0.02, 0], validation__loss=[3.0, 2.0, 2.5])
    assert found == (LOSS, "best-2.ckpt"), "the smallest loss"


def test_short_answers_are_judged_by_exact_match(tmp_path: Path) -> None:
    values = {"text__exact_match": [0.05, 0.5, 0.5, 0.3, 0.0], "validation__loss": [1.0, 2.0, 3.0, 2.0, 0.5]}
    assert best_of(tmp_path, 5, **values) == (EXACT, "best-2.ckpt"), "the first of the equally good, and no other file"


def test_final_answers_decide_once_one_is_right(tmp_path: Path) -> None:
    values = {
        "text__exact_match": [0.5, 0.4, 0.3],
        "text__reward": [1.0, 2.0, 3.0],
        "validation__loss": [1.0, 2.0, 3.0],
    }
    assert best_of(tmp_path / "a", text__answer=[0.02, 0.05, 0.03], **values) == (ANSWER, "best-2.ckpt")
    assert best_of(tmp_path / "b", text__answer=[0, 0, 0], **values) == (EXACT, "best-1.ckpt")
    del values["text__exact_match"], values["text__reward"]
    assert best_of(tmp_path / "c", text__answer=[0, 0.01, 0], **values) == (ANSWER, "best-2.ckpt")


def test_without_a_target_the_reward_decides(tmp_path: Path) -> None:
    assert best_of(tmp_path, text__reward=[0.1, 0.3, 0.2]) == (REWARD, "best-2.ckpt")


def test_a_metric_that_does_not_move_keeps_the_newest_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lora_gan")
    assert best_of(tmp_path, text__exact_match=[0, 0, 0], text__reward=[0.0, 0.0, 0.0]) == (REWARD, "best-3.ckpt")
    assert "text/reward was 0.000 in all 3 validations, so the newest checkpoint counts as the best" in caplog.text


def test_nothing_to_choose_by_keeps_the_newest(tmp_path: Path) -> None:
    assert best_of(tmp_path, something__else=[3.0, 2.0, 1.0]) == ("None", "best-3.ckpt")


def test_a_monitor_that_is_not_logged_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        LoraGANError, match=r"'text/blue', the monitor of BestCheckpoint, was not logged; available: .*bleu"
    ):
        fit(Planned(text__bleu=[1.0]), BestCheckpoint("text/blue"), tmp_path, 1)


def test_a_given_monitor_has_a_mode(tmp_path: Path) -> None:
    callback = BestCheckpoint("mine", mode="min")
    fit(Planned(mine=[2.0, 1.0, 3.0]), callback, tmp_path, 3)
    assert Path(callback.best_model_path).name == "best-2.ckpt" and callback.best_model_score == 1
    with pytest.raises(LoraGANError, match="mode must be max or min, got 'most'"):
        BestCheckpoint("mine", mode="most")


# resume


def interrupted(folder: Path) -> Path:
    """A run of three steps, the best of which is the second."""
    fit(Planned(validation__loss=[3.0, 2.0, 2.5]), BestCheckpoint(), folder, 3).save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def resumed(folder: Path, last: Path, **values: Sequence[float]) -> BestCheckpoint:
    callback = BestCheckpoint()
    fit(Planned(**values), callback, folder, 4, last)
    return callback


def test_a_resumed_run_remembers_its_best(tmp_path: Path) -> None:
    callback = resumed(tmp_path, interrupted(tmp_path), validation__loss=[2.2])
    assert callback.best_model_path == str(tmp_path / "checkpoints" / "best-2.ckpt")
    assert callback.validations == 4 and callback.best_model_score == 2


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_run_has_its_best_in_its_own_folder(tmp_path: Path, how: Any) -> None:
    """B4: the path of the old folder was used, or the file of the run that was copied."""
    interrupted(tmp_path / "old")
    how(tmp_path / "old", tmp_path / "new")
    callback = resumed(tmp_path / "new", tmp_path / "new" / "last.ckpt", validation__loss=[2.2])
    assert callback.best_model_path == str(tmp_path / "new" / "checkpoints" / "best-2.ckpt")
    better = resumed(tmp_path / "new", tmp_path / "new" / "last.ckpt", validation__loss=[1.9])
    assert Path(better.best_model_path).name == "best-4.ckpt"
    assert not (tmp_path / "new" / "checkpoints" / "best-2.ckpt").exists(), "replaced"
    assert (tmp_path / "old").exists() == (tmp_path / "old" / "checkpoints" / "best-2.ckpt").exists(), "untouched"


def test_a_resume_into_another_folder_looks_for_a_best_of_its_own(tmp_path: Path) -> None:
    callback = resumed(tmp_path / "new", interrupted(tmp_path / "old"), validation__loss=[2.2])
    assert callback.best_model_path == str(tmp_path / "new" / "checkpoints" / "best-4.ckpt")


def test_a_resumed_run_may_find_a_better_metric(tmp_path: Path) -> None:
    last = interrupted(tmp_path)
    callback = BestCheckpoint()
    fit(Planned(text__exact_match=[0.5], validation__loss=[9.0]), callback, tmp_path, 4, last)
    assert callback.monitor == EXACT and callback.mode == "max"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best-4.ckpt"]
