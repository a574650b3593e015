"""Weights for decoding compute what PEFT computes and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft.tuners import lora
from torch import Tensor

from lora_gan.backbone import Backbone, LoraSettings
from lora_gan.evolution.multi_lora import multi_lora
from lora_gan.evolution.population import read_weights
from lora_gan.sampling import Sampling, weights
from lora_gan.sampling.weights import decoding_weights

IDS = torch.tensor([[72, 101, 108, 108, 111]])
MANY = 10**9  # tokens: merging pays


def logits(backbone: Backbone) -> Tensor:
    found: Tensor = backbone.causal_lm(input_ids=IDS).logits
    return found


def patched(backbone: Backbone) -> list[str]:
    return [n for n, m in backbone.lm.named_modules() if type(m) is lora.Linear and "forward" in vars(m)]


@pytest.mark.parametrize("merge", [True, False, None])
def test_the_same_logits_on_all_architectures(
    merge: bool | None, architecture: str, make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone(architecture)
    before = {name: p.clone() for name, p in backbone.lm.named_parameters()}
    with backbone.generator(), torch.no_grad():
        plain = logits(backbone)
        with decoding_weights(backbone.causal_lm, Sampling(merge_lora=merge), MANY):
            assert patched(backbone)
            torch.testing.assert_close(logits(backbone), plain, atol=2e-5, rtol=1e-5)
        assert torch.equal(logits(backbone), plain) and not patched(backbone)
    assert all(torch.equal(p, before[name]) for name, p in backbone.lm.named_parameters())


def test_nothing_is_added_to_the_base_itself(backbone: Backbone) -> None:
    with backbone.reference(), decoding_weights(backbone.causal_lm, Sampling(), MANY):
        assert not patched(backbone)


def test_dora_is_left_to_peft(bases: dict[str, str]) -> None:
    backbone = Backbone(bases["gpt2"], LoraSettings(4, 8, use_dora=True), LoraSettings(2, 4))
    with backbone.generator(), torch.no_grad():
        plain = logits(backbone)
        with decoding_weights(backbone.causal_lm, Sampling(), MANY):
            assert not patched(backbone)
            torch.testing.assert_close(logits(backbone), plain, atol=2e-5, rtol=1e-5)


def test_the_members_of_a_population_keep_their_own_updates(backbone: Backbone) -> None:
    with backbone.generator(), torch.no_grad(), multi_lora(backbone, [read_weights(backbone)], 1) as mapping:
        mapping(torch.zeros(1, dtype=torch.long))
        forwards = {n: vars(m)["forward"] for n, m in backbone.lm.named_modules() if type(m) is lora.Linear}
        plain = logits(backbone)
        with decoding_weights(backbone.causal_lm, Sampling(), MANY):
            found = {n: vars(m)["forward"] for n, m in backbone.lm.named_modules() if type(m) is lora.Linear}
            assert found == forwards
            torch.testing.assert_close(logits(backbone), plain, atol=2e-5, rtol=1e-5)


def test_16_bits_are_not_merged_by_default(backbone: Backbone) -> None:
    """An update below half a step of bfloat16 would be rounded away; added beside, it is kept."""
    layer = next(m for m in backbone.lm.modules() if type(m) is lora.Linear)
    weight = layer.base_layer.weight
    assert weights._merges(weight, Sampling(), MANY)
    assert not weights._merges(weight, Sampling(), 1), "for one token it does not pay"
    assert not weights._merges(weight.bfloat16(), Sampling(), MANY)
    assert weights._merges(weight.bfloat16(), Sampling(merge_lora=True), MANY)
    with torch.autocast("cpu", torch.bfloat16):
        assert not weights._merges(weight, Sampling(), MANY)


@pytest.mark.parametrize("merge", [True, False])
def test_under_autocast(merge: bool, backbone: Backbone) -> None:
    """As close to the exact logits as PEFT's own path in 16 bits."""
    with backbone.generator(), torch.no_grad():
        exact = logits(backbone)
        with torch.autocast("cpu", torch.bfloat16):
            plain = logits(backbone).float()
            with decoding_weights(backbone.causal_lm, Sampling(merge_lora=merge), MANY):
                found = logits(backbone).float()
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()
