"""A base in 4 or 8 bits (bitsandbytes)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lora_gan.backbone import Backbone, BackboneSettings
from lora_gan.inference import load_saved
from lora_gan.tree import grow_scored
from tests.benchmarks.setting import LORA, Size, words_tokenizer
from tests.helpers.steps import fit

from .machine import Machine, randomised
from .models import QWEN3_06B, random_model
from .rows import Check, Finding, Skip
from .training import make_batches, make_module
from .tree import KIND, weighted

SIZE = Size("q06, 4 layers", QWEN3_06B | {"num_hidden_layers": 4, "vocab_size": 4096}, 1, 1, 1)
ROOM = {"4bit": 0.35, "8bit": 0.6}  # bytes of the linear layers, by those in bfloat16


def require() -> None:
    if find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")


def saved_base(folder: str) -> str:
    """A model of random weights as a folder, which quantisation needs."""
    random_model(SIZE, torch.device("cpu"), torch.bfloat16).save_pretrained(folder)
    words_tokenizer(SIZE.model["vocab_size"]).save_pretrained(folder)
    return folder


def quantised(machine: Machine, bits: str) -> Finding:
    """Gradient, logits and bytes against the same base in bfloat16."""
    require()
    with TemporaryDirectory() as folder:
        base = saved_base(folder)
        plain, small = (
            Backbone(base, LORA, LORA, BackboneSettings("bfloat16", how)).to(machine.device) for how in (None, bits)
        )
    prompt = torch.arange(32, device=machine.device)
    with torch.no_grad():
        wanted, found = (b.causal_lm(input_ids=prompt[None]).logits.flatten().float() for b in (plain, small))
    cosine = float(cosine_similarity(found, wanted, dim=0))
    room = _bytes(small) / _bytes(plain)
    with torch.autocast(machine.device.type, torch.bfloat16), randomised(small).generator():
        weighted(small.logprobs(grow_scored([prompt], {KIND: [[prompt[:8]]]}))[KIND].flatten()).backward()
    gradients = [p.grad for p in small.parameters_of("generator")]
    finite = all(g is not None and bool(g.isfinite().all()) for g in gradients)
    text = f"logits' cosine {cosine:.4f}, bytes × {room:.2f}, gradient {'finite' if finite else 'NOT FINITE'}"
    return Finding(text, cosine >= 0.97 and room <= ROOM[bits] and finite, {"cosine": cosine, "room": room})


def _bytes(backbone: Backbone) -> int:
    """Of the frozen weights of the adapted layers."""
    named: Sequence[tuple[str, Tensor]] = list(backbone.lm.named_parameters())
    return sum(p.numel() * p.element_size() for name, p in named if name.endswith("base_layer.weight"))


def kept_in_checkpoints(machine: Machine) -> Finding:
    """A checkpoint of a run on a base in 4 bits is loaded in 4 bits."""
    require()
    with TemporaryDirectory() as folder:
        module = make_module(base=saved_base(folder), quantization="4bit", dtype="bfloat16")
        _, trainer = fit(module, make_batches(module, 1), 1, accelerator="gpu", devices=1, precision="bf16-mixed")
        path = Path(folder, "run.ckpt")
        trainer.save_checkpoint(path)
        loaded = load_saved(str(path)).backbone
    found = getattr(loaded.causal_lm, "is_loaded_in_4bit", False)
    return Finding("4 bits" if found else "not quantised", bool(found))


CHECKS = [
    *(
        Check(
            "quant",
            f"{bits}, gradient, logits and bytes",
            f"cosine ≥ 0.97, bytes ≤ {ROOM[bits]} × bfloat16, finite",
            partial(quantised, bits=bits),
            10,
            gpus=1,
        )
        for bits in ROOM
    ),
    Check("quant", "checkpoint of a 4bit run", "loads in 4 bits", kept_in_checkpoints, 10, gpus=1),
]
