"""Products with weights of 8 bits on the CPU: four times as fast as those with 32 for a few dozen rows.

The weights have one scale for each output. The inputs get one for each row as they come, so that no row depends on
another. The products are sums of integers, by the operators of oneDNN that torch.compile uses for quantised models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_gan.errors import LoraGANError
from lora_gan.lightning_compat import patched_forward
from lora_gan.onednn import linear_layers, weight_of

OPERATORS = ("qlinear_prepack", "qlinear_pointwise")  # private operators of torch.ops.onednn
SMALLEST = 1e-12  # the scale of a row of zeros


@dataclass(frozen=True)
class _Quantized:
    """A weight (out, in) of 8 bits."""

    packed: Tensor
    scale: Tensor  # (out,)
    zero: Tensor  # (out,) all 0
    source: tuple[int, int]  # the place in memory and the version of the weight that it was made of


_QUANTIZED: WeakKeyDictionary[nn.Module, _Quantized] = WeakKeyDictionary()


def quantizable(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    """The frozen linear layers of the base, its head among them."""
    wrapped = [m for m in model.modules() if isinstance(m, LoraLayer)]
    adapters = {part for m in wrapped for parts in (m.lora_A, m.lora_B) for part in parts.values()}
    return [layer for layer in linear_layers(model) if layer not in adapters and not layer.weight.requires_grad]


@contextmanager
def int8_weights(model: PreTrainedModel) -> Iterator[None]:
    """Run the layers of :func:`quantizable` on 8-bit copies of their weights, which are made once and kept.

    Raises:
        LoraGANError: The model is not on a CPU in float32, or torch lacks the operators.
    """
    layers = quantizable(model)
    for layer in layers:
        _check(layer.weight)
    with patched_forward(layers, lambda layer: partial(_product, _quantized(layer), layer.bias)):
        yield


def _check(weight: Tensor) -> None:
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise LoraGANError(
            f"sampling.base int8 is for a CPU and a float32 base; the weights are {weight.dtype} on "
            f"{weight.device}: set sampling.base: null"
        )
    if missing := [name for name in OPERATORS if not hasattr(torch.ops.onednn, name)]:
        raise LoraGANError(f"torch.ops.onednn has no {', '.join(missing)} in this version: set sampling.base: null")


def _quantized(layer: nn.Linear | Conv1D) -> _Quantized:
    source = (layer.weight.data_ptr(), layer.weight._version)
    if layer not in _QUANTIZED or _QUANTIZED[layer].source != source:
        weight = weight_of(layer).detach()
        scale = weight.abs().amax(1).clamp(min=SMALLEST) / 127
        rounded = (weight / scale[:, None]).round().to(torch.int8).contiguous()  # the operator ignores strides
        packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        _QUANTIZED[layer] = _Quantized(packed, scale, torch.zeros(len(scale), dtype=torch.long), source)
    return _QUANTIZED[layer]


@cache
def _steps() -> int:
    """The largest number that an input becomes; without VNNI, sums of two products must fit into 16 bits."""
    return 127 if any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("_vnni")) else 63


def _product(weight: _Quantized, bias: Tensor | None, x: Tensor) -> Tensor:
    """x·Wᵀ + b."""
    steps, rows = _steps(), x.float().flatten(0, -2)
    scale = rows.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST).div_(steps)
    shifted = (rows / scale).add_(steps + 1.5).to(torch.uint8)  # to the nearest: what is cut off is below 1
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        *(shifted, 1.0, steps + 1), *(weight.packed, weight.scale, weight.zero), None, *(1.0, 0, torch.float32), *_PLAIN
    )
    result = result * scale if bias is None else torch.addcmul(bias, result, scale)
    return result.view(*x.shape[:-1], -1)


_PLAIN: tuple[str, list[float], str] = ("none", [], "")  # no operation after the product
