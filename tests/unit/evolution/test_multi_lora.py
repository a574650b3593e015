"""Multi-LoRA batching: each member's completions equal those that it samples alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from lora_gan.backbone import Backbone, LoraSettings
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.multi_lora import RowMapping, multi_lora, sample_population
from lora_gan.evolution.noise import Perturbed, RankOneNoise
from lora_gan.evolution.population import read_weights, write_weights
from lora_gan.sampling import Sampling, draw_uniform, sample
from lora_gan.types import Rollout
from tests.conftest import COMMON, WIDTHS, randomise


def population(backbone: Backbone, size: int) -> list[Weights]:
    members = []
    for _ in range(size):
        randomise(backbone)
        members.append(read_weights(backbone))
    return members


def prompts(backbone: Backbone) -> list[Tensor]:
    return [torch.tensor(backbone.tokenizer.encode(text)) for text in ("Hello, you", "Hi", "What is it?")]


def one_by_one(backbone: Backbone, members: list[Weights], k: int, how: Sampling, uniform: Tensor) -> list[Rollout]:
    rollouts = []
    for weights in members:
        write_weights(backbone, weights)
        with backbone.generator():
            rollouts.append(sample(backbone, prompts(backbone), k, how, uniform))
    return rollouts


def same(together: list[Rollout], alone: list[Rollout]) -> None:
    for mine, wanted in zip(together, alone, strict=True):
        assert mine.texts == wanted.texts
        assert torch.equal(mine.ids, wanted.ids) and torch.equal(mine.mask, wanted.mask)
        assert mine.truncated.tolist() == wanted.truncated.tolist()
        torch.testing.assert_close(mine.logprobs, wanted.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_batched_members_sample_as_alone(
    architecture: str, do_sample: bool, make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone(architecture)
    how = Sampling(max_new_tokens=12, do_sample=do_sample)
    members = population(backbone, 4)
    backbone.causal_lm.generation_config.eos_token_id = list(range(0, 257, 9))  # completions end at different steps
    uniform = draw_uniform(6, how, backbone.device, torch.Generator().manual_seed(0))
    before = read_weights(backbone)
    together = sample_population(backbone, members, prompts(backbone), 2, how, uniform)
    assert all(torch.equal(x.b, before[name].b) for name, x in read_weights(backbone).items())
    alone = one_by_one(backbone, members, 2, how, uniform)
    assert len({r.texts for r in alone}) > 1 and len({int(n) for r in alone for n in r.mask.sum(-1)}) > 2
    same(together, alone)


@pytest.mark.parametrize(
    "lora", [LoraSettings(4, 8, use_rslora=True), LoraSettings(4, 8, ["q_proj", "lm_head"])], ids=["rslora", "head"]
)
def test_members_of_another_shape_sample_as_alone(lora: LoraSettings, bases: dict[str, str]) -> None:
    torch.manual_seed(2)
    backbone, how = Backbone(bases["llama"], lora, lora), Sampling(max_new_tokens=8)
    members = population(backbone, 3)
    uniform = draw_uniform(6, how, backbone.device, torch.Generator().manual_seed(0))
    together = sample_population(backbone, members, prompts(backbone), 2, how, uniform)
    same(together, one_by_one(backbone, members, 2, how, uniform))


def test_changes_of_a_mean_sample_as_alone(architecture: str, make_backbone: Callable[..., Backbone]) -> None:
    """Members that are given by their mean and a change of rank 1."""
    backbone, how = make_backbone(architecture), Sampling(max_new_tokens=8)
    (mean,) = population(backbone, 1)
    members = Perturbed(mean, RankOneNoise(), 0.1, 0, 0, range(-1, 4))
    uniform = draw_uniform(6, how, backbone.device, torch.Generator().manual_seed(0))
    together = sample_population(backbone, members, prompts(backbone), 2, how, uniform)
    assert len({r.texts for r in together}) > 1
    same(together, one_by_one(backbone, list(members), 2, how, uniform))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_close(autocast: bool, make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(dtype="float32" if autocast else "bfloat16")
    how = Sampling(max_new_tokens=1, do_sample=False)
    members = population(backbone, 3)
    uniform = draw_uniform(3, how, backbone.device)
    with torch.autocast("cpu", torch.bfloat16, autocast, cache_enabled=False):  # as Lightning does
        together = sample_population(backbone, members, prompts(backbone), 1, how, uniform)
        alone = one_by_one(backbone, members, 1, how, uniform)
    for mine, wanted in zip(together, alone, strict=True):
        torch.testing.assert_close(mine.logprobs, wanted.logprobs, atol=0.1, rtol=0)


def test_equal_members_sample_equal_completions(backbone: Backbone) -> None:
    """Common random numbers: members differ by their weights alone."""
    how = Sampling(max_new_tokens=8, top_p=0.9)
    uniform = draw_uniform(6, how, backbone.device, torch.Generator().manual_seed(0))
    first, second = sample_population(backbone, [read_weights(backbone)] * 2, prompts(backbone), 2, how, uniform)
    assert first.texts == second.texts


def test_layers_are_restored_on_exit(backbone: Backbone) -> None:
    def logits() -> Tensor:
        with backbone.generator(), torch.no_grad():
            result: Tensor = backbone.causal_lm(torch.tensor([[1, 2, 3]])).logits
        return result

    own, members = read_weights(backbone), population(backbone, 2)
    write_weights(backbone, own)
    before = logits()
    with multi_lora(backbone, members, 1) as mapping:
        mapping(torch.tensor([0, 0]))
    assert torch.equal(logits(), before)


def test_rows_are_grouped_by_member() -> None:
    mapping = RowMapping(members=3, prompts=2)
    rows = torch.arange(5.0)[:, None, None] * torch.ones(5, 2, 1)  # (n, t, in)
    mapping(torch.tensor([0, 1, 1, 2, 5]))  # of members 0, 0, 0, 1, 2
    grouped = mapping.group(rows)
    assert grouped.shape == (3, 6, 1)
    assert grouped[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert grouped[1, :2, 0].tolist() == [3, 3] and grouped[2, :2, 0].tolist() == [4, 4]
    factor = torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    for x in (rows, rows[:, 0]):  # with and without an axis of tokens
        to = torch.zeros_like(x)
        mapping.add(to, mapping.group(x), factor)
        assert to.flatten(1)[:, 0].tolist() == [0, 1, 2, 30, 400]


def test_uniform_numbers_depend_on_the_seed_alone() -> None:
    how, device = Sampling(max_new_tokens=3), torch.device("cpu")
    draws = [draw_uniform(2, how, device, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)
    state = torch.get_rng_state()
    draw_uniform(2, how, device, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)


def test_beams_are_refused(backbone: Backbone) -> None:
    how = Sampling(num_beams=2)
    with pytest.raises(LoraGANError, match="num_beams"):
        sample_population(backbone, [read_weights(backbone)], prompts(backbone), 1, how, torch.zeros(3, 64, 1))


def test_experts_and_their_router_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """PEFT's adapters on them are no products with the layer's input; those of the attention are."""
    config = MixtralConfig(intermediate_size=48, num_key_value_heads=2, num_local_experts=4, **WIDTHS, **COMMON)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    everywhere, attention = LoraSettings(4, 8), LoraSettings(4, 8, ["q_proj", "v_proj"])
    with pytest.raises(LoraGANError, match=r"experts or their router.*mlp\.gate.*such as \[q_proj, v_proj\]"):
        read_weights(Backbone(str(tmp_path), everywhere, attention))
    backbone, how = Backbone(str(tmp_path), attention, everywhere), Sampling(max_new_tokens=4)
    members = population(backbone, 2)
    uniform = draw_uniform(6, how, backbone.device, torch.Generator().manual_seed(0))
    together = sample_population(backbone, members, prompts(backbone), 2, how, uniform)
    same(together, one_by_one(backbone, members, 2, how, uniform))
