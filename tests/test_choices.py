"""Multiple choice: worked by hand, and against ten independent lines on a real small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lora_gan.backbone import Backbone
from lora_gan.choices import (
    Choices,
    Scored,
    accuracy_per_character,
    choice_metrics,
    choices_of,
    informative,
    mc1,
    mc2,
    score_choices,
)
from lora_gan.data import ARC, InstructionDataModule, TruthfulQA
from lora_gan.data.datamodule import collate
from lora_gan.data.tokenizer import encode
from lora_gan.types import Example, Negative

FIXTURES = Path(__file__).parent / "fixtures"


def scored(probabilities: list[float], right: list[bool], best: int, texts: tuple[str, ...] | None = None) -> Scored:
    names = texts or tuple("abcdef"[: len(right)])
    return Scored(Choices(names, tuple(right), best), torch.tensor(probabilities).log())


def test_mc1_and_mc2_by_hand() -> None:
    one = scored([0.1, 0.2, 0.3, 0.4], [False, True, True, False], best=2)
    assert mc1(one) == 0.0  # 0.3 < 0.4
    assert mc2(one) == pytest.approx(0.5)
    two = scored([0.1, 0.5, 0.2], [False, True, True], best=2)
    assert mc1(two) == 1.0  # another right answer may be more probable
    assert mc2(two) == pytest.approx(0.7 / 0.8)
    assert mc1(scored([0.3, 0.3], [True, False], best=0)) == 0.0  # a tie is wrong


def test_length_normalised_accuracy_by_hand() -> None:
    # ln 0.01 / 4 = -1.15 beats ln 0.2 / 1 = -1.61, although 0.01 < 0.2
    one = scored([0.01, 0.2], [True, False], 0, texts=("four", "1"))
    assert (mc1(one), accuracy_per_character(one)) == (0.0, 1.0)


def test_choices_are_shuffled_by_seed() -> None:
    negatives = tuple(Negative(str(i), "x") for i in range(9))
    offered = [choices_of(Example(f"{n}", "yes", ("yes", "sure"), negatives)) for n in range(40)]
    assert len({choices.best for choices in offered}) > 5
    assert all(choices.texts[choices.best] == "yes" for choices in offered)
    assert all(sorted(choices.texts) == sorted(("yes", "sure", *"012345678")) for choices in offered)
    assert all(
        (text in ("yes", "sure")) == right for c in offered for text, right in zip(c.texts, c.right, strict=True)
    )
    assert offered[0] == choices_of(Example("0", "yes", ("yes", "sure"), negatives))


def test_metrics_by_source() -> None:
    right, wrong = scored([0.9, 0.1], [True, False], 0), scored([0.2, 0.8], [True, False], 0)
    assert choice_metrics([("truthfulqa", right), ("arc", wrong), ("truthfulqa", wrong)]) == {
        "arc/accuracy": 0.0,
        "arc/accuracy_per_character": 0.0,
        "truthfulqa/mc1": 0.5,
        "truthfulqa/mc2": pytest.approx(0.55),
    }


@pytest.mark.parametrize("text", ["I have no comment", "I don't know.", " unknown", "", "I'm not sure about that"])
def test_what_says_nothing(text: str) -> None:
    assert not informative(text)
    assert informative(f"Paris, {text}") and informative("Knowing is unknown to me")


@pytest.mark.parametrize("source", [TruthfulQA, ARC])
def test_scores_agree_with_ten_independent_lines(
    source: Callable[[str], TruthfulQA | ARC],
    make_backbone: Callable[..., Backbone],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = FIXTURES / ("truthfulqa.csv" if source is TruthfulQA else "arc.jsonl")
    examples = list(source(str(path)).rows())
    batch = collate(encode(tokenizer, examples))
    backbone = make_backbone().eval()

    def ids(texts: object) -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]  # type: ignore[attr-defined]

    with torch.no_grad(), backbone.generator():
        found = score_choices(backbone.logprobs, batch, ids, longest=256)
        totals, model = [], backbone.lm
        for example in examples:  # the independent lines: each choice as a row of its own
            told = {}
            for text in (*example.references, *(negative.text for negative in example.negatives)):
                prompt, answer = ids([example.prompt, text])
                row = model(torch.tensor([prompt + answer])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
                told[text] = float(row[range(len(answer)), answer].sum())
            totals.append(told)
    assert len(found) == len(examples)
    for example, one, told in zip(examples, found, totals, strict=True):
        assert dict(zip(one.choices.texts, one.logprobs.tolist(), strict=True)) == pytest.approx(told, abs=1e-3)
        wrong = [told[negative.text] for negative in example.negatives]
        assert mc1(one) == float(told[example.target] > max(wrong))
        chances = {text: torch.tensor(value).exp().item() for text, value in told.items()}
        share = sum(chances[text] for text in example.references) / sum(chances.values())
        assert mc2(one) == pytest.approx(share, abs=1e-2)


def test_what_does_not_fit_is_left_out(
    make_backbone: Callable[..., Backbone], tokenizer: PreTrainedTokenizerFast
) -> None:
    example = Example("p", "t", ("t", "x" * 300), (Negative("n", "wrong"),))
    batch = collate(encode(tokenizer, [example, Example("p", "no negatives")]))

    def ids(texts: object) -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]  # type: ignore[attr-defined]

    with torch.no_grad():
        (one,) = score_choices(make_backbone().logprobs, batch, ids, longest=256)
    assert sorted(one.choices.texts) == ["n", "t"]


def test_the_data_module_says_how_long_a_text_may_be() -> None:
    assert InstructionDataModule(max_prompt_tokens=10).room.together == 512
