"""Adapter folders in PEFT's format, which ``PeftModel.from_pretrained`` loads, with heads and optimizer states.

A folder of both roles, such as ``step-100``, holds ``generator`` and ``discriminator``, each with
``adapter_config.json``, ``adapter_model.safetensors``, ``optimizer.pt`` and ``base.json``, which identifies the base;
``discriminator/head.pt`` is its linear head.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from copy import copy
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_gan.atomic import atomic_folder
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone
from lora_gan.bases import BUILTIN
from lora_gan.checkpointing.files import read_checkpoint
from lora_gan.errors import LoraGANError
from lora_gan.step_callback import StepModule

ROLES = (GENERATOR, DISCRIMINATOR)
BASE, WEIGHTS = "base.json", "adapter_model.safetensors"
SHAPE = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # initialisations that leave the base's weights as they are
# fields of a LoraConfig that do not matter once the adapter's tensors are known to be the same
NO_EFFECT = {
    *SHAPE,
    *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_dropout", "peft_version"),
    *("revision", "runtime_config", "target_modules", "task_type"),
    *("corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_ga_config"),  # of the initialisation
    *("layers_pattern", "megatron_config", "megatron_core", "qalora_group_size"),  # of options that are refused
}
MERGE = (
    "merge it into its base (merge_and_unload of PEFT), save the result with its tokenizer, and set base to that folder"
)


def save_adapter(backbone: Backbone, role: str, folder: Path) -> None:
    """Write one adapter in PEFT's format, and the identity of its base."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy(backbone.lm.peft_config[role])
    config.inference_mode = True
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(backbone.lm, adapter_name=role, save_embedding_layers=False)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    shutil.copymode(folder / "adapter_config.json", folder / WEIGHTS)  # safetensors writes for the owner alone
    (folder / BASE).write_text(json.dumps(backbone.fingerprint), encoding="utf-8")


def save_role(module: StepModule, role: str, folder: Path) -> None:
    """Write a role's adapter and heads; an older folder is replaced."""
    with atomic_folder(folder) as fresh:
        save_adapter(module.backbone, role, fresh)
        for file, weights in _heads(module, role).items():
            torch.save(weights, fresh / file)


def load_role(module: StepModule, role: str, source: str | Path) -> None:
    """Load a role's adapter and heads from a folder, or its adapter from a hub id.

    Raises:
        LoraGANError: There is no adapter, a file is damaged, or it belongs to another base or has another shape.
    """
    load_adapter(module.backbone, role, str(source))
    for file, mine in _heads(module, role).items():
        if (path := Path(source) / file).is_file():
            theirs: dict[str, Tensor] = read_checkpoint(path)
            _check_tensors(mine, theirs, f"{path} belongs to another discriminator or base")
            for name, weight in mine.items():
                weight.copy_(theirs[name])


def load_adapter(backbone: Backbone, role: str, source: str) -> None:
    """Load a role's weights from a PEFT adapter of any role and run.

    Raises:
        LoraGANError: There is no adapter, it is damaged, it belongs to another base, or it is of another kind or shape.
    """
    config, theirs = _read(source, role)
    here = _checked(backbone, role, source, config)
    for field, setting in SHAPE.items():
        found, wanted = getattr(config, field), getattr(here, field)
        if found != wanted:
            raise LoraGANError(
                f"the adapter {source!r} has {setting} {found}, but the {role} has {wanted}: set "
                f"{role}.lora.{setting} to {found}"
            )
    shape = get_peft_model_state_dict(backbone.lm, adapter_name=role, save_embedding_layers=False)
    adapter = _lora_tensors(backbone, source, theirs)
    _check_tensors(shape, adapter, _other_layers(source, role, config))
    set_peft_model_state_dict(backbone.lm, adapter, adapter_name=role)


def adapter_factors(backbone: Backbone, role: str, source: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """By module, A (r, in), B (out, r) and the scale of a PEFT adapter of any rank; the role stays as it is.

    Raises:
        LoraGANError: As :func:`load_adapter`, but for rank and scale; or the adapter is a DoRA.
    """
    config, theirs = _read(source, role)
    _checked(backbone, role, source, config)
    if config.use_dora:
        raise LoraGANError(f"the adapter {source!r} is a DoRA, more than a product B·A, and cannot be part of a sum")
    adapter = _lora_tensors(backbone, source, theirs)
    shape = get_peft_model_state_dict(backbone.lm, adapter_name=role, save_embedding_layers=False)
    if differing := sorted(adapter.keys() ^ shape.keys()):
        raise LoraGANError(f"{_other_layers(source, role, config)} (such as {differing[0]})")
    names = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return {n: (adapter[f"{n}.lora_A.weight"], adapter[f"{n}.lora_B.weight"], scale) for n in names}


def _checked(backbone: Backbone, role: str, source: str, config: LoraConfig) -> LoraConfig:
    """Check base and kind of an adapter; returns the configuration of the role's."""
    here: LoraConfig = backbone.lm.peft_config[role]
    _check_base(backbone, source, _saved_base(source), config.base_model_name_or_path, here.base_model_name_or_path)
    _check_kind(config, here, source)
    return here


def _lora_tensors(backbone: Backbone, source: str, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of A and B; the others must be those of the base."""
    adapter = {name: weight for name, weight in theirs.items() if "lora_" in name}
    _check_embeddings(backbone, {name: theirs[name] for name in theirs.keys() - adapter.keys()}, source)
    return adapter


def _other_layers(source: str, role: str, config: LoraConfig) -> str:
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    return f"the adapter {source!r} has other layers; set {role}.lora.targets to {targets}"


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


def _read(source: str, role: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Configuration and tensors of a PEFT adapter."""
    try:
        return PeftConfig.from_pretrained(source), load_peft_weights(source, device="cpu")
    except Exception as error:  # the kind of error depends on which byte of a damaged file has changed
        if isinstance(error, OSError | ValueError) and not isinstance(error, json.JSONDecodeError):
            raise LoraGANError(
                f"{source!r} holds no adapter; give a folder such as checkpoints/step-100/{role}, with "
                "adapter_config.json and adapter_model.safetensors in it"
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise LoraGANError(f"the adapter {source!r} is damaged ({reason}); copy or download it again") from error


def _check_kind(config: PeftConfig, here: LoraConfig, source: str) -> None:
    """Refuse what would change the model otherwise than through A, B and the settings of LoraSettings."""
    if not isinstance(config, LoraConfig):
        raise LoraGANError(
            f"the adapter {source!r} is of the kind {config.peft_type}, and the roles are LoRA adapters: {MERGE}"
        )
    if config.init_lora_weights not in KEEPS_BASE:
        raise LoraGANError(
            f"the adapter {source!r} was initialised by {config.init_lora_weights!r}, which changes the weights of the "
            f"base, and here both roles share the base: {MERGE}"
        )
    for field in fields(LoraConfig):
        if field.name not in NO_EFFECT and getattr(config, field.name) != getattr(here, field.name):
            raise LoraGANError(f"the adapter {source!r} uses {field.name}, which the roles do not have: {MERGE}")


def _check_tensors(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], message: str) -> None:
    differing = sorted(mine.keys() ^ theirs.keys()) or [n for n in mine if _shape(mine[n]) != _shape(theirs[n])]
    if differing:
        name = differing[0]
        shapes = [_shape(weights[name]) if name in weights else "missing" for weights in (theirs, mine)]
        raise LoraGANError(f"{message} ({name}: found {shapes[0]}, expected {shapes[1]})")


def _check_embeddings(backbone: Backbone, theirs: Mapping[str, Tensor], source: str) -> None:
    """PEFT saves the base's word embeddings beside an adapter on them; they must be those of this base."""
    mine = backbone.lm.state_dict()
    for name, weight in theirs.items():
        if name not in mine or not torch.equal(mine[name].cpu(), weight.to(mine[name].dtype)):
            raise LoraGANError(f"the adapter {source!r} comes with other weights of the base ({name}): {MERGE}")


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _saved_base(source: str) -> dict[str, str]:
    """Identity of the base as recorded in the folder; empty for adapters of other programs or on the hub."""
    path = Path(source) / BASE
    if not path.is_file():
        return {}
    try:
        saved: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraGANError(f"{path} is damaged ({error}); delete it to have the base checked by its name") from error
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
