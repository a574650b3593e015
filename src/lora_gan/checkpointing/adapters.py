"""Adapter folders in PEFT's format, which ``PeftModel.from_pretrained`` loads, with heads and optimizer states.

A folder of both roles, such as ``step-100``, holds ``generator`` and ``discriminator``, each with
``adapter_config.json``, ``adapter_model.safetensors``, ``optimizer.pt`` and ``base.json``, which identifies the base;
``discriminator/head.pt`` is its linear head.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from copy import copy
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_gan.atomic import atomic_folder
from lora_gan.backbone import BUILTIN, DISCRIMINATOR, GENERATOR, Backbone
from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepModule

ROLES = (GENERATOR, DISCRIMINATOR)
BASE = "base.json"
SHAPE = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}


def save_adapter(backbone: Backbone, role: str, folder: Path) -> None:
    """Write one adapter in PEFT's format, and the identity of its base."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy(backbone.lm.peft_config[role])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(backbone.lm, adapter_name=role, save_embedding_layers=False)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / BASE).write_text(json.dumps(backbone.fingerprint), encoding="utf-8")


def save_role(module: StepModule, role: str, folder: Path) -> None:
    """Write a role's adapter and heads."""
    save_adapter(module.backbone, role, folder)
    for file, weights in _heads(module, role).items():
        torch.save(weights, folder / file)


def load_role(module: StepModule, role: str, source: str | Path) -> None:
    """Load a role's adapter and heads from a folder, or its adapter from a hub id.

    Raises:
        LoraGANError: There is no adapter, or it belongs to another base or has another shape.
    """
    load_adapter(module.backbone, role, str(source))
    for file, mine in _heads(module, role).items():
        if (path := Path(source) / file).is_file():
            theirs: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
            _check_tensors(mine, theirs, f"{path} belongs to another discriminator or base")
            for name, weight in mine.items():
                weight.copy_(theirs[name])


def load_adapter(backbone: Backbone, role: str, source: str) -> None:
    """Load a role's weights from a PEFT adapter of any role and run.

    Raises:
        LoraGANError: There is no adapter, or it belongs to another base or has another shape.
    """
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
                f"the adapter {source!r} has {setting} {found}, but the {role} has {wanted}: set "
                f"{role}.lora.{setting} to {found}"
            )
    shape = get_peft_model_state_dict(backbone.lm, adapter_name=role, save_embedding_layers=False)
    _check_tensors(shape, theirs, f"the adapter {source!r} has other layers; set {role}.lora.targets to its own")
    set_peft_model_state_dict(backbone.lm, theirs, adapter_name=role)


def write_roles(module: StepModule, folder: Path, optimizers: Mapping[str, Optimizer], state: object = None) -> None:
    """Write both roles and their optimizers to one folder, completely or not at all.

    Args:
        module: Module of the roles.
        folder: Folder to write; an older one is replaced.
        optimizers: Optimizers by role.
        state: Written to ``state.pt`` in the folder unless None.
    """
    with atomic_folder(folder) as fresh:
        for role in ROLES:
            save_role(module, role, fresh / role)
            torch.save(optimizers[role].state_dict(), fresh / role / "optimizer.pt")
        if state is not None:
            torch.save(state, fresh / "state.pt")


def keep_newest(parent: Path, prefix: str, count: int) -> None:
    """Delete all folders ``<prefix><number>`` but the ``count`` with the highest numbers; 0 keeps all."""
    numbered = sorted(parent.glob(f"{prefix}*"), key=lambda path: int(path.name.removeprefix(prefix)))
    for old in numbered[:-count] if count else []:
        shutil.rmtree(old)


def _heads(module: StepModule, role: str) -> dict[str, dict[str, Tensor]]:
    """Trainable tensors of a role besides its adapter, by file and name; not copies."""
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
        raise LoraGANError(f"{message} ({name}: found {shapes[0]}, expected {shapes[1]})")


def _saved_base(source: str) -> dict[str, str]:
    """Identity of the base as recorded in the folder; empty for adapters of other programs or on the hub."""
    path = Path(source) / BASE
    saved: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return saved


def _check_base(backbone: Backbone, source: str, saved: Mapping[str, str], there: str | None, here: str | None) -> None:
    """Compare the bases by their weights if recorded for this data type, else by name."""
    if saved.get("format") == backbone.fingerprint["format"]:
        if saved != backbone.fingerprint:
            raise LoraGANError(
                f"the adapter {source!r} was trained on the base {there!r}, but this base, {here!r}, has other "
                f"weights: set base to {there!r}"
            )
    elif _name(there) != _name(here):
        raise LoraGANError(
            f"the adapter {source!r} was trained on the base {there!r}, but this base is {here!r}: set base to "
            f"{there!r}; if the two are the same model, correct base_model_name_or_path in its adapter_config.json"
        )


def _name(base: str | None) -> str:
    """Name of the base without its folder."""
    path = Path(base or "unknown")
    return BUILTIN if path.parts[-2:] == ("lora_gan", BUILTIN) else path.name
