"""Frozen weights in the layout that the CPU's matrix products like best, while answers are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

ROWS = 64  # the layout depends a little on the expected number of rows; answers are decoded some dozens at a time


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Let the frozen float32 linear layers of ``model`` compute on packed copies of their weights.

    A decoding step multiplies a few rows with every weight, so its time is the time of reading them. On CPUs the
    packed layout (oneDNN, the one that torch.compile chooses) makes a step of GPT-2 124M about a third faster; the
    copies are made and dropped within the context. GPT-2's activation, eight passes over its input, is computed in one.
    Elsewhere, and under autocast, nothing changes.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and _can_be_packed(m.weight)]
    for layer in layers:
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        layout = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        layer.forward = partial(_product, layout, layer.bias)  # type: ignore[method-assign]
    activations = [m for m in model.modules() if isinstance(m, NewGELUActivation)] if layers else []
    for activation in activations:
        activation.forward = partial(gelu, approximate="tanh")
    try:
        yield
    finally:
        for module in (*layers, *activations):
            del module.forward


def _can_be_packed(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    frozen = weight.dtype == torch.float32 and not weight.requires_grad
    return on_cpu and frozen and not torch.is_autocast_enabled("cpu")


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x·Wᵀ + b."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result
