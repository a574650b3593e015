"""oneDNN's packed layout of frozen weights: faster matrix products on the CPU while completions are sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
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
def onednn_layout(model: nn.Module, besides: Collection[nn.Module] = ()) -> Iterator[None]:
    """Run the frozen float32 linear layers of ``model`` on packed copies of their weights within the context.

    A decoding step multiplies a few rows by every weight, so it spends its time reading the weights. On CPUs the packed
    layout of oneDNN, which torch.compile uses as well, makes a decoding step of GPT-2 124M about a third faster.
    GPT-2's activation takes one pass over its input instead of eight. Nothing changes on other devices, under autocast,
    and if torch lacks the operators.

    Args:
        model: The model.
        besides: Layers that are left as they are.
    """
    plain = [layer for layer in linear_layers(model) if layer not in besides]
    layers = [layer for layer in plain if takes_layout(layer.weight) and not layer.weight.requires_grad]
    with patched_forward(layers, lambda layer: product(weight_of(layer), layer.bias)), fast_gelu(model):
        yield


@contextmanager
def fast_gelu(model: nn.Module) -> Iterator[None]:
    """GPT-2's activation in one pass over its input, on a CPU."""
    on_cpu = any(p.device.type == "cpu" for p in model.parameters())
    activations = [m for m in model.modules() if isinstance(m, NewGELUActivation)] if on_cpu else []
    with patched_forward(activations, lambda _: _gelu):
        yield


def linear_layers(model: nn.Module) -> list[nn.Linear | Conv1D]:
    """The layers that compute a product and nothing more; some routers of experts are subclasses that do."""
    found = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    return [m for m in found if type(m).forward in (nn.Linear.forward, Conv1D.forward)]


def weight_of(layer: nn.Linear | Conv1D) -> Tensor:
    """(out, in) the layer's weight."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def takes_layout(weight: Tensor) -> bool:
    """Whether products with ``weight`` can be packed."""
    on_cpu = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    plain = on_cpu and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and _operators_exist()


@cache
def _operators_exist() -> bool:
    missing = [name for name in OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        log.warning("torch.ops.mkldnn has no %s in this version: sampling on the CPU is slower", ", ".join(missing))
    return not missing


def product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x ↦ x·Wᵀ + b with a packed copy of ``weight`` (out, in)."""
    return partial(_product, torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), bias)


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")
