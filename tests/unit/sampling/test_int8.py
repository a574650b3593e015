"""8-bit weights for sampling: close, independent of the batch, and honest about the policy that sampled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_gan.backbone import Backbone
from lora_gan.errors import LoraGANError
from lora_gan.generator import APPROX_KL, RATIO_CAP
from lora_gan.losses import ClippedPPO, Reinforce
from lora_gan.module import LoraGANModule
from lora_gan.sampling import Sampling, int8, sample
from lora_gan.sampling.int8 import int8_weights, quantizable
from lora_gan.tree import grow
from lora_gan.types import PromptBatch
from tests.conftest import randomise
from tests.helpers.steps import fit

INT8 = Sampling(max_new_tokens=8, base="int8")


@pytest.mark.parametrize("steps", [127, 63])
@pytest.mark.parametrize("make", [nn.Linear, lambda inputs, outputs: Conv1D(outputs, inputs)], ids=["Linear", "Conv1D"])
def test_each_row_is_close_whatever_its_size(
    make: Callable[[int, int], nn.Module], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "_steps", lambda: steps)
    torch.manual_seed(0)
    layer = make(64, 32).requires_grad_(False)
    x = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    exact, found = layer(x) - layer.bias, int8._product(int8._quantized(layer), None, x)
    assert ((found - exact).norm(dim=1) < 0.03 * exact.norm(dim=1)).all()


def test_by_hand() -> None:
    """W = (1, ½) has the scale 1/127 and becomes (127, 64); x = (2, −1) becomes (127, −63) times 2/127."""
    layer = nn.Linear(2, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[1.0, 0.5]]))
    found = int8._product(int8._quantized(layer), None, torch.tensor([[2.0, -1.0]]))
    assert found.item() == pytest.approx((127 * 127 - 64 * 63) / 127 * 2 / 127, rel=1e-6)


def test_a_row_does_not_depend_on_the_others() -> None:
    layer = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(4, 64)
    alone = int8._product(int8._quantized(layer), layer.bias, x[:1])
    x[1:] *= 1000
    assert torch.equal(int8._product(int8._quantized(layer), layer.bias, x)[:1], alone)


def test_a_row_of_zeros_gives_the_bias() -> None:
    layer = nn.Linear(64, 32).requires_grad_(False)
    found = int8._product(int8._quantized(layer), layer.bias, torch.zeros(1, 3, 64))
    assert found.shape == (1, 3, 32) and torch.equal(found[0, 0], layer.bias)


def test_weights_are_quantised_once_and_anew_when_they_change() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    first = int8._quantized(layer)
    assert int8._quantized(layer) is first
    layer.weight.mul_(2)
    torch.testing.assert_close(int8._quantized(layer).scale, 2 * first.scale)


def test_adapters_stay_in_float(backbone: Backbone) -> None:
    backbone.take_snapshot()  # whose matrices are frozen, too
    layers = quantizable(backbone.causal_lm)
    assert len(layers) == 4 * backbone.causal_lm.config.num_hidden_layers + 1
    assert backbone.causal_lm.get_output_embeddings() in layers
    with int8_weights(backbone.causal_lm):
        assert all("forward" in vars(layer) for layer in layers)
    assert not any("forward" in vars(layer) for layer in layers)


def test_the_log_probabilities_are_those_of_the_policy_that_sampled(
    architecture: str, make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone(architecture)
    prompts = [torch.tensor([65, 66, 67]), torch.tensor([70, 71, 72, 73])]
    torch.manual_seed(3)
    with backbone.generator(), torch.no_grad():
        rollout = sample(backbone, prompts, 3, INT8)
        tree = grow(prompts, {"sampled": [list(rollout.completion_ids[:3]), list(rollout.completion_ids[3:])]})
        learned = backbone.logprobs(tree)["sampled"]
        with int8_weights(backbone.causal_lm):
            sampled = backbone.logprobs(tree)["sampled"]
    torch.testing.assert_close(rollout.logprobs, sampled, atol=1e-4, rtol=0)
    assert 1e-5 < (rollout.logprobs - learned).abs().max() < 0.3


def test_only_a_float32_model_on_a_cpu(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(dtype="bfloat16")
    with backbone.generator(), pytest.raises(LoraGANError, match=r"float32.*bfloat16.*sampling.base: null"):
        sample(backbone, [torch.tensor([65])], 1, INT8)


# the module


def test_the_importance_ratios_are_capped(build: Callable[..., LoraGANModule]) -> None:
    assert build(sampling=INT8).generator.policy_loss.ratio_cap == RATIO_CAP
    assert build().generator.policy_loss.ratio_cap is None
    assert build(sampling=INT8, policy_loss=Reinforce(ratio_cap=1.5)).generator.policy_loss.ratio_cap == 1.5
    assert build(sampling=INT8, policy_loss=ClippedPPO()).generator.policy_loss.ratio_cap == RATIO_CAP
    with pytest.raises(LoraGANError, match=r"sampling.base.*ratio_cap"):
        build(sampling=INT8, policy_loss=Reinforce())


def test_validation_is_greedy_and_exact(build: Callable[..., LoraGANModule]) -> None:
    assert build(sampling=INT8).greedy.base is None


def test_a_step_logs_how_far_the_two_policies_are_apart(
    build: Callable[..., LoraGANModule], make_batch: Callable[..., PromptBatch]
) -> None:
    batch = make_batch(("Hello", "you"), ("What", "ever"))
    apart = [
        fit(build(sampling=how), [batch], 1)[0].reports[0][APPROX_KL] for how in (INT8, Sampling(max_new_tokens=8))
    ]
    assert abs(apart[1]) < 1e-6 < apart[0] < 0.05


def test_ppos_first_update_is_reinforces(build: Callable[..., LoraGANModule], batch: PromptBatch) -> None:
    """With the same weights for what the other policy sampled."""
    moved = []
    for loss in (Reinforce(ratio_cap=0.98), ClippedPPO(num_iterations=1, ratio_cap=0.98)):
        module = build(sampling=INT8, policy_loss=loss, supervised=0.0)
        randomise(module.backbone)
        recorder, _ = fit(module, [batch], 1)
        moved.append(recorder)
    reinforce, ppo = (recorder.reports[0] for recorder in moved)
    assert 0 < reinforce["policy/ratio_capped"] < 1 and reinforce["policy/mismatch_kl"] > 0
    for name in ("policy/ratio_capped", "policy/mismatch_kl"):
        assert ppo[name] == pytest.approx(reinforce[name], rel=1e-3)
    assert ppo["policy/ratio"] == pytest.approx(1, abs=1e-5) and ppo["policy/clip_fraction"] == 0
    assert ppo["policy/approx_kl"] < 1e-8 < reinforce["policy/approx_kl"] == reinforce["policy/mismatch_kl"]
    assert ppo["generator/grad_norm"] == pytest.approx(reinforce["generator/grad_norm"], rel=1e-4)


def test_ppo_against_the_policy_that_sampled(build: Callable[..., LoraGANModule], batch: PromptBatch) -> None:
    module = build(sampling=INT8, policy_loss=ClippedPPO(num_iterations=1, ratio_cap=None), supervised=0.0)
    randomise(module.backbone)
    recorder, _ = fit(module, [batch], 1)
    assert "policy/mismatch_kl" not in recorder.reports[0] and recorder.reports[0]["policy/ratio"] != 1
