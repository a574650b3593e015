"""Engines: the completions of another library, with the log-probabilities that the model gives them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lora_gan.backbone import Backbone
from lora_gan.engines import ContinuousBatching, Vllm, rollout_of
from lora_gan.errors import LoraGANError
from lora_gan.losses import ClippedPPO, Reinforce
from lora_gan.sampling import Sampling, sample
from lora_gan.tree import grow
from lora_gan.types import PromptBatch, Rollout
from tests.conftest import randomise
from tests.helpers.steps import Build, fit

SMALL = {"num_blocks": 128, "page_size": 8, "max_batch_tokens": 64}
HOW = Sampling(max_new_tokens=6, temperature=1.5)
PROMPTS = [torch.tensor([72, 105, 33]), torch.tensor([65])]


def drawn(backbone: Backbone, seed: int, k: int = 5) -> Rollout:
    torch.manual_seed(seed)
    with backbone.generator():
        return ContinuousBatching(**SMALL)(backbone, PROMPTS, k, HOW)  # type: ignore[arg-type]


@pytest.fixture
def backbone(make_backbone: Callable[..., Backbone]) -> Backbone:
    backbone = make_backbone()
    randomise(backbone)
    return backbone


def test_a_rollout_by_hand(backbone: Backbone) -> None:
    """257 tokens, EOS is 256: the second ends early, and a token that does not exist ends the third as EOS."""
    h, i, mark = backbone.tokenizer.encode("Hi!")
    found = rollout_of(
        backbone,
        [([h, i], [-1.0, -2.0]), ([mark, 256, 9], [-3.0, -4.0, -9.0]), ([300], [-5.0])],
        1,
        Sampling(max_new_tokens=2),
        torch.device("cpu"),
    )
    assert found.ids.tolist() == [[h, i], [mark, 256], [256, 0]]
    assert found.mask.tolist() == [[True, True], [True, True], [True, False]]
    assert found.logprobs.tolist() == [[-1.0, -2.0], [-3.0, -4.0], [-5.0, 0.0]]
    assert found.truncated.tolist() == [True, False, False]
    assert found.texts == ("Hi", "!", "")


def test_continuous_batching_says_how_likely_its_tokens_were(backbone: Backbone) -> None:
    """By the generator, at the temperature, as a forward pass says; and the model is afterwards as before."""
    with backbone.generator():
        before = sample(backbone, PROMPTS, 2, Sampling(max_new_tokens=6, do_sample=False))
    rollout = drawn(backbone, 0)
    assert len(rollout) == 10 and rollout.mask.shape[1] <= 6
    with backbone.generator(), torch.no_grad():
        wanted = backbone.logprobs(grow(PROMPTS, {"sampled": rollout.by_prompt(2)}), {"sampled": 1.5})["sampled"]
        after = sample(backbone, PROMPTS, 2, Sampling(max_new_tokens=6, do_sample=False))
    torch.testing.assert_close(rollout.logprobs, wanted, atol=1e-4, rtol=0)
    assert after.texts == before.texts
    torch.testing.assert_close(after.logprobs, before.logprobs)


def test_continuous_batching_follows_the_seed_and_leaves_the_random_numbers(backbone: Backbone) -> None:
    first, again, other = drawn(backbone, 0), drawn(backbone, 0), drawn(backbone, 1)
    assert torch.equal(first.ids, again.ids) and first.texts != other.texts
    following = torch.rand(1)
    drawn(backbone, 1)
    assert torch.equal(following, torch.rand(1)), "whatever it draws itself"


@pytest.mark.parametrize("loss", [None, ClippedPPO(num_iterations=2)])
def test_a_run_corrects_for_the_engine(loss: ClippedPPO | None, build: Build, batch: PromptBatch) -> None:
    module = build(engine=ContinuousBatching(**SMALL), policy_loss=loss, num_generations=2)  # type: ignore[arg-type]
    assert module.generator.policy_loss.ratio_cap == 2
    recorder, _ = fit(module, [batch], 2)
    for report in recorder.reports:
        assert abs(report["policy/mismatch_kl"]) < 1e-6 and report["policy/ratio_capped"] == 0
    assert all(output.rollout.logprobs.any() for output in recorder.outputs)


def test_what_an_engine_cannot_do_is_refused(build: Build) -> None:
    engine = ContinuousBatching(**SMALL)  # type: ignore[arg-type]
    for setting in ({"top_p": 0.9}, {"top_k": 5}, {"do_sample": False}, {"num_beams": 2}, {"base": "int8"}):
        with pytest.raises(LoraGANError, match="samples with temperature and max_new_tokens alone"):
            build(engine=engine, sampling=Sampling(**setting))  # type: ignore[arg-type]
    with pytest.raises(LoraGANError, match="give Reinforce a ratio_cap"):
        build(engine=engine, policy_loss=Reinforce())
    with pytest.raises(LoraGANError, match="needs the package vllm and a GPU"):
        build(engine=Vllm())
