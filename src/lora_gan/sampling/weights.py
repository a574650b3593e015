"""Weights for decoding: copies of frozen weights, with the adapter merged in, laid out for products with a few rows.

PEFT computes an adapter's update in every layer at every token. While completions are sampled nothing learns, so the
active adapter can be merged into a copy of the base's weights, which on a CPU are copied into oneDNN's layout anyway.
Where merging would round the update away, or few tokens are sampled, it is added beside the product in two small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from lora_gan.lightning_compat import patched_forward
from lora_gan.onednn import linear_layers, onednn_layout, product, takes_layout, weight_of
from lora_gan.sampling.int8 import int8_weights, quantizable
from lora_gan.sampling.settings import INT8, Sampling

COSTS = 4  # of merging a number of the weights, in units of a number of an input or output; measured on a CPU


@contextmanager
def decoding_weights(model: PreTrainedModel, how: Sampling, tokens: int) -> Iterator[None]:
    """Run the linear layers on copies of their weights within the context; no gradient.

    Layers that compute more than a product and a plain LoRA update, whose forward is replaced already, or that are
    quantised by bitsandbytes, are left as they are.

    Args:
        model: The model, in the mode that is sampled.
        how: Which weights are wanted.
        tokens: How many may be sampled.
    """
    adapted = _adapted(model)
    merged = [layer for layer in adapted if how.base is None and _merges(layer.base_layer.weight, how, tokens)]
    beside = [layer for layer in adapted if layer not in merged]
    with patched_forward(merged, _merged), patched_forward(beside, _beside), _base(model, how, merged):
        yield


@contextmanager
def _base(model: PreTrainedModel, how: Sampling, merged: list[lora.Linear]) -> Iterator[None]:
    if how.base == INT8:
        with int8_weights(model), onednn_layout(model, besides=quantizable(model)):
            yield
    else:
        with onednn_layout(model, besides=[layer.base_layer for layer in merged]):
            yield


def _adapted(model: PreTrainedModel) -> list[lora.Linear]:
    """The layers that are a linear layer plus the update of one adapter, scale·B·A."""
    plain = set(linear_layers(model))
    return [m for m in model.modules() if type(m) is lora.Linear and m.base_layer in plain and _adds_one_product(m)]


def _adds_one_product(layer: lora.Linear) -> bool:
    if "forward" in vars(layer) or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    adapter = layer.active_adapters[0]
    known = adapter in layer.lora_A and adapter not in layer.lora_variant
    return known and layer.lora_A[adapter].bias is None and layer.lora_B[adapter].bias is None


def _merges(weight: Tensor, how: Sampling, tokens: int) -> bool:
    """Whether to merge: a pass over the weight's numbers, against one over input and output of each token."""
    if how.merge_lora is not None:
        return how.merge_lora
    return _format(weight) == torch.float32 and tokens * sum(weight.shape) > COSTS * weight.numel()


def _format(weight: Tensor) -> torch.dtype:
    """Data type of the products with ``weight``."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _merged(layer: lora.Linear) -> Callable[[Tensor], Tensor]:
    adapter, base = layer.active_adapters[0], layer.base_layer
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    weight = torch.addmm(weight_of(base).to(a.dtype), b, a, alpha=layer.scaling[adapter]).to(_format(base.weight))
    if takes_layout(weight):
        return product(weight, base.bias)
    return partial(linear, weight=weight, bias=base.bias)


def _beside(layer: lora.Linear) -> Callable[[Tensor], Tensor]:
    adapter, dtype = layer.active_adapters[0], _format(layer.base_layer.weight)
    a = layer.lora_A[adapter].weight.T.to(dtype)
    b = (layer.scaling[adapter] * layer.lora_B[adapter].weight.T).to(dtype)
    return partial(_with_update, layer.base_layer, a, b)


def _with_update(base: nn.Module, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The base's product plus x·a·b; a (in, r), b (r, out)."""
    result: Tensor = base(x)
    result.view(-1, b.shape[1]).addmm_(x.reshape(-1, len(a)).to(a.dtype) @ a, b)
    return result
