"""Settings that are no numbers: nan passes a check such as ``x <= 0``, which is false for it."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest

from lora_gan.advantages import ValueGAE
from lora_gan.backbone import LoraSettings
from lora_gan.callbacks import (
    AdaptiveAdversarialWeight,
    AdaptiveEntropy,
    AdaptiveKL,
    CollapseMonitor,
    ConfidenceGate,
    DiscriminatorControl,
    EasyFirst,
    KLSchedule,
)
from lora_gan.cli.training import refuse_nan
from lora_gan.coefficients import Coefficients
from lora_gan.discriminator import GanBCE, StraightThrough
from lora_gan.errors import LoraGANError
from lora_gan.evolution import GaussianMutation, MergeCoefficients, RayWorkers, SupervisedStart
from lora_gan.generator import GeneratorSettings
from lora_gan.losses import ClippedPPO, Reinforce
from lora_gan.optimization import OptimizationSettings
from lora_gan.rewards import LengthReward, NormalizeThenSum
from lora_gan.sampling import Sampling

CHECKED: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (Sampling, {"temperature": nan}),
    (Sampling, {"temperature": inf}),
    (Sampling, {"top_p": nan}),
    (Coefficients, {"policy": nan}),
    (Coefficients, {"kl": nan}),
    (Coefficients, {"supervised": inf}),
    (OptimizationSettings, {"max_grad_norm": nan}),
    (GeneratorSettings, {"value_clip": nan}),
    (LoraSettings, {"dropout": nan}),
    (StraightThrough, {"temperature": nan}),
    (Reinforce, {"ratio_cap": nan}),
    (ClippedPPO, {"epsilon": nan}),
    (ClippedPPO, {"epsilon_high": nan}),
    (ClippedPPO, {"target_kl": nan}),
    (ValueGAE, {"gamma": nan}),
    (GanBCE, {"label_smoothing": nan}),
    (LengthReward, {"weight": nan}),
    (NormalizeThenSum, {"clip": nan}),
    (AdaptiveKL, {"target": nan}),
    (AdaptiveEntropy, {"target": nan}),
    (AdaptiveEntropy, {"target": 1.0, "rate": nan}),
    (KLSchedule, {"first": 0.1, "last": nan, "start": 0, "end": 5}),
    (EasyFirst, {"first": nan, "start": 0, "end": 5}),
    (CollapseMonitor, {"length": nan}),
    (DiscriminatorControl, {"freeze_above": 0.9, "train_below": nan}),
    (DiscriminatorControl, {"freeze_above": nan}),
    (ConfidenceGate, {"close_above": nan}),
    (AdaptiveAdversarialWeight, {"high": nan}),
    (GaussianMutation, {"rms": nan}),
    (MergeCoefficients, {"bound": nan}),
    (RayWorkers, {"gpus_per_worker": nan}),
    (SupervisedStart, {"max_grad_norm": nan}),
]


@pytest.mark.parametrize(("make", "settings"), CHECKED, ids=lambda given: str(getattr(given, "__name__", given)))
def test_nan_is_refused(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    with pytest.raises(LoraGANError):
        make(**settings)


def test_nan_is_refused_by_name_wherever_a_configuration_has_it() -> None:
    given = {"model": {"init_args": {"rewards": [{"init_args": {"weight": 1.0}}, {"init_args": {"weight": nan}}]}}}
    with pytest.raises(LoraGANError, match=r"^model\.rewards\[1\]\.weight must be a number, got nan$"):
        refuse_nan(given, "")
    refuse_nan({"model": {"betas": (0.9, 0.999), "largest": inf, "off": None, "base": "nan"}}, "")


def test_an_adapter_of_no_size_is_refused() -> None:
    with pytest.raises(LoraGANError, match="alpha must be at least 1, got 0"):
        LoraSettings(alpha=0)
