"""The gradient from the discriminator into the generator, against a relaxed pass built by hand, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from lora_gan import head as heads
from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.discriminator import (
    AdapterDiscriminator,
    CompletionAndTarget,
    DiscriminatorModel,
    HiddenStatesDiscriminator,
    InputFormat,
    PromptAndCompletion,
)
from lora_gan.discriminator.straight_through import StraightThrough
from lora_gan.errors import LoraGANError
from lora_gan.losses import gumbel_noise
from lora_gan.tensors import lengths_mask, pad
from lora_gan.tree import PromptTree, grow_scored
from lora_gan.types import DiscriminatorBatch, PromptBatch, Rollout
from tests.helpers.steps import Build, fit, moved, state

EOS = 256
TEMPERATURE, RELAXATION = 0.8, 0.7
READS = {"prompt and completion": PromptAndCompletion(), "completion and target": CompletionAndTarget()}
ANSWERS = [[98, EOS], [99, 100, 101], [EOS], [104, 105, 106, EOS]]  # the second one is truncated


@pytest.fixture
def batch(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    return make_batch(("Say a", "a"), ("Q: hello?", "hi"))


def rollout_of(completions: list[list[int]]) -> Rollout:
    rows = [torch.tensor(completion) for completion in completions]
    mask = lengths_mask(torch.tensor([len(row) for row in rows]), max(map(len, rows)))
    truncated = torch.tensor([completion[-1] != EOS for completion in completions])
    return Rollout(pad(rows), mask, torch.zeros(mask.shape), truncated, ("",) * len(rows), 2)


def coupled(backbone: Backbone, reads: InputFormat, rollout: Rollout, batch: PromptBatch) -> Tensor:
    """What the step does."""
    completions = [list(rollout.completion_ids[2 * b : 2 * b + 2]) for b in range(len(batch))]
    with backbone.generator():
        tree = grow_scored(batch.prompt_ids, {"sampled": completions})
        predicted = backbone.predict(tree, {"sampled": TEMPERATURE})["sampled"]
        torch.manual_seed(7)
        return StraightThrough(RELAXATION)(backbone, AdapterDiscriminator(reads), predicted, rollout, batch)


def relaxed(logits: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """One-hot rows in value, with the gradient of a Gumbel-softmax given the sampled tokens."""
    logp = logits.log_softmax(-1)
    soft = ((logp + gumbel_noise(logp.detach(), ids, uniform)) / RELAXATION).softmax(-1)
    hard = torch.nn.functional.one_hot(ids, logits.shape[-1])
    return hard + soft - soft.detach()


def by_hand(backbone: Backbone, reads: str, rollout: Rollout, batch: PromptBatch) -> Tensor:
    """Every completion in rows of its own, in one graph: G's logits → relaxed words → D's embeddings → −log
    σ(score).
    """
    model, table = backbone.causal_lm, backbone.causal_lm.get_input_embeddings().weight
    torch.manual_seed(7)
    uniform = iter(torch.rand(int(rollout.mask.sum()), len(table)).clamp(1e-9, 1 - 1e-7))
    losses = []
    for n, completion in enumerate(rollout.completion_ids):
        prompt, target = batch.prompt_ids[n // 2], batch.target_ids[n // 2]
        with backbone.generator():
            logits = (
                model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            )
        noise = torch.stack([next(uniform) for _ in completion])
        words = relaxed(logits, completion, noise) @ table
        words = words if rollout.truncated[n] else words[:-1]
        before, after = (torch.tensor(backbone.tokenizer.encode(text)) for text in ("GEN: ", " || TAR: "))
        rows = [table[prompt], words, table[EOS][None]]
        if reads == "completion and target":
            rows = [table[before], words, table[after], table[target]]
        with backbone.discriminator():
            hidden = model.base_model(inputs_embeds=torch.cat(rows)[None]).last_hidden_state[0, -1]
            losses.append(-backbone.score_head(hidden)[0].sigmoid().log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize("reads", READS)
def test_value_and_gradient_are_those_of_a_relaxed_pass_by_hand(
    reads: str, rows: int, backbone: Backbone, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One truncated completion among finished ones, one that is EOS alone, at temperatures other than 1.

    The random numbers are the same for two tokens at a time as for all at once.
    """
    monkeypatch.setattr(heads, "NUMBERS", rows * backbone.vocabulary)
    monkeypatch.setattr(heads, "ROWS", 1)
    rollout = rollout_of(ANSWERS)
    generator = backbone.parameters_of(GENERATOR)
    loss, wanted = coupled(backbone, READS[reads], rollout, batch), by_hand(backbone, reads, rollout, batch)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    for found, expected in zip(
        torch.autograd.grad(loss, generator), torch.autograd.grad(wanted, generator), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
        assert expected.abs().max() > 1e-5


def test_float16_loses_no_small_gradient(backbone: Backbone, batch: PromptBatch) -> None:
    """The score depends so little on the states that its gradient there is below the smallest number of float16."""
    reads, rollout, scale = READS["prompt and completion"], rollout_of(ANSWERS), 2.0**16  # as GradScaler's is at first
    with torch.no_grad():
        backbone.score_head.weight.mul_(1e-6)
    wanted, found = (
        torch.cat([(g / scale).flatten() for g in torch.autograd.grad(loss, backbone.parameters_of(GENERATOR))])
        for loss in (coupled(backbone, reads, rollout, batch) * scale, in_half(backbone, reads, rollout, batch) * scale)
    )
    assert 0 < wanted.norm() < 1e-5
    assert (found - wanted).norm() < 0.15 * wanted.norm()


def in_half(backbone: Backbone, reads: InputFormat, rollout: Rollout, batch: PromptBatch) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return coupled(backbone, reads, rollout, batch)


@pytest.mark.parametrize("reads", READS)
def test_the_gradient_reaches_the_generator_only(reads: str, backbone: Backbone, batch: PromptBatch) -> None:
    with backbone.generator():
        coupled(backbone, READS[reads], rollout_of(ANSWERS), batch).backward()  # type: ignore[no-untyped-call]
    touched = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert touched == {name for name, _ in backbone.named_parameters() if f".{GENERATOR}." in name}


def test_completions_without_words_have_nothing_to_differentiate(backbone: Backbone, batch: PromptBatch) -> None:
    loss = coupled(backbone, PromptAndCompletion(), rollout_of([[EOS]] * 4), batch)
    assert loss.item() > 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, backbone.parameters_of(GENERATOR)))


def test_the_modes_are_restored(backbone: Backbone, batch: PromptBatch) -> None:
    with backbone.generator():
        coupled(backbone, PromptAndCompletion(), rollout_of(ANSWERS), batch)
        assert backbone._active == GENERATOR


def test_the_coupled_loss_alone_raises_the_discriminators_score(build: Build, batch: PromptBatch) -> None:
    """The discriminator does not learn; the generator moves nothing but itself."""
    module = build(
        supervised=0.0,
        policy=0.0,
        discriminator_updates=0,
        coupled=1.0,
        num_generations=8,
        generator_optimizer=lambda p: AdamW(p, lr=1e-2, weight_decay=0.0),
    )
    before = state(module)
    recorder, _ = fit(module, [batch], 30)
    score = [report["discriminator/score_sampled"] for report in recorder.reports]
    assert sum(score[-5:]) / 5 > sum(score[:5]) / 5 + 0.3
    assert all(f".{GENERATOR}." in name for name in moved(before, recorder.weights[-1]))
    report = recorder.reports[0]
    assert report["loss/generator"] == report["loss/coupled"]


def test_a_discriminator_without_gradient_is_refused(build: Build) -> None:
    with pytest.raises(LoraGANError, match="HiddenStatesDiscriminator that reads PromptAndCompletion is none: set"):
        build(model=HiddenStatesDiscriminator(), coupled=1.0)
    with pytest.raises(LoraGANError, match="temperature of the straight-through"):
        StraightThrough(0.0)


class Doubled(DiscriminatorModel):
    """One's own differentiable model: twice the adapter's score."""

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = AdapterDiscriminator()

    def forward(self, backbone: Backbone, batch: DiscriminatorBatch) -> dict[str, Tensor]:
        return {kind: 2 * scores for kind, scores in self.inner(backbone, batch).items()}

    def tree(self, backbone: Backbone, batch: DiscriminatorBatch) -> PromptTree:
        return self.inner.tree(backbone, batch)

    def score_embedded(self, backbone: Backbone, tree: PromptTree, embedded: Tensor) -> dict[str, Tensor]:
        return {kind: 2 * x for kind, x in self.inner.score_embedded(backbone, tree, embedded).items()}

    def trainable(self, backbone: Backbone) -> list[torch.nn.Parameter]:
        return self.inner.trainable(backbone)

    @contextmanager
    def mode(self, backbone: Backbone) -> Iterator[None]:
        with self.inner.mode(backbone):
            yield


def test_any_differentiable_discriminator_can_be_coupled(build: Build, batch: PromptBatch) -> None:
    """At the start every score is a linear head's on the same states, so −log σ(2s) is what is logged for a score s."""
    recorder, _ = fit(build(model=Doubled(), coupled=0.5), [batch], 1)
    plain, _ = fit(build(coupled=0.5), [batch], 1)
    scores = plain.outputs[0].discriminator
    assert scores is not None
    wanted = -torch.nn.functional.logsigmoid(2 * scores.sampled).mean().item()
    assert recorder.reports[0]["discriminator/score_sampled"] == pytest.approx(2 * scores.sampled.mean().item())
    frozen, _ = fit(build(model=Doubled(), coupled=0.5, discriminator_updates=0), [batch], 1)
    assert frozen.reports[0]["loss/coupled"] == pytest.approx(wanted, rel=1e-4)
