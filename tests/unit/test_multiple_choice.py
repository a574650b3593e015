"""Multiple choice: worked by hand, and against ten independent lines on a real small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lora_gan.backbone import GENERATOR, Backbone, LoraSettings
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.cli import main
from lora_gan.data import ARC, InstructionDataModule, TruthfulQA
from lora_gan.data.datamodule import collate
from lora_gan.data.tokenizer import encode
from lora_gan.multiple_choice import (
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
from lora_gan.types import Example, Negative

FIXTURES = Path(__file__).parents[1] / "fixtures"


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
            logprobs_of = {}
            for text in (*example.references, *(negative.text for negative in example.negatives)):
                prompt, answer = ids([example.prompt, text])
                row = model(torch.tensor([prompt + answer])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
                logprobs_of[text] = float(row[range(len(answer)), answer].sum())
            totals.append(logprobs_of)
    assert len(found) == len(examples)
    for example, one, logprobs_of in zip(examples, found, totals, strict=True):
        assert dict(zip(one.choices.texts, one.logprobs.tolist(), strict=True)) == pytest.approx(logprobs_of, abs=1e-3)
        wrong = [logprobs_of[negative.text] for negative in example.negatives]
        assert mc1(one) == float(logprobs_of[example.target] > max(wrong))
        chances = {text: torch.tensor(value).exp().item() for text, value in logprobs_of.items()}
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
    assert InstructionDataModule(max_prompt_tokens=10).limits.total == 512


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "file", "metrics"),
    [
        ("truthfulqa", "truthfulqa.csv", {"truthfulqa/mc1", "truthfulqa/mc2"}),
        ("arc", "arc.jsonl", {"arc/accuracy", "arc/accuracy_per_character"}),
    ],
)
def test_the_test_of_a_run_measures_choices(
    name: str, file: str, metrics: set[str], bases: dict[str, str], tmp_path: Path
) -> None:
    """Untrained, so base and generator are one and the same model, whose choices are scored here row by row."""
    source = ARC(path=str(FIXTURES / file)) if name == "arc" else TruthfulQA(path=str(FIXTURES / file))
    untrained = Backbone(bases["gpt2"], LoraSettings(), LoraSettings())
    save_adapter(untrained, GENERATOR, tmp_path / "adapter")
    main(
        [
            "test",
            f"--config={CONFIGS / 'qa.yaml'}",
            f"--config={CONFIGS / 'data' / f'{name}.yaml'}",
            f"--model.init_args.base={bases['gpt2']}",
            f"--model.init_args.generator.adapter={tmp_path / 'adapter'}",
            "--model.init_args.sampling.max_new_tokens=4",
            f"--data.init_args.path={FIXTURES / file}",
            "--data.init_args.validation=0.0",
            "--data.init_args.test=0.9",
            f"--trainer.logger.init_args.save_dir={tmp_path}",
        ]
    )
    (run,) = tmp_path.glob("qa/version_*")
    events = EventAccumulator(str(run)).Reload()  # type: ignore[no-untyped-call]
    found = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}  # type: ignore[no-untyped-call]
    assert {f"test/base/{metric}" for metric in (*metrics, "truth", "informative")} <= set(found)
    assert -1 <= found["test/sampled/truth"] <= 1
    for metric in metrics:
        assert found[f"test/base/{metric}"] == pytest.approx(found[f"test/trained/{metric}"], abs=1e-5)
    if name == "truthfulqa":  # all of it is the test
        model = AutoModelForCausalLM.from_pretrained(bases["gpt2"])
        tokenizer = AutoTokenizer.from_pretrained(bases["gpt2"])
        asked = [example for example in source.rows() if example.negatives]
        shares = []
        for example in asked:
            choices = choices_of(example)
            prompt = tokenizer.encode(example.prompt)
            sums = []
            for text in choices.texts:
                ids = torch.tensor([prompt + tokenizer.encode(text)])
                logp = model(ids).logits[0].log_softmax(-1)
                sums.append(sum(float(logp[t - 1, ids[0, t]]) for t in range(len(prompt), ids.shape[1])))
            share = torch.tensor(sums, dtype=torch.float64).softmax(0)
            shares.append(float(share[torch.tensor(choices.right)].sum()))
        assert found["test/base/truthfulqa/mc2"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)
