"""What a checkpoint of the module holds, and which ones it accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lora_gan.backbone import SNAPSHOT, Backbone, LoraSettings
from lora_gan.discriminator import Discriminator
from lora_gan.errors import LoraGANError
from lora_gan.knobs import Knobs

CHECKPOINT_VERSION = 2


class Checkpointed(L.LightningModule):
    """Keeps what is trained and what crosses rounds; the frozen base is named, not stored."""

    base: str
    dtype_of_base: str
    lora: Mapping[str, LoraSettings]
    backbone: Backbone
    discriminator: Discriminator
    knobs: Knobs
    configured_knobs: Mapping[str, float]
    optimizer_factories: Mapping[str, OptimizerCallable]

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # of the base nothing is stored

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the base out and describe it."""
        kept = self._kept()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["lora_gan"] = {
            "version": CHECKPOINT_VERSION,
            "base": self.base,
            "dtype": self.dtype_of_base,
            "knobs": self.configured_knobs,
            "optimizers": self._optimizer_settings(),
            "judge": self._judge_description(),
            "replay": self.discriminator.replay.state_dict(),
            **{player: asdict(settings) for player, settings in self.lora.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else, saying what differs; a knob configured anew keeps its new value."""
        described = checkpoint.get("lora_gan")
        if described is None:
            raise LoraGANError("this checkpoint was not written by lora-gan")
        mine = {"version": CHECKPOINT_VERSION, "base": self.base, "judge": self._judge_description()}
        mine |= {player: asdict(settings) for player, settings in self.lora.items()}
        if (
            self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        ):  # the optimizers' saved state would override new settings
            mine["optimizers"] = self._optimizer_settings()
        differing = [f"{k}: {described.get(k)} there, {v} here" for k, v in mine.items() if described.get(k) != v]
        if differing:
            raise LoraGANError("the checkpoint does not fit this configuration: " + "; ".join(differing))
        if any(f".{SNAPSHOT}." in name for name in checkpoint["state_dict"]):
            self.backbone.add_snapshot()
        self.discriminator.replay.load_state_dict(described["replay"])
        missing = self._kept() - set(checkpoint["state_dict"])
        if missing:
            raise LoraGANError(f"the checkpoint lacks {len(missing)} tensors, {min(missing)} for one")
        for name, value in self.configured_knobs.items():
            if described["knobs"][name] != value:  # set anew for the resumed run
                checkpoint["state_dict"][f"knobs.{name}"] = torch.tensor(float(value))

    def _optimizer_settings(self) -> dict[str, dict[str, float]]:
        """The numbers among each optimizer's settings: learning rate, weight decay and so on."""
        settings = {}
        for player, make in self.optimizer_factories.items():
            defaults = make([nn.Parameter(torch.zeros(1))]).defaults
            settings[player] = {name: float(v) for name, v in defaults.items() if isinstance(v, int | float)}
        return settings

    def _judge_description(self) -> dict[str, str]:
        judge = self.discriminator.judge
        return {"architecture": type(judge).__name__, "reads": type(judge.reads).__name__}

    def _kept(self) -> set[str]:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        snapshot = {name for name, _ in self.named_parameters() if f".{SNAPSHOT}." in name}
        return trained | snapshot | {f"knobs.{name}" for name, _ in self.knobs.named_buffers()}
