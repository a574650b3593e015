"""Folders of runs: each run has its own, also of two that start at once, and a resumed run goes on in the old one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger

from lora_gan.atomic import check_writable
from lora_gan.callbacks.last_checkpoint import WITH_FOLDERS
from lora_gan.errors import LoraGANError
from lora_gan.lightning_compat import has_version, set_version


def runs_folder(settings: Any) -> Path:
    """Where the runs of this configuration lie."""
    given = settings.get("trainer.logger")
    given = given[0] if isinstance(given, list) and given else given
    where = given.get("init_args", {}) if isinstance(given, Namespace) else {}
    root = where.get("save_dir") or settings.get("trainer.default_root_dir") or "."
    return Path(root) / (where.get("name") or "lightning_logs")


def require_writable(folder: Path) -> None:
    """Make the folder, and check that files can be written there.

    Raises:
        LoraGANError: They cannot.
    """
    try:
        check_writable(folder)
    except OSError as error:
        raise LoraGANError(
            f"cannot write the run to {folder}: {error.strerror}; set trainer.logger.init_args.save_dir (without a "
            "logger trainer.default_root_dir) to a folder that you can write to"
        ) from error


def claim_folder(runs: Path) -> Path:
    """Make the next folder ``version_<n>``; of several processes each gets another one."""
    runs.mkdir(parents=True, exist_ok=True)
    taken = [name.removeprefix("version_") for name in (path.name for path in runs.glob("version_*"))]
    number = max([int(name) for name in taken if name.isdigit()], default=-1) + 1
    while True:
        try:
            (runs / f"version_{number}").mkdir()
            return runs / f"version_{number}"
        except FileExistsError:
            number += 1


def claim_versions(loggers: Iterable[Logger]) -> None:
    """Give each logger that has no version yet the folder that is claimed now, instead of when it first writes."""
    claimed: dict[str, Path] = {}
    for sink in loggers:
        if isinstance(sink, WITH_FOLDERS) and not has_version(sink):
            if sink.root_dir not in claimed:
                claimed[sink.root_dir] = claim_folder(Path(sink.root_dir))
            set_version(sink, int(claimed[sink.root_dir].name.removeprefix("version_")))


def continue_run(loggers: Iterable[Logger], run: Path) -> None:
    """Make the loggers write into the folder of a resumed run where it is one of theirs.

    CSVLogger would delete the metrics of the earlier part: they are kept as ``metrics.<n>.csv``.
    """
    for sink in loggers:
        if not isinstance(sink, WITH_FOLDERS) or run.parent != Path(sink.root_dir).resolve():
            continue
        set_version(sink, run.name)
        metrics = run / "metrics.csv"
        if isinstance(sink, CSVLogger) and metrics.is_file():
            metrics.rename(run / f"metrics.{len(list(run.glob('metrics*.csv')))}.csv")
