"""Every objective × advantage × policy loss × architecture of the discriminator runs one step in the real trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from lora_gan.advantages import (
    AdvantageEstimator,
    GroupNormalised,
    LeaveOneOut,
    MovingAverage,
    PredictedReward,
    ValueGAE,
)
from lora_gan.backbone import GENERATOR, LoraSettings, load_base
from lora_gan.callbacks import MovingAverageBaseline
from lora_gan.discriminator import (
    AdapterDiscriminator,
    DiscriminatorModel,
    HiddenStatesDiscriminator,
    LikelihoodDiscriminator,
    OwnBaseDiscriminator,
    PairwiseDiscriminator,
)
from lora_gan.discriminator.objectives import (
    Auxiliary,
    BradleyTerry,
    ClosenessBCE,
    ClosenessOrdinal,
    ClosenessRegression,
    Combined,
    DiscriminatorObjective,
    GanBCE,
    ListwiseSoftmax,
    PairwisePayoff,
    RewardRanking,
    RewardRegression,
)
from lora_gan.errors import LoraGANError
from lora_gan.losses import ClippedPPO, PolicyLoss, Reinforce
from lora_gan.module import LoraGANModule
from lora_gan.sampling import Sampling
from lora_gan.types import PromptBatch
from tests.helpers.steps import Build, fit, moved

OBJECTIVES: dict[str, Callable[[], DiscriminatorObjective]] = {
    "reward regression": RewardRegression,
    "yes or no": ClosenessBCE,
    "score": ClosenessRegression,
    "grades": ClosenessOrdinal,
    "real or generated": GanBCE,
    "ranking by reward": RewardRanking,
    "Bradley–Terry": BradleyTerry,
    "pair softmax": ListwiseSoftmax,
    "payoff": PairwisePayoff,
    "auxiliary": lambda: Auxiliary("share_of_a"),
    "combined": lambda: Combined([BradleyTerry(), Auxiliary("share_of_a")], [1.0, 0.5]),
}
ADVANTAGES: list[Callable[[], AdvantageEstimator]] = [
    MovingAverage,
    LeaveOneOut,
    lambda: GroupNormalised(scale_rewards="batch"),
    PredictedReward,
    ValueGAE,
]
POLICY_LOSSES: list[Callable[[], PolicyLoss]] = [
    Reinforce,
    lambda: ClippedPPO(num_iterations=1, num_minibatches=2, dual_clip=3.0),
    lambda: Reinforce(loss_type="dr_grpo"),
    lambda: ClippedPPO(3e-4, num_iterations=1, loss_type="grpo", importance_sampling_level="sequence"),
]
MODELS: dict[str, Callable[[str], DiscriminatorModel]] = {
    "adapter": lambda base: AdapterDiscriminator(),
    "own base": lambda base: OwnBaseDiscriminator(base, LoraSettings(2, 4)),
    "hidden states": lambda base: HiddenStatesDiscriminator(width=8, layers=1, heads=2),
    "likelihood": lambda base: LikelihoodDiscriminator(),
    "pairwise": lambda base: PairwiseDiscriminator(),
}
INTERCEPT = "discriminator.model.intercept"  # of the likelihood, which objectives that compare scores do not move


loaded = lru_cache(load_base)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the same folder hundreds of times would take most of the time."""
    for place in ("backbone", "discriminator.models"):
        monkeypatch.setattr(f"lora_gan.{place}.load_base", lambda *given: deepcopy(loaded(*given)))


def parameters(module: LoraGANModule) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def learners(module: LoraGANModule, model: str) -> set[str]:
    """Groups of parameters that a step has to move."""
    values = {"generator.value_head."} if module.generator.value_head is not None else set()
    adapter = {".discriminator.", "backbone.score_head."}
    adapters = {"adapter": adapter, "pairwise": adapter, "likelihood": {".discriminator."}}
    theirs = adapters.get(model, {"discriminator.model."})
    return {f".{GENERATOR}."} | values | theirs


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", MODELS)
def test_every_combination_runs_a_step(
    model: str, objective: str, build: Build, bases: dict[str, str], make_batch: Callable[..., PromptBatch]
) -> None:
    """All advantages, with the policy losses in turn: the report is finite, both roles move, and nothing else does.

    Each advantage meets each policy loss with every model and with every objective.
    """
    if OBJECTIVES[objective]().needs_auxiliary and not MODELS[model](bases["llama"]).has_auxiliary:
        with pytest.raises(LoraGANError, match="has no auxiliary head for the objective Auxiliary; choose another"):
            build(model=MODELS[model](bases["llama"]), objective=OBJECTIVES[objective]())
        return
    if OBJECTIVES[objective]().needs_comparison and not MODELS[model](bases["llama"]).compares:
        with pytest.raises(LoraGANError, match="does not compare a completion with its target"):
            build(model=MODELS[model](bases["llama"]), objective=OBJECTIVES[objective]())
        return
    batch = make_batch(("Say a", "a", "b"), ("Hi", "yes", "no"))
    turn = list(MODELS).index(model) + list(OBJECTIVES).index(objective)
    for place, advantage in enumerate(ADVANTAGES, turn):
        policy_loss = POLICY_LOSSES[place % len(POLICY_LOSSES)]
        module = build(
            model=MODELS[model](bases["llama"]),
            objective=OBJECTIVES[objective](),
            advantage=advantage(),
            policy_loss=policy_loss(),
            sampling=Sampling(max_new_tokens=3),
            adversarial=0.5,
            generator_lora=LoraSettings(2, 4, ["c_attn"]),
            discriminator_lora=LoraSettings(2, 4, ["c_attn"]),
        )
        before = parameters(module)
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        recorder, _ = fit(module, [batch], 1, MovingAverageBaseline())
        (report,) = recorder.reports
        assert all(math.isfinite(value) for value in report.values())
        assert {"loss/policy", "loss/discriminator", "reward/total", "discriminator/accuracy"} <= set(report)
        changed = moved(before, parameters(module))
        assert all(torch.isfinite(tensor).all() for tensor in parameters(module).values())
        wanted = learners(module, model)
        assert all(any(group in name for name in changed) for group in wanted)
        others = changed - {INTERCEPT} if model == "likelihood" else changed
        assert not changed & frozen and all(any(group in name for group in wanted) for name in others)
