"""Replay buffer: old samples, so that the discriminator does not forget earlier behaviour of the generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError


@dataclass(frozen=True)
class Episode:
    """One prompt of an old step with the completions it got and their rewards."""

    prompt: Tensor  # (P,)
    target: Tensor  # (T,), ends with EOS
    completions: tuple[Tensor, ...]  # K tensors (T,), ending with EOS
    reward: Tensor  # (K,)
    parts: Mapping[str, Tensor]  # name → (K,)
    target_reward: Tensor  # ()
    target_parts: Mapping[str, Tensor]  # name → ()

    def to(self, device: torch.device | str) -> Episode:
        """The same episode on ``device``; those of a checkpoint are loaded to the CPU."""
        return Episode(
            self.prompt.to(device),
            self.target.to(device),
            tuple(completion.to(device) for completion in self.completions),
            self.reward.to(device),
            {name: part.to(device) for name, part in self.parts.items()},
            self.target_reward.to(device),
            {name: part.to(device) for name, part in self.target_parts.items()},
        )


class Replay:
    """A bounded buffer of old episodes, first in, first out; only the discriminator uses it.

    Args:
        capacity: Largest number of prompts kept; 0 turns replay off and draws no random numbers.
        per_step: Prompts drawn from it in each step.
    """

    def __init__(self, capacity: int = 0, per_step: int = 4) -> None:
        if capacity < 0 or per_step < 1:
            raise LoraGANError(f"replay needs capacity >= 0 and per_step >= 1, got {capacity} and {per_step}")
        self.capacity = capacity
        self.per_step = per_step
        self.episodes: list[Episode] = []

    def draw(self) -> list[Episode]:
        """Draw up to ``per_step`` different episodes."""
        if not self.episodes:
            return []
        return [self.episodes[i] for i in torch.randperm(len(self.episodes))[: self.per_step].tolist()]

    def add(self, episodes: list[Episode]) -> None:
        """Add new episodes and drop the oldest beyond the capacity."""
        if self.capacity:
            self.episodes = (self.episodes + episodes)[-self.capacity :]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors in CPU memory, loadable with ``weights_only``."""
        return {"episodes": [vars(e.to("cpu")) | {"completions": list(e.completions)} for e in self.episodes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the episodes of a saved buffer, the newest ones up to the capacity."""
        episodes = [Episode(**{**fields, "completions": tuple(fields["completions"])}) for fields in state["episodes"]]
        self.episodes = episodes[-self.capacity :] if self.capacity else []
