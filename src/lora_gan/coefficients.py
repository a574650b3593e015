"""The few numbers that cross steps: callbacks set them, the step reads them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from lora_gan.errors import LoraGANError

AT_LEAST_0 = ("supervised", "policy", "coupled", "value", "discriminator_updates")


@dataclass(frozen=True)
class Coefficients:
    """Weights of the losses and of the parts of the reward.

    Each is declared here and nowhere else: the module keeps it as a buffer of the same name, which is in every
    checkpoint and, when it changes, logged as ``coefficient/<name>``; a phase of a curriculum can change it; and a loss
    of the generator with the name of a coefficient has it as its weight.

    Args:
        supervised: Weight of the cross-entropy on the targets (completion tokens only, token mean).
        policy: Weight of the policy loss; at 0, and with a discriminator that does not learn, nothing is sampled.
        adversarial: Weight of the adversarial reward in the reward of the policy.
        coupled: Weight of −log P(close) in the generator's loss, differentiated through relaxed samples.
        kl: Weight of KL(generator‖reference) in the generator's loss (k3, token mean).
        kl_penalty: Weight of log π − log reference subtracted from the reward at each token (k1).
        entropy: Weight of the entropy bonus (nats per token).
        value: Weight of the value head's loss, for advantages that need one.
        discriminator_updates: Optimizer steps of the discriminator in a training step; 0: it does not learn.
    """

    supervised: float = 1.0
    policy: float = 1.0
    adversarial: float = 0.0
    coupled: float = 0.0
    kl: float = 0.0
    kl_penalty: float = 0.0
    entropy: float = 0.0
    value: float = 0.1
    discriminator_updates: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value):
                raise LoraGANError(f"coefficients.{field.name} must be a finite number, got {value}")
            if value < 0 and field.name in AT_LEAST_0:
                raise LoraGANError(f"coefficients.{field.name} must be at least 0, got {value}")


NAMES = tuple(field.name for field in fields(Coefficients))
INITIAL = {  # what only callbacks set
    "baseline": 0.0,  # moving average of the reward
    "adversarial_scale": 1.0,  # multiplies ``adversarial``
    "adversarial_gate": 1.0,  # 0: the adversarial reward does not count
    "discriminator_gate": 1.0,  # 0: the discriminator does not learn
    "easiest_share": 1.0,  # share of a batch's prompts that the generator learns from
}


class CoefficientState(nn.Module):
    """The coefficients as they are now, each a scalar buffer.

    Args:
        initial: Their first values.
    """

    def __init__(self, initial: Coefficients) -> None:
        super().__init__()
        for name, value in {**asdict(initial), **INITIAL}.items():
            self.register_buffer(name, torch.tensor(float(value), dtype=torch.float32))

    def __getattr__(self, name: str) -> Tensor:
        value: Tensor = super().__getattr__(name)  # type: ignore[assignment]
        return value

    def set(self, **values: float | Tensor) -> None:
        """Give the named coefficients new values."""
        for name, value in values.items():
            getattr(self, name).fill_(float(value))


class Changes:
    """Which coefficients to log: at the start those that count, later those that have changed, before and after."""

    def __init__(self) -> None:
        self.looked: int | None = None  # the last step at which they were looked at
        self.values: dict[str, float] = {}  # as they were then
        self.written: set[str] = set()  # of them those that were logged there

    def due(self, step: int, every: int) -> bool:
        """Whether to look at step ``step`` (from 1): at the first and at each that ``every`` divides; 0: never."""
        return bool(every) and (self.looked is None or step % every == 0)

    def points(self, values: Mapping[str, float], step: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Steps and what to log there, so that a line through the points is flat where nothing changes.

        Args:
            values: The coefficients in this step, those that play no part in the run left out.
            step: The number of this step.
        """
        if self.looked is None:
            changed = {name: value for name, value in values.items() if value != INITIAL.get(name, 0.0)}
        else:
            changed = {name: value for name, value in values.items() if value != self.values.get(name)}
            if before := {n: self.values[n] for n in changed if n in self.values and n not in self.written}:
                yield self.looked, before
        if changed:
            yield step, changed
        self.looked, self.values, self.written = step, dict(values), set(changed)
