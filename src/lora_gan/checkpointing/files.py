"""Checkpoint files: written completely or not at all, read only if intact."""

from __future__ import annotations

import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lora_gan.atomic import atomic_file
from lora_gan.errors import LoraGANError

log = logging.getLogger("lora_gan")

LAST = "last.ckpt"  # the newest state of a run
PREVIOUS = "previous.ckpt"  # the state before it, in case the newest is damaged


class DamagedCheckpoint(LoraGANError):
    """A checkpoint file is truncated, or has changed since it was written."""


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoint plugin for ``Trainer(plugins=…)``; the command line adds it. Remote paths are left to Lightning.

    A file is written under a temporary name and renamed once it has reached the disk, so that after a crash there is
    either the old file or the new one. Reading verifies the checksums in the file, which ``torch.load`` does not.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if _remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if _remote(path):
            remote: dict[str, Any] = super().load_checkpoint(path, weights_only=True)
            return remote
        return read_checkpoint(path)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint completely, or leave an older file unchanged.

    Raises:
        LoraGANError: Writing failed.
    """
    try:
        with atomic_file(path) as draft:
            torch.save(checkpoint, draft)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
        raise LoraGANError(
            f"cannot write {path}: {error}; free disk space or set another folder. Earlier checkpoints are intact"
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of tensors and plain values.

    Raises:
        DamagedCheckpoint: The file is truncated or has changed.
        LoraGANError: There is no such file, or it was not written by lora-gan.
    """
    if not Path(path).is_file():
        raise LoraGANError(f"no checkpoint at {path}; fit prints the checkpoint paths when it ends")
    try:
        with ZipFile(path) as archive:
            broken = archive.testzip()
        checkpoint = None if broken else torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise LoraGANError(
            f"{path} was not written by lora-gan: it contains more than tensors and plain values"
        ) from error
    except Exception as error:  # the kind of error depends on which byte has changed
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if broken:
        raise _damaged(path, f"the checksum of {broken} is wrong")
    if not isinstance(checkpoint, dict):
        raise LoraGANError(f"{path} was not written by lora-gan: it contains no checkpoint")
    return checkpoint


def newest_run(folder: Path, runs: str = "*") -> Path | None:
    """Where the run that wrote a checkpoint last has its newest one; None where none has written any.

    Args:
        folder: Where the runs lie.
        runs: Pattern of the runs' folders in it.
    """
    written = sorted(folder.glob(f"{runs}/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    return written[-1].with_name(LAST) if written else None


def intact_checkpoint(path: Path) -> Path:
    """``path``, or, if that is damaged, the newest intact checkpoint in its folder, with a warning.

    Raises:
        LoraGANError: None of them is intact.
    """
    try:
        if path.name == LAST and not path.exists():  # killed between moving the old one and writing the new one
            raise DamagedCheckpoint(f"there is no {path}")
        read_checkpoint(path)
        return path
    except DamagedCheckpoint as found:
        damage = found
    steps = {other: _step_of(other) for other in path.parent.glob("*.ckpt") if other != path}
    intact = {other: at for other, at in steps.items() if at is not None}
    if not intact:
        raise LoraGANError(
            f"{damage}; there is no other intact checkpoint in its folder: start a new run, without --ckpt_path"
        )
    newest = max(intact, key=lambda other: (intact[other], other.name == PREVIOUS))
    log.warning("%s; using the newest intact one, %s of step %d", damage, newest, intact[newest])
    return newest


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint; None if a run cannot resume from it."""
    try:
        checkpoint = read_checkpoint(path)
    except LoraGANError:
        return None
    return int(checkpoint["global_step"]) if "optimizer_states" in checkpoint else None


def _damaged(path: str | Path, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"the checkpoint {path} is damaged ({' '.join(reason.split())[:200]})")


def _remote(path: str | Path) -> bool:
    return "://" in str(path)
