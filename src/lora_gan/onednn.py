"""oneDNN's packed layout of frozen weights: faster matrix products on the CPU while completions are sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from lora_gan.lightning_compat import patched_forward

ROWS = 64  # the layout depends a little on the expected number of rows; completions are decoded some dozens at a time
OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")  # private operators of torch.ops.mkldnn
log = logging.getLogger("lora_gan")


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Let the frozen float32 linear layers of ``model`` compute on packed copies of their weights.

    A decoding step multiplies a few rows with every weight, so its time is the time of reading them. On CPUs the
    packed layout (oneDNN, the one that torch.compile chooses) makes a step of GPT-2 124M about a third faster; the
    copies exist within the context only. GPT-2's activation, eight passes over its input, is computed in one. On other
    devices, under autocast and where torch lacks the operators, nothing changes.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and _can_be_packed(m.weight)]
    activations = [m for m in model.modules() if isinstance(m, NewGELUActivation)] if layers else []
    with patched_forward(layers, _packed_product), patched_forward(activations, lambda _: _gelu):
        yield


def _can_be_packed(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    frozen = weight.dtype == torch.float32 and not weight.requires_grad
    return on_cpu and frozen and not torch.is_autocast_enabled("cpu") and _operators_exist()


@cache
def _operators_exist() -> bool:
    missing = [name for name in OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        log.warning("torch.ops.mkldnn has no %s in this version: sampling on the CPU is slower", ", ".join(missing))
    return not missing


def _packed_product(layer: nn.Linear | Conv1D) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return partial(_product, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS), layer.bias)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x·Wᵀ + b."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")
