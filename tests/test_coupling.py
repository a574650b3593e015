"""The gradient from the discriminator into the generator, against a relaxed pass built by hand, row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rounds import Build, fit, moved, state
from torch import Tensor
from torch.optim import AdamW

from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.coupling import StraightThrough
from lora_gan.errors import LoraGANError
from lora_gan.judges import AdapterJudge, AnswerAndTarget, HiddenStatesJudge, JudgeInput, PromptAndAnswer
from lora_gan.losses import straight_through
from lora_gan.tensors import lengths_mask, pad
from lora_gan.tree import grow_scored
from lora_gan.types import PromptBatch, Rollout

EOS = 256
TEMPERATURE, RELAXATION = 0.8, 0.7
READS = {"prompt and answer": PromptAndAnswer(), "answer and target": AnswerAndTarget()}
ANSWERS = [[98, EOS], [99, 100, 101], [EOS], [104, 105, 106, EOS]]  # the second one is truncated


@pytest.fixture
def batch(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    return make_batch(("Say a", "a"), ("Q: hello?", "hi"))


def rollout_of(answers: list[list[int]]) -> Rollout:
    rows = [torch.tensor(answer) for answer in answers]
    mask = lengths_mask(torch.tensor([len(row) for row in rows]), max(map(len, rows)))
    truncated = torch.tensor([answer[-1] != EOS for answer in answers])
    return Rollout(pad(rows), mask, torch.zeros(mask.shape), truncated, ("",) * len(rows), 2)


def coupled(backbone: Backbone, reads: JudgeInput, rollout: Rollout, batch: PromptBatch) -> Tensor:
    """What the round does."""
    answers = [list(rollout.answer_ids[2 * b : 2 * b + 2]) for b in range(len(batch))]
    with backbone.generator():
        tree = grow_scored(batch.prompt_ids, {"sampled": answers})
        predicted = backbone.predict(tree, {"sampled": TEMPERATURE})["sampled"]
        torch.manual_seed(7)
        return StraightThrough(RELAXATION)(backbone, AdapterJudge(reads), predicted, rollout, batch)


def by_hand(backbone: Backbone, reads: str, rollout: Rollout, batch: PromptBatch) -> Tensor:
    """Every answer in rows of its own, in one graph: G's logits → relaxed words → D's embeddings → −log σ(score)."""
    model, table = backbone.causal_lm, backbone.causal_lm.get_input_embeddings().weight
    torch.manual_seed(7)
    uniform = iter(torch.rand(int(rollout.mask.sum()), len(table)).clamp(1e-9, 1 - 1e-7))
    losses = []
    for n, answer in enumerate(rollout.answer_ids):
        prompt, target = batch.prompt_ids[n // 2], batch.target_ids[n // 2]
        with backbone.generator():
            logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        noise = torch.stack([next(uniform) for _ in answer])
        words = straight_through(logits, answer, RELAXATION, noise) @ table
        words = words if rollout.truncated[n] else words[:-1]
        before, after = (torch.tensor(backbone.tokenizer.encode(text)) for text in ("GEN: ", " || TAR: "))
        rows = [table[prompt], words, table[EOS][None]]
        if reads == "answer and target":
            rows = [table[before], words, table[after], table[target]]
        with backbone.discriminator():
            hidden = model.base_model(inputs_embeds=torch.cat(rows)[None]).last_hidden_state[0, -1]
            losses.append(-backbone.judge_head(hidden)[0].sigmoid().log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("reads", READS)
def test_value_and_gradient_are_those_of_a_relaxed_pass_by_hand(
    reads: str, backbone: Backbone, batch: PromptBatch
) -> None:
    """One truncated answer among finished ones, one that is EOS alone, at temperatures other than 1."""
    rollout = rollout_of(ANSWERS)
    generator = backbone.parameters_of(GENERATOR)
    loss, wanted = coupled(backbone, READS[reads], rollout, batch), by_hand(backbone, reads, rollout, batch)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    for found, expected in zip(
        torch.autograd.grad(loss, generator), torch.autograd.grad(wanted, generator), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
        assert expected.abs().max() > 1e-5


@pytest.mark.parametrize("reads", READS)
def test_the_gradient_reaches_the_generator_only(reads: str, backbone: Backbone, batch: PromptBatch) -> None:
    with backbone.generator():
        coupled(backbone, READS[reads], rollout_of(ANSWERS), batch).backward()  # type: ignore[no-untyped-call]
    touched = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in backbone.named_parameters() if f".{GENERATOR}." in name}


def test_answers_without_words_have_nothing_to_differentiate(backbone: Backbone, batch: PromptBatch) -> None:
    loss = coupled(backbone, PromptAndAnswer(), rollout_of([[EOS]] * 4), batch)
    assert loss.item() > 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, backbone.parameters_of(GENERATOR)))


def test_the_modes_are_restored(backbone: Backbone, batch: PromptBatch) -> None:
    with backbone.generator():
        coupled(backbone, PromptAndAnswer(), rollout_of(ANSWERS), batch)
        assert backbone._active == GENERATOR


def test_the_coupled_loss_alone_raises_the_discriminators_score(build: Build, batch: PromptBatch) -> None:
    """The discriminator does not learn; the generator moves nothing but itself."""
    module = build(
        supervised_weight=0.0,
        policy_weight=0.0,
        discriminator_updates=0,
        coupled_weight=1.0,
        answers_per_prompt=8,
        generator_optimizer=lambda p: AdamW(p, lr=1e-2, weight_decay=0.0),
    )
    before = state(module)
    recorder, _ = fit(module, [batch], 30)
    score = [report["judge/score_sampled"] for report in recorder.reports]
    assert sum(score[-5:]) / 5 > sum(score[:5]) / 5 + 0.3
    assert all(f".{GENERATOR}." in name for name in moved(before, recorder.weights[-1]))
    report = recorder.reports[0]
    assert report["loss/generator"] == report["loss/coupled"]


def test_a_judge_that_reads_whole_words_is_refused(build: Build) -> None:
    with pytest.raises(LoraGANError, match="HiddenStatesJudge reads whole words: set coupled_weight to 0"):
        build(judge=HiddenStatesJudge(), coupled_weight=1.0)
    with pytest.raises(LoraGANError, match="temperature of the straight-through"):
        StraightThrough(0.0)
