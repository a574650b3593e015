"""The likelihood of the right answer behind a completion's work: by hand, against transformers, and in a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan.backbone import Backbone, LoraSettings
from lora_gan.bases import locate
from lora_gan.errors import LoraGANError, RewardError
from lora_gan.evolution import EvolutionModule
from lora_gan.final_answer import AfterMarker, AfterThinking, Boxed, FinalAnswer, Pattern
from lora_gan.policy import ActivePolicy
from lora_gan.rewards import ReferenceLikelihood
from lora_gan.types import Example, PromptBatch, RewardContext
from tests.helpers.steps import Build, fit


class _Characters:
    """A policy with a token for each character, sure of a letter after "z" and of nothing else."""

    context_length = 40

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        return [(*map(ord, text), 0) for text in texts]

    def logprobs(
        self, prompts: Sequence[Tensor], completions: Mapping[str, Sequence[Sequence[Tensor]]]
    ) -> dict[str, Tensor]:
        return {kind: self._of([ids for row in rows for ids in row]) for kind, rows in completions.items()}

    def _of(self, completions: Sequence[Tensor]) -> Tensor:
        found = torch.zeros(len(completions), max(map(len, completions)))
        for row, ids in zip(found, completions, strict=True):
            text = "".join(map(chr, ids.tolist()))
            row[: len(text)] = torch.tensor([math.log(0.8 if "z" in text[:i] else 0.5) for i in range(len(text))])
        return found


def batch_of(*examples: Example) -> PromptBatch:
    ids = tuple(torch.tensor([65, 66]) for _ in examples)
    return PromptBatch(examples, ids, ids, tuple(() for _ in examples))


def scores(reward: ReferenceLikelihood, completions: Sequence[str], final_answer: FinalAnswer) -> list[float]:
    batch = batch_of(Example("Q", "", answers=("71", "seventy-one")))
    n = len(completions)
    context = RewardContext(n, torch.zeros(n, 1), torch.ones(n, 1).bool(), final_answer, _Characters())
    return [round(score, 4) for score in reward(completions, batch, context).tolist()]


def test_by_hand() -> None:
    said = ["z #### 9", "o #### 71", "z", "z ####", "#### 9"]
    plain, whole = (ReferenceLikelihood(whole=whole, minus_direct=False) for whole in (False, True))
    assert scores(plain, said, AfterMarker()) == [0.8, 0.5, 0, 0, 0.5]
    assert scores(whole, said, AfterMarker()) == [0.64, 0.25, 0, 0, 0.25]
    assert scores(ReferenceLikelihood(), said, AfterMarker()) == [0.3, 0, 0, 0, 0]
    assert scores(ReferenceLikelihood(whole=True), said, AfterMarker()) == [0.39, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("find", "text"),
    [
        (AfterThinking(), "z</think>\n\n5"),
        (Boxed(), r"z \boxed{5}"),
        (Pattern(r"is (\d+)"), "z is 5."),
    ],
)
def test_of_each_kind_of_final_answer(find: FinalAnswer, text: str) -> None:
    assert scores(ReferenceLikelihood(), [text, "z"], find) == [0.3, 0]


def test_prompts_without_an_accepted_answer_are_left_out() -> None:
    context = RewardContext(1, torch.zeros(2, 1), torch.ones(2, 1).bool(), AfterMarker())
    batch = batch_of(Example("Q", ""), Example("Q", "work #### 7"))
    assert ReferenceLikelihood().applies_in(batch, context) == [False, True]


def test_what_is_wrong_is_said(build: Build) -> None:
    with pytest.raises(LoraGANError, match=r"set model\.final_answer, such as"):
        build(rewards=[ReferenceLikelihood()])
    with pytest.raises(LoraGANError, match="come from many members: leave it out"):
        EvolutionModule(base="builtin", rewards=[ReferenceLikelihood()], final_answer=AfterMarker())
    with pytest.raises(RewardError, match=r"have 53 tokens, and the context of the base 40: lower sampling"):
        scores(ReferenceLikelihood(), ["x" * 43 + "#### 5"], AfterMarker())


def test_it_is_what_transformers_says() -> None:
    """Completions of different lengths to two prompts, in two passes, against one forward for each text."""
    tokenizer = AutoTokenizer.from_pretrained(locate("digits"))
    model = AutoModelForCausalLM.from_pretrained(locate("digits")).eval().requires_grad_(False)
    prompts = ["What is 3 plus 4 times 2? ", "What is 1 minus 1? "]
    said = [
        "3 plus 4 is 7. 7 times 2 is 4. The last digit is 4.",
        "The last digit is 9.",
        "1 minus 1 is 0. The last digit is 0.",
        "so",
    ]
    accepted = ["4", "0"]

    def probability(prompt: str, before: str, answer: str) -> float:
        start = tokenizer(prompt, return_tensors="pt").input_ids
        whole = tokenizer(f"{before} {answer}", add_special_tokens=False, return_tensors="pt").input_ids
        logits = model(torch.cat([start, whole], 1)).logits[0].log_softmax(-1)
        return float(logits[-2, whole[0, -1]].exp())  # each answer is one token

    backbone = Backbone("digits", LoraSettings(rank=2), LoraSettings(rank=2))
    examples = tuple(Example(prompt, "", answers=(answer,)) for prompt, answer in zip(prompts, accepted, strict=True))
    ids = tuple(tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in prompts)
    policy = ActivePolicy(backbone, lambda count: [[b] for b in range(count)])
    context = RewardContext(2, torch.zeros(4, 1), torch.ones(4, 1).bool(), AfterMarker("The last digit is"), policy)
    found = ReferenceLikelihood(minus_direct=False)(said, PromptBatch(examples, ids, ids, ((), ())), context)
    expected = [
        probability(prompts[row // 2], text.rpartition(" ")[0], accepted[row // 2]) for row, text in enumerate(said[:3])
    ]
    assert found.tolist() == pytest.approx([*expected, 0], rel=1e-4)


def test_a_run_asks_the_policy_that_sampled(build: Build) -> None:
    """The scores of the third step are those of the weights after the second, and not of the base."""
    module = build(rewards=[ReferenceLikelihood(minus_direct=False)], final_answer=Pattern("(?s)^.(.)"), supervised=0.0)
    batch = batch_of(Example("AB", "", answers=("7",)), Example("AB", "", answers=("no",)))
    recorder, _ = fit(module, [batch], 3)
    third = recorder.outputs[2]
    assert third.scores is not None
    module.backbone.load_state_dict(recorder.weights[1])
    found = {}
    for name, mode in (("policy", module.backbone.generator), ("base", module.backbone.reference)):
        with mode():
            found[name] = module.score(third.rollout, batch, with_targets=False).parts["likelihood"]
    assert third.scores.parts["likelihood"].any()
    assert torch.allclose(third.scores.parts["likelihood"], found["policy"], rtol=1e-5)
    assert not torch.allclose(found["base"], found["policy"], rtol=1e-3)
