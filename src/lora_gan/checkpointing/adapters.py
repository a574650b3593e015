"""StepModule on disk: PEFT folders that plain ``PeftModel.from_pretrained`` loads, with heads and optimizers beside
them.

A folder of both, ``step-100`` say, holds ``generator`` and ``discriminator``, each with ``adapter_config.json``,
``adapter_model.safetensors``, ``optimizer.pt`` and ``base.json``, by which the base is known again;
``discriminator/head.pt`` is its linear head.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_gan.backbone import BUILTIN, DISCRIMINATOR, GENERATOR, Backbone
from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepModule

ROLES = (GENERATOR, DISCRIMINATOR)
BASE = "base.json"
SHAPE = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}


def save_adapter(backbone: Backbone, role: str, folder: Path) -> None:
    """Write one adapter in PEFT's format, and by what its base is known again."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy(backbone.lm.peft_config[role])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(backbone.lm, adapter_name=role, save_embedding_layers=False)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / BASE).write_text(json.dumps(backbone.fingerprint), encoding="utf-8")


def save_role(module: StepModule, role: str, folder: Path) -> None:
    """Write a role's adapter and what it learns besides."""
    save_adapter(module.backbone, role, folder)
    for file, weights in _heads(module, role).items():
        torch.save(weights, folder / file)


def load_role(module: StepModule, role: str, source: str | Path) -> None:
    """Give a role the adapter and the heads of a folder, or the adapter of a hub id.

    Raises:
        LoraGANError: There is none, or it is one of another base or shape.
    """
    load_adapter(module.backbone, role, str(source))
    for file, mine in _heads(module, role).items():
        if (path := Path(source) / file).is_file():
            theirs: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
            _check_tensors(mine, theirs, f"{path} belongs to another discriminator or base")
            for name, weight in mine.items():
                weight.copy_(theirs[name])


def load_adapter(backbone: Backbone, role: str, source: str) -> None:
    """Give a role the weights of a PEFT adapter, of its own or of another run."""
    try:
        config = PeftConfig.from_pretrained(source)
        theirs = load_peft_weights(source, device="cpu")
        saved = _saved_base(source)
    except (OSError, ValueError) as error:
        raise LoraGANError(
            f"{source!r} holds no adapter; give a folder such as checkpoints/step-100/{role}, with "
            "adapter_config.json and adapter_model.safetensors in it"
        ) from error
    here = backbone.lm.peft_config[role]
    _check_base(backbone, source, saved, config.base_model_name_or_path, here.base_model_name_or_path)
    for field, setting in SHAPE.items():
        found, wanted = getattr(config, field, None), getattr(here, field)
        if found != wanted:
            raise LoraGANError(
                f"the adapter {source!r} has {setting} {found}, and the {role}'s is {wanted}: set "
                f"{role}_lora.{setting} accordingly"
            )
    shape = get_peft_model_state_dict(backbone.lm, adapter_name=role, save_embedding_layers=False)
    _check_tensors(shape, theirs, f"the adapter {source!r} is one of other layers; set {role}_lora.targets as there")
    set_peft_model_state_dict(backbone.lm, theirs, adapter_name=role)


def write_roles(module: StepModule, folder: Path, optimizers: Mapping[str, Optimizer], state: object = None) -> None:
    """Write both roles and their optimizers as one folder, whole or not at all.

    Args:
        module: Whose roles.
        folder: Replaced where it is there.
        optimizers: By role.
        state: Written to ``state.pt`` beside the roles.
    """
    with whole_folder(folder) as fresh:
        for role in ROLES:
            save_role(module, role, fresh / role)
            torch.save(optimizers[role].state_dict(), fresh / role / "optimizer.pt")
        if state is not None:
            torch.save(state, fresh / "state.pt")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Where to write what becomes ``folder`` when all of it is there; an older one is replaced."""
    fresh = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    yield fresh
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(fresh, folder)


def keep_newest(parent: Path, prefix: str, count: int) -> None:
    """Of the folders ``<prefix><number>`` leave those with the highest numbers; a count of 0 leaves all."""
    numbered = sorted(parent.glob(f"{prefix}*"), key=lambda path: int(path.name.removeprefix(prefix)))
    for old in numbered[:-count] if count else []:
        shutil.rmtree(old)


def _heads(module: StepModule, role: str) -> dict[str, dict[str, Tensor]]:
    """By file, what a role learns besides its adapter: the live tensors."""
    heads: dict[str, nn.Module | None]
    if role == GENERATOR:
        heads = {"value_head.pt": module.generator.value_head}
    else:
        heads = {"head.pt": module.backbone.score_head, "model.pt": module.discriminator.model}
    learned = {
        file: {name: p.detach() for name, p in head.named_parameters() if p.requires_grad}
        for file, head in heads.items()
        if head is not None
    }
    return {file: weights for file, weights in learned.items() if weights}


def _check_tensors(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], message: str) -> None:
    differing = sorted(mine.keys() ^ theirs.keys()) or [n for n in mine if mine[n].shape != theirs[n].shape]
    if differing:
        name = differing[0]
        shapes = [tuple(weights[name].shape) if name in weights else "missing" for weights in (theirs, mine)]
        raise LoraGANError(f"{message} ({name}: {shapes[0]} there, {shapes[1]} here)")


def _saved_base(source: str) -> dict[str, str]:
    """What the folder says about the base; nothing where another program wrote it, or where it is on the hub."""
    path = Path(source) / BASE
    saved: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return saved


def _check_base(backbone: Backbone, source: str, saved: Mapping[str, str], there: str | None, here: str | None) -> None:
    """By the weights, where they are known in this number format; else by the name alone."""
    if saved.get("format") == backbone.fingerprint["format"]:
        if saved != backbone.fingerprint:
            raise LoraGANError(
                f"the adapter {source!r} was trained on the base {there!r}, and this one is {here!r}, whose weights "
                "are others: set base to it"
            )
    elif _name(there) != _name(here):
        raise LoraGANError(
            f"the adapter {source!r} was trained on the base {there!r}, and this one is {here!r}: set base to it; if "
            "the two are the same model, correct base_model_name_or_path in the folder's adapter_config.json"
        )


def _name(base: str | None) -> str:
    """The base without the folder it lies in."""
    path = Path(base or "unknown")
    return BUILTIN if path.parts[-2:] == ("lora_gan", BUILTIN) else path.name
