"""Files in the wheels of other projects: found without importing their code, and known by their hash."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

from lora_gan.errors import LoraGANError


def file_in_wheel(distribution: str, ending: str) -> Path | None:
    """The file whose name ends so in an installed wheel; None if the wheel is not installed."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name.endswith(ending)), None)


def require_official(path: Path, sha256: str, model: str, wheel: str) -> None:
    """Check that a file has this hash.

    Raises:
        LoraGANError: It has another one.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise LoraGANError(f"{path} is not the official {model} (sha256 {found}); reinstall {wheel}")
