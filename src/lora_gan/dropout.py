"""Dropout of adapters, in passes with a gradient alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn


class AdapterDropout:
    """The dropout of a model's adapters; the model itself stays in evaluation mode.

    It is false where no adapter has any.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts: list[nn.Module] = []
        for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
            if dropouts := [m for m in layer.lora_dropout.values() if isinstance(m, nn.Dropout)]:
                self._parts += [layer, *dropouts]  # PEFT looks at the layer itself where it uses DoRA

    def __bool__(self) -> bool:
        return bool(self._parts)

    @contextmanager
    def active(self, on: bool) -> Iterator[None]:
        """Draw which inputs are set to 0, if ``on``."""
        for part in self._parts:
            part.training = on
        try:
            yield
        finally:
            for part in self._parts:
                part.training = False
