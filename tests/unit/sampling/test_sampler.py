"""The sampler: what transformers would say, drawn faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan.backbone import Backbone, LoraSettings
from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.sampling import Sampling, choice, decoder, eos_ids, prepare, sample, sampler
from lora_gan.sampling.choice import Choice, choose
from lora_gan.tree import grow
from lora_gan.types import Rollout

EOS = 256


def prompts(backbone: Backbone) -> list[Tensor]:
    texts = ["Hello, you", "Hi", "What is the capital of France?"]
    return [torch.tensor(backbone.tokenizer.encode(text)) for text in texts]


def generate(backbone: Backbone, prompt: Tensor, count: int) -> list[int]:
    """transformers' own greedy completion to one prompt, without padding."""
    ids = prompt[None]
    completion = backbone.causal_lm.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return completion[0, len(prompt) :].tolist()


def completions(rollout: Rollout) -> list[list[int]]:
    return [completion.tolist() for completion in rollout.completion_ids]


def equal_but_for_rounding(left: Rollout, right: Rollout) -> None:
    assert completions(left) == completions(right)
    assert left.texts == right.texts
    assert left.truncated.tolist() == right.truncated.tolist()
    torch.testing.assert_close(left.logprobs, right.logprobs, atol=1e-5, rtol=0)


def ends_early(free: list[list[int]], count: int) -> int:
    """The token that, were it an EOS, would end the most completions at different steps."""

    def ends(token: int) -> set[int]:
        return {completion.index(token) if token in completion else count for completion in free}

    return max((token for completion in free for token in completion), key=lambda token: len(ends(token)))


# greedy


def test_greedy_equals_generate(architecture: str, make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(architecture)
    greedy = Sampling(max_new_tokens=8, do_sample=False)
    with backbone.generator():
        wanted = [generate(backbone, prompt, 8) for prompt in prompts(backbone)]
        assert completions(sample(backbone, prompts(backbone), 1, greedy)) == wanted

        ends = [ends_early(wanted, 8), EOS]
        backbone.causal_lm.generation_config.eos_token_id = ends
        wanted = [generate(backbone, prompt, 8) for prompt in prompts(backbone)]
        rollout = sample(backbone, prompts(backbone), 1, greedy)
    lengths = {len(completion) for completion in wanted}
    assert min(lengths) < 8 and len(lengths) > 1, "some completions should end before others"
    assert completions(rollout) == wanted
    assert rollout.truncated.tolist() == [completion[-1] not in ends for completion in wanted]


def test_greedy_equals_generate_on_the_base(backbone: Backbone) -> None:
    with backbone.reference():
        rollout = sample(backbone, prompts(backbone), 1, Sampling(max_new_tokens=6, do_sample=False))
        assert completions(rollout) == [generate(backbone, prompt, 6) for prompt in prompts(backbone)]


def test_prompts_of_one_length_need_no_mask(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("llama")
    same = [torch.tensor([65, 66, 67]), torch.tensor([70, 71, 72])]
    with backbone.generator():
        rollout = sample(backbone, same, 1, Sampling(max_new_tokens=8, do_sample=False))
        assert completions(rollout) == [generate(backbone, prompt, 8) for prompt in same]


# what a rollout says about itself


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_scoring_pass(
    temperature: float, architecture: str, make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone(architecture)
    asked = prompts(backbone)
    backbone.causal_lm.generation_config.eos_token_id = [*range(0, 256, 9)]
    torch.manual_seed(5)
    with backbone.generator(), torch.no_grad():
        rollout = sample(backbone, asked, 3, Sampling(max_new_tokens=8, temperature=temperature))
        rows = [list(rollout.completion_ids[3 * b : 3 * b + 3]) for b in range(len(asked))]
        scored = backbone.logprobs(grow(asked, {"sampled": rows}), {"sampled": temperature})["sampled"]
    assert len(set(rollout.mask.sum(-1).tolist())) > 1
    torch.testing.assert_close(rollout.logprobs, scored, atol=1e-4, rtol=0)


def test_a_rollout_is_consistent(backbone: Backbone) -> None:
    torch.manual_seed(6)
    backbone.causal_lm.generation_config.eos_token_id = [*range(0, 256, 9)]
    with backbone.generator():
        rollout = sample(backbone, prompts(backbone), 5, Sampling(max_new_tokens=10))
    assert len(rollout) == 15 and rollout.num_generations == 5
    ends = {*range(0, 256, 9), EOS}
    for n, completion in enumerate(completions(rollout)):
        assert 1 <= len(completion) <= 10
        assert not ends & set(completion[:-1]), "nothing stands behind EOS"
        assert (completion[-1] in ends) != rollout.truncated[n].item()
        assert rollout.texts[n] == backbone.tokenizer.decode(completion, skip_special_tokens=True)
    assert (rollout.ids[~rollout.mask] == 0).all() and (rollout.logprobs[~rollout.mask] == 0).all()
    assert (rollout.logprobs[rollout.mask] < 0).all()
    assert 0 < rollout.truncated.sum() < 15


def test_rows_that_end_leave_and_nothing_else_changes(
    architecture: str, make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone(architecture)
    backbone.causal_lm.generation_config.eos_token_id = [*range(0, 256, 6)]
    prepare(backbone)  # takes steps of its own
    rollouts = {}
    sizes: dict[float, list[int]] = {0.0: [], 1.0: []}
    step = decoder.Decoder.step
    for density in sizes:

        def counted(self: decoder.Decoder, token: Tensor, density: float = density) -> Tensor:
            sizes[density].append(len(token))
            return step(self, token)

        monkeypatch.setattr(decoder.Decoder, "step", counted)
        monkeypatch.setattr(sampler, "DENSITY", density)
        torch.manual_seed(7)
        with backbone.generator():
            rollouts[density] = sample(backbone, prompts(backbone), 3, Sampling(max_new_tokens=8))
    equal_but_for_rounding(rollouts[0.0], rollouts[1.0])
    assert set(sizes[0.0]) == {9}, "at density 0 everybody stays"
    unfinished = [int((rollouts[1.0].mask.sum(-1) > t).sum()) for t in range(1, rollouts[1.0].mask.shape[1])]
    assert sizes[1.0] == unfinished and min(unfinished) < 9, "at density 1 only the unfinished go on"


def test_one_seed_one_rollout(backbone: Backbone) -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with backbone.generator():
            drawn.append(sample(backbone, prompts(backbone), 2, Sampling(max_new_tokens=8, top_p=0.9)))
    assert torch.equal(drawn[0].ids, drawn[1].ids) and torch.equal(drawn[0].logprobs, drawn[1].logprobs)
    assert completions(drawn[0]) != completions(drawn[2])


def test_every_completion_of_a_prompt_is_drawn_from_its_distribution(backbone: Backbone) -> None:
    """First tokens of 4,000 completions against the softmax of transformers' logits."""
    prompt = prompts(backbone)[0]
    torch.manual_seed(8)
    with backbone.generator(), torch.no_grad():
        rollout = sample(backbone, [prompt], 4000, Sampling(max_new_tokens=1))
        wanted = backbone.causal_lm(input_ids=prompt[None]).logits[0, -1].softmax(-1)
    found = torch.bincount(rollout.ids[:, 0], minlength=257) / 4000
    assert (found - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_several_ends_are_honoured(backbone: Backbone) -> None:
    with backbone.generator():
        free = generate(backbone, prompts(backbone)[0], 6)
        first = free.index(free[3])
        backbone.causal_lm.generation_config.eos_token_id = [free[3], 255]
        rollout = sample(backbone, prompts(backbone)[:1], 1, Sampling(max_new_tokens=6, do_sample=False))
    assert completions(rollout) == [free[: first + 1]]
    assert eos_ids(backbone) == sorted({free[3], 255, EOS})


def test_padding_rows_of_the_embedding_are_never_drawn(bases: dict[str, str], tmp_path: Path) -> None:
    """They would vanish from the text, while policy and discriminator see them."""
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model.resize_token_embeddings(400, mean_resizing=False)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bases["llama"]).save_pretrained(tmp_path)
    padded = Backbone(str(tmp_path), LoraSettings(2, 4), LoraSettings(2, 4))
    asked = prompts(padded)
    for how in (Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, num_beams=3)):
        with padded.generator(), torch.no_grad():
            rollout = sample(padded, asked, 3, how)
            rows = [list(rollout.completion_ids[3 * b : 3 * b + 3]) for b in range(len(asked))]
            scored = padded.logprobs(grow(asked, {"sampled": rows}))["sampled"]
        assert rollout.ids.max() < 257
        torch.testing.assert_close(rollout.logprobs, scored, atol=1e-4, rtol=0)  # of one distribution


@pytest.mark.parametrize(
    "how", [Sampling(max_new_tokens=4), Sampling(max_new_tokens=4, do_sample=False), Sampling(4, num_beams=2)], ids=str
)
def test_nan_in_an_adapter_stops_sampling(how: Sampling, backbone: Backbone) -> None:
    """It gave the last token of the vocabulary for ever, or an empty completion."""
    with torch.no_grad():
        next(p for name, p in backbone.lm.named_parameters() if "lora_B.generator" in name)[0, 0] = torch.nan
    with backbone.generator(), pytest.raises(NonFiniteError, match="NaN"):
        sample(backbone, prompts(backbone), 1, how)


def test_generation_settings_of_the_model_do_not_leak_in(backbone: Backbone) -> None:
    beams = Sampling(max_new_tokens=8, num_beams=3)
    with backbone.generator():
        wanted = sample(backbone, prompts(backbone), 2, beams)
        settings = backbone.causal_lm.generation_config
        settings.no_repeat_ngram_size, settings.suppress_tokens = 1, wanted.ids[0, :3].tolist()
        found = sample(backbone, prompts(backbone), 2, beams)
    assert completions(found) == completions(wanted)
    assert backbone.causal_lm.generation_config is settings


def test_the_sampler_keeps_a_fresh_number_for_rows_that_reject_all(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that was rejected is no longer uniform, so it may not choose again."""
    seen = []

    def watched(logits: Tensor, how: Sampling, uniform: Tensor) -> Choice:
        seen.append(uniform)
        return choose(logits, how, uniform)

    monkeypatch.setattr(sampler, "choose", watched)
    with backbone.generator():
        sample(backbone, prompts(backbone), 2, Sampling(max_new_tokens=2, top_p=0.3))
    assert seen[0].shape == (6, choice.TRIES + 1)


# mistakes


def test_a_prompt_too_long_for_the_context_names_the_remedy(backbone: Backbone) -> None:
    """The context has 256 places: 250 + 6 fit, 250 + 7 do not."""
    prompt = torch.arange(250)
    with backbone.generator():
        assert len(sample(backbone, [prompt], 1, Sampling(max_new_tokens=6))) == 1
        with pytest.raises(LoraGANError, match=r"250 tokens.*256.*max_prompt_tokens or sampling.max_new_tokens"):
            sample(backbone, [prompt], 1, Sampling(max_new_tokens=7))


# beam search


def test_beam_search_equals_generate(architecture: str, make_backbone: Callable[..., Backbone]) -> None:
    """The two best of four beams for each prompt, as transformers finds them for the prompt alone."""
    backbone = make_backbone(architecture)
    asked = prompts(backbone)
    backbone.causal_lm.generation_config.eos_token_id = ends = [*range(0, 256, 2), EOS]
    with backbone.generator():
        rollout = sample(backbone, asked, 2, Sampling(max_new_tokens=6, num_beams=4))
        wanted = []
        for prompt in asked:
            found = backbone.causal_lm.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                num_beams=4,
                num_return_sequences=2,
                do_sample=False,
                max_new_tokens=6,
                pad_token_id=1000,
            )
            wanted += [[token for token in row.tolist() if token != 1000] for row in found[:, len(prompt) :]]
    assert completions(rollout) == wanted
    assert rollout.num_generations == 2 and len(rollout) == 6
    assert rollout.truncated.tolist() == [completion[-1] not in ends for completion in wanted]
    assert len({len(completion) for completion in wanted}) > 1, "some end before others"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_beams_have_the_log_probabilities_of_a_scoring_pass(temperature: float, backbone: Backbone) -> None:
    """Row by row through transformers, at the sampling temperature, which the search itself knows nothing of."""
    asked = prompts(backbone)
    backbone.causal_lm.generation_config.eos_token_id = [*range(0, 256, 5), EOS]
    with backbone.generator(), torch.no_grad():
        rollout = sample(backbone, asked, 3, Sampling(max_new_tokens=5, num_beams=3, temperature=temperature))
        for n, completion in enumerate(rollout.completion_ids):
            prompt = asked[n // 3]
            logits = backbone.causal_lm(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            wanted = (logits / temperature).log_softmax(-1).gather(1, completion[:, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs[n, : len(completion)], wanted, atol=1e-4, rtol=0)
    assert (rollout.logprobs[~rollout.mask] == 0).all()
    assert len(set(map(tuple, completions(rollout)))) == 9, "the completions to a prompt differ"


def test_more_completions_than_beams_are_refused(backbone: Backbone) -> None:
    with backbone.generator(), pytest.raises(LoraGANError, match=r"2 beams cannot give 3 completions.*num_beams"):
        sample(backbone, prompts(backbone), 3, Sampling(max_new_tokens=2, num_beams=2))
    with pytest.raises(LoraGANError, match="num_beams must be at least 1"):
        Sampling(num_beams=0)
