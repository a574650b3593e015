"""Which number formats a machine gets; the GPU is one by its answers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from lora_gan.api import LoraGAN
from lora_gan.backbone import BackboneSettings, load_base
from lora_gan.cli.training import settle_formats
from lora_gan.errors import LoraGANError
from lora_gan.number_formats import (
    auto_precision,
    computes_in_bfloat16,
    default_device,
    resolved_dtype,
    use_tensor_cores,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = Callable[[tuple[int, int]], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    """A GPU of this compute capability."""

    def make(capability: tuple[int, int]) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)

    return make


def test_bfloat16_begins_with_ampere(gpu: GPU) -> None:
    for capability, dtype, precision in (((7, 5), "float32", "32-true"), ((8, 0), "bfloat16", "bf16-mixed")):
        gpu(capability)
        assert default_device() == CUDA
        assert computes_in_bfloat16(CUDA) == (dtype == "bfloat16") and not computes_in_bfloat16(CPU)
        assert (resolved_dtype("auto", CUDA), auto_precision(CUDA)) == (dtype, precision)
        assert (resolved_dtype("auto", CPU), auto_precision(CPU)) == ("float32", "32-true")
        assert resolved_dtype("float16", CUDA) == "float16"


def test_a_machine_without_a_gpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch, bases: dict[str, str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert default_device() == CPU
    assert load_base(bases["gpt2"], "auto").dtype == torch.float32
    with pytest.raises(LoraGANError, match="unknown dtype 'bfloat17'; use auto, float32, bfloat16 or float16"):
        load_base(bases["gpt2"], "bfloat17")


def test_the_base_follows_the_precision_that_was_asked_for(gpu: GPU) -> None:
    gpu((9, 0))
    auto = BackboneSettings()
    assert auto.on(CUDA).dtype == auto.on(CUDA, "bf16-mixed").dtype == "bfloat16"
    assert auto.on(CUDA, "32-true").dtype == auto.on(CUDA, "16-mixed").dtype == auto.on(CPU).dtype == "float32"
    assert BackboneSettings("bfloat16").on(CUDA, "32-true").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("capability", "trainer", "precision", "dtype"),
    [
        ((8, 0), {"accelerator": "auto"}, "bf16-mixed", "bfloat16"),
        ((9, 0), {"accelerator": "gpu"}, "bf16-mixed", "bfloat16"),
        ((7, 5), {"accelerator": "gpu"}, "32-true", "float32"),
        ((9, 0), {"accelerator": "cpu"}, "32-true", "float32"),
        ((9, 0), {"accelerator": "auto", "precision": "32-true"}, "32-true", "float32"),
        ((9, 0), {"accelerator": "auto", "precision": "16-mixed"}, "16-mixed", "float32"),
        ((9, 0), {"accelerator": "auto", "plugins": ["a precision, perhaps"]}, None, "bfloat16"),
    ],
)
def test_the_command_line_fills_in_what_is_left_to_the_machine(
    capability: tuple[int, int], trainer: dict[str, Any], precision: str | None, dtype: str, gpu: GPU
) -> None:
    gpu(capability)
    settings = Namespace(trainer=Namespace(**trainer))
    settings["model.init_args.backbone.dtype"] = "auto"
    settle_formats(settings)
    assert settings.get("trainer.precision") == precision
    assert settings["model.init_args.backbone.dtype"] == dtype
    settings["model.init_args.backbone.dtype"] = "float16"
    settle_formats(settings)
    assert settings["model.init_args.backbone.dtype"] == "float16", "as it was given"


def test_the_api_takes_the_formats_of_its_device(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch, bases: dict[str, str]
) -> None:
    """On the CPU of a machine with a GPU, and, with the trainer's own device in its place, on the GPU."""
    gpu((9, 0))
    one = LoraGAN(bases["gpt2"], device="cpu")
    assert (one.module.backbone.settings.dtype, one.trainer.precision) == ("float32", "32-true")
    given: list[Any] = []
    monkeypatch.setattr("lora_gan.api.Stepper", lambda *arguments: given.append(arguments) or one._stepper)
    other = LoraGAN(bases["gpt2"], device="cuda")
    assert given[0][1:3] == (CUDA, None) and other.module.backbone.settings.dtype == "bfloat16"
    assert other.module.backbone.causal_lm.dtype == torch.bfloat16


def test_tensor_cores_are_used_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr("torch.set_float32_matmul_precision", chosen.append)
    use_tensor_cores(CPU)
    assert not chosen
    use_tensor_cores(CUDA)
    assert chosen == ["high"]
