"""The device: its names and speeds, clocks and memory, and the random models that the checks of a group share."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from statistics import median
from typing import Any, TypeVar

import peft
import torch
import transformers
from torch import Tensor, nn

from lora_gan.backbone import Backbone, BackboneSettings
from lora_gan.bases import OBJECTS
from tests.benchmarks.setting import LORA, Size
from tests.benchmarks.timing import timed

from .models import Q06, Q8, TINY, random_base

T = TypeVar("T")


class Machine:
    """What the checks run on.

    Args:
        device: A CUDA GPU or the CPU.
        large: Also measure models of 8 billion parameters.
    """

    def __init__(self, device: torch.device, large: bool = False) -> None:
        self.device = device
        self.large = large
        self._kept: dict[str, Any] = {}

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def gpus(self) -> int:
        """How many CUDA GPUs the checks may use."""
        return torch.cuda.device_count() if self.is_cuda else 0

    def __str__(self) -> str:
        names = [f"torch {torch.__version__}", f"transformers {transformers.__version__}", f"peft {peft.__version__}"]
        matmul = f"{'bf16' if self.is_cuda else 'float32'} {self.flops / 1e12:.3g} TFLOP/s"
        return " · ".join([*self._device_names(), *names, f"copy {self.bandwidth / 1e12:.3g} TB/s", matmul])

    def _device_names(self) -> list[str]:
        if not self.is_cuda:
            return [f"CPU, {torch.get_num_threads()} thread(s)"]
        properties = torch.cuda.get_device_properties(self.device)
        memory = properties.total_memory / 2**30
        return [f"{properties.name} {memory:.0f} GiB", f"driver {_driver()}, CUDA {torch.version.cuda}"]

    # speeds

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        source = torch.ones((1 << 30) if self.is_cuda else (1 << 26), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source), 10)

    @cached_property
    def flops(self) -> float:
        """Operations a second of a large matrix product, in bfloat16 on a GPU and in float32 on a CPU."""
        n, dtype = (8192, torch.bfloat16) if self.is_cuda else (768, torch.float32)
        left, right = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: left @ right, 10)

    def seconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Median seconds of ``work``, after one call to warm up."""
        return median([timed(work) for _ in range(repeats + 1)][1:])

    def peak(self, work: Callable[[], Any]) -> float:
        """Most bytes allocated while ``work`` runs, above those before it.

        Raises:
            RuntimeError: The device is no CUDA GPU.
        """
        if not self.is_cuda:
            raise RuntimeError("memory is measured on a CUDA GPU only")
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return float(torch.cuda.max_memory_allocated(self.device) - before)

    # models

    @property
    def small(self) -> Size:
        """The shape of most checks: 0.6 billion parameters on a GPU, tiny on a CPU."""
        return Q06 if self.is_cuda else TINY

    @property
    def sizes(self) -> list[Size]:
        """The shapes of the checks of speed."""
        return [self.small, Q8] if self.large and self.is_cuda else [self.small]

    def keep(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` returned at the first call with this name in this group."""
        if name not in self._kept:
            self._kept[name] = make()
        found: T = self._kept[name]
        return found

    def backbone(self, size: Size | str, dtype: torch.dtype = torch.float32, **settings: Any) -> Backbone:
        """A backbone on the device, shared by the checks of a group; its adapters are random, so that they matter.

        Args:
            size: The shape of a random model, or the name of a base.
            dtype: Of the frozen weights.
            settings: Of :class:`BackboneSettings`.
        """
        name = size if isinstance(size, str) else size.name

        def make() -> Backbone:
            how = BackboneSettings(str(dtype).removeprefix("torch."), **settings)
            base = size if isinstance(size, str) else random_base(size, self.device, dtype)
            made = Backbone(base, LORA, LORA, how).to(self.device)
            OBJECTS.pop(base, None)  # so that the weights are freed with the backbone
            return randomised(made)

        return self.keep(f"{name} {dtype} {settings}", make)

    # between two checks

    def release(self) -> None:
        """Free what the checks of a group shared."""
        self._kept.clear()
        OBJECTS.clear()
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Run a check with fixed seeds and torch's own settings, which trainers change."""
        torch.manual_seed(0)
        random.seed(0)
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.use_deterministic_algorithms(False)
            if self.is_cuda:
                torch.cuda.set_sync_debug_mode("default")


def randomised(backbone: Backbone, scale: float = 0.02) -> Backbone:
    """The backbone with random B matrices of LoRA, which are 0 at the start."""
    with torch.no_grad():
        for name, parameter in backbone.lm.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=scale)
    return backbone


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, by that of ``wanted``."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _driver() -> str:
    """The version of NVIDIA's driver."""
    try:
        return open("/sys/module/nvidia/version", encoding="utf-8").read().strip()
    except OSError:
        return "unknown"
