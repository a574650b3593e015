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

ROWS = 64  # expected rows of the input, which affect the layout a little; a few dozen completions are decoded at a time
OPERATORS = ("_reorder_linear_weight", "_linear_pointwise")  # private operators of torch.ops.mkldnn
log = logging.getLogger("lora_gan")


@contextmanager
def onednn_layout(model: nn.Module) -> Iterator[None]:
    """Run the frozen float32 linear layers of ``model`` on packed copies of their weights within the context.

    A decoding step multiplies a few rows by every weight, so it spends its time reading the weights. On CPUs the packed
    layout of oneDNN, which torch.compile uses as well, makes a decoding step of GPT-2 124M about a third faster.
    GPT-2's activation takes one pass over its input instead of eight. Nothing changes on other devices, under autocast,
    and if torch lacks the operators.
    """
    layers = [
        m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and _is_plain(m) and _takes_layout(m.weight)
    ]
    activations = [m for m in model.modules() if isinstance(m, NewGELUActivation)] if layers else []
    with patched_forward(layers, _product_of_layout), patched_forward(activations, lambda _: _gelu):
        yield


def _is_plain(layer: nn.Linear | Conv1D) -> bool:
    """Whether the layer computes a product and nothing more; some routers of experts are subclasses that do."""
    return type(layer).forward in (nn.Linear.forward, Conv1D.forward)


def _takes_layout(weight: Tensor) -> bool:
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    frozen = weight.dtype == torch.float32 and not weight.requires_grad
    return on_cpu and frozen and not torch.is_autocast_enabled("cpu") and _operators_exist()


@cache
def _operators_exist() -> bool:
    missing = [name for name in OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        log.warning("torch.ops.mkldnn has no %s in this version: sampling on the CPU is slower", ", ".join(missing))
    return not missing


def _product_of_layout(layer: nn.Linear | Conv1D) -> Callable[[Tensor], Tensor]:
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return partial(_product, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS), layer.bias)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x·Wᵀ + b."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")
