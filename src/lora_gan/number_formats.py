"""Number formats: which ones a device computes in, and quantised weights."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Literal

import torch

from lora_gan.errors import LoraGANError

AUTO = "auto"


def default_device() -> torch.device:
    """A CUDA GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device is a CUDA GPU with matrix products in bfloat16: compute capability 8.0, Ampere, or later."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def auto_precision(device: torch.device) -> Literal["bf16-mixed", "32-true"]:
    """The trainer's precision where none is set: bf16-mixed on such a GPU, else 32-true."""
    return "bf16-mixed" if computes_in_bfloat16(device) else "32-true"


def resolved_dtype(dtype: str, device: torch.device, precision: Any = None) -> str:
    """The data type of a frozen base, once its device is known.

    Args:
        dtype: A data type, or "auto".
        device: Where the base computes.
        precision: The trainer's precision, if it is known.

    Returns:
        ``dtype``; for "auto" bfloat16 on a GPU that computes in it, unless the precision is another one, else float32.
    """
    if dtype != AUTO:
        return dtype
    bfloat16 = precision in (None, "bf16-mixed", "bf16") and computes_in_bfloat16(device)
    return "bfloat16" if bfloat16 else "float32"


def torch_dtype(dtype: str) -> torch.dtype:
    """The data type of this name.

    Raises:
        LoraGANError: There is none.
    """
    found = getattr(torch, resolved_dtype(dtype, default_device()), None)
    if not isinstance(found, torch.dtype):
        raise LoraGANError(f"unknown dtype {dtype!r}; use auto, float32, bfloat16 or float16")
    return found


def use_tensor_cores(device: torch.device) -> None:
    """Let the products of float32 matrices that are left on a CUDA GPU be computed in TensorFloat-32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def quantized(quantization: str | None, dtype: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for quantisation; 4 bits are NF4 with double quantisation (arXiv 2305.14314).

    Raises:
        LoraGANError: ``quantization`` is neither "4bit" nor "8bit", or a CUDA GPU or bitsandbytes is missing.
    """
    if quantization is None:
        return {}
    if quantization not in ("4bit", "8bit"):
        raise LoraGANError(f"quantization must be 4bit, 8bit or null, got {quantization!r}")
    if not torch.cuda.is_available():
        raise LoraGANError(
            f"quantization: {quantization} needs a CUDA GPU, and none was found; leave it out, and set dtype: bfloat16 "
            "to halve the base's memory"
        )
    if find_spec("bitsandbytes") is None:
        raise LoraGANError(f"quantization: {quantization} needs bitsandbytes: pip install 'lora-gan[quantization]'")
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if dtype == "float32" else torch_dtype(dtype)
    settings = BitsAndBytesConfig(
        load_in_4bit=quantization == "4bit",
        load_in_8bit=quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    device = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return {"quantization_config": settings, "device_map": {"": device}}
