"""Folders of runs: no two runs share one, and a resumed run loses nothing of its earlier part."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lora_gan.cli import main
from lora_gan.cli.runs import claim_folder, claim_versions, continue_run, require_writable
from lora_gan.errors import LoraGANError

CONFIGS = Path(__file__).parents[3] / "configs"


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    """Lightning's loggers count folders and make theirs later: two would agree on version_0."""
    loggers = [TensorBoardLogger(tmp_path, "gan") for _ in range(2)]
    for logger in loggers:
        claim_versions([logger])
    assert [Path(logger.log_dir).name for logger in loggers] == ["version_0", "version_1"]
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(claim_folder, [tmp_path / "runs"] * 64))
    assert {folder.name for folder in folders} == {f"version_{number}" for number in range(64)}


def test_loggers_of_one_run_share_its_folder_and_a_given_version_stays(tmp_path: Path) -> None:
    (tmp_path / "gan" / "version_4").mkdir(parents=True)
    both = [TensorBoardLogger(tmp_path, "gan"), CSVLogger(tmp_path, "gan")]
    claim_versions(both)
    assert [logger.version for logger in both] == [5, 5]
    given = TensorBoardLogger(tmp_path, "gan", version="mine")
    claim_versions([given])
    assert given.version == "mine"


def test_a_resumed_run_keeps_the_csv_of_its_earlier_part(tmp_path: Path) -> None:
    def logged(logger: CSVLogger, step: int) -> Path:
        logger.log_metrics({"loss": float(step)}, step)
        logger.save()
        return Path(logger.log_dir)

    first = CSVLogger(tmp_path, "gan")
    run = logged(first, 1)
    for step in (2, 3):
        again = CSVLogger(tmp_path, "gan")
        continue_run([again], run.resolve())
        assert logged(again, step) == run, "in the folder of the run"
    read = {path.name: [row["step"] for row in csv.DictReader(path.open())] for path in run.glob("*.csv")}
    assert read == {"metrics.1.csv": ["1"], "metrics.2.csv": ["2"], "metrics.csv": ["3"]}


def test_a_resume_elsewhere_gets_a_new_folder(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path / "here", "gan")
    continue_run([logger], tmp_path / "there" / "gan" / "version_0")
    claim_versions([logger])
    assert Path(logger.log_dir) == tmp_path / "here" / "gan" / "version_0"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "gan")
    (tmp_path / "file").touch()
    with pytest.raises(LoraGANError, match=r"cannot write the run to .*file/gan: Not a directory; set trainer\.logger"):
        require_writable(tmp_path / "file" / "gan")


class Elsewhere(Logger):
    """A logger that sends its metrics to a server, such as W&B's: it has a folder, and none for each run."""

    def __init__(self, save_dir: str, name: str = "mine") -> None:
        super().__init__()
        self._save_dir, self._name = save_dir, name
        self.names: set[str] = set()

    save_dir = property(lambda self: self._save_dir)
    name = property(lambda self: self._name)
    version = property(lambda self: "x1")

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.names |= metrics.keys()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Sent away, too."""


def test_a_logger_without_folders_gets_one_for_each_run(tmp_path: Path) -> None:
    """All files of a run lie together, two runs do not replace each other, and a resume stays where it was."""
    short = ["--data.max_validation=2", "--trainer.val_check_interval=1", "--test_after_fit=false"]
    fit = ["fit", f"--config={CONFIGS / 'sft.yaml'}", f"--trainer.logger={__name__}.Elsewhere", *short]
    fit += [
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--model.generator.scheduler.floor=0.5",
    ]
    for _ in range(2):
        main([*fit, "--trainer.max_steps=1"])
    runs = sorted((tmp_path / "sft").iterdir())
    assert [run.name for run in runs] == ["version_0", "version_1"]
    for run in runs:
        assert {"config.yaml", "checkpoints", "adapters"} <= {path.name for path in run.iterdir()}
        assert {"last.ckpt", "best-1.ckpt"} <= {path.name for path in (run / "checkpoints").iterdir()}
    last = runs[0] / "checkpoints" / "last.ckpt"
    main(["fit", f"--config={runs[0] / 'config.yaml'}", f"--ckpt_path={last}", "--trainer.max_steps=2"])
    assert sorted((tmp_path / "sft").iterdir()) == runs
    assert yaml.safe_load((runs[0] / "config.yaml").read_text(encoding="utf-8"))["trainer"]["max_steps"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"sft"}, "the name of the file below"
