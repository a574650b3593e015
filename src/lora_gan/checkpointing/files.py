"""Checkpoint files: written whole or not at all, read only where no byte that matters has changed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lora_gan.errors import LoraGANError

log = logging.getLogger("lora_gan")

LAST = "last.ckpt"  # the newest state of a run
PREVIOUS = "previous.ckpt"  # the one before, should the newest be damaged


class DamagedCheckpoint(LoraGANError):
    """A file that was cut off, or in which something has changed since it was written."""


class CheckpointFiles(TorchCheckpointIO):
    """For ``Trainer(plugins=…)``; the command line sets it. What is not on a local disk is left to Lightning.

    A file is written beside its place and moved there when it has reached the disk, so that whatever happens there is
    the old one or the new one. Reading compares the checksums that are in it, which ``torch.load`` does not.
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
    """Write the file whole, or leave what is there.

    Raises:
        LoraGANError: The disk does not take it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError when the disk is full
        partial.unlink(missing_ok=True)
        raise LoraGANError(
            f"cannot write {path}: {error}; make room or set another folder. The checkpoints before it are whole"
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What the file holds: tensors and plain values.

    Raises:
        DamagedCheckpoint: It is not as it was written.
        LoraGANError: There is no such file, or it is none of ours.
    """
    if not Path(path).is_file():
        raise LoraGANError(f"no checkpoint at {path}; fit prints the checkpoint paths when it ends")
    try:
        with ZipFile(path) as archive:
            broken = archive.testzip()
        checkpoint = None if broken else torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise LoraGANError(
            f"{path} was not written by lora-gan: it holds more than tensors and plain values"
        ) from error
    except Exception as error:  # where a changed byte stands decides what goes wrong
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if broken:
        raise _damaged(path, f"the checksum of {broken} is wrong")
    if not isinstance(checkpoint, dict):
        raise LoraGANError(f"{path} was not written by lora-gan: it holds no checkpoint")
    return checkpoint


def intact_checkpoint(path: Path) -> Path:
    """``path``, or the newest whole checkpoint beside it where that is damaged, with a warning.

    Raises:
        LoraGANError: None of them can be read.
    """
    try:
        if path.name == LAST and not path.exists():  # killed between moving the old one and writing the new one
            raise DamagedCheckpoint(f"there is no {path}")
        read_checkpoint(path)
        return path
    except DamagedCheckpoint as found:
        damage = found
    steps = {other: _round(other) for other in path.parent.glob("*.ckpt") if other != path}
    whole = {other: at for other, at in steps.items() if at is not None}
    if not whole:
        raise LoraGANError(f"{damage}; there is no other checkpoint in its folder: start anew, without --ckpt_path")
    newest = max(whole, key=lambda other: (whole[other], other.name == PREVIOUS))
    log.warning("%s; taking the newest whole one beside it, %s of step %d", damage, newest, whole[newest])
    return newest


def _round(path: Path) -> int | None:
    """After how many steps it was written; None where it cannot be resumed from."""
    try:
        checkpoint = read_checkpoint(path)
    except LoraGANError:
        return None
    return int(checkpoint["global_step"]) if "optimizer_states" in checkpoint else None


def _damaged(path: str | Path, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"the checkpoint {path} is damaged ({' '.join(reason.split())[:200]})")


def _remote(path: str | Path) -> bool:
    return "://" in str(path)


def _sync(folder: Path) -> None:
    """Make a change of names outlast a loss of power; only POSIX can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
