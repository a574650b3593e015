"""Who judges and what it reads: every score against the same row computed alone, through transformers only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomise
from rounds import Build, fit, moved, state
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, LoraSettings
from lora_gan.errors import LoraGANError
from lora_gan.judges import (
    AdapterJudge,
    AnswerAndTarget,
    AnswerOnly,
    HiddenStatesJudge,
    Judge,
    JudgeInput,
    OwnBaseJudge,
    PromptAndAnswer,
)
from lora_gan.types import Candidates, PromptBatch

END = "<|endoftext|>"
PROMPTS = ("Say a", "Q: hello?")
TARGETS = ("a", "hi")
ANSWERS = {"sampled": (("b", "abc"), ("hi", "")), "odd": ((), ("hello hello",)), "none": ((), ())}
READS = {
    "prompt and answer": (PromptAndAnswer(), "{prompt}{answer}" + END),
    "answer only": (AnswerOnly(), END + "{answer}" + END),
    "answer and target": (AnswerAndTarget(), "GEN: {answer} || TAR: {target}" + END),
}


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)


@pytest.fixture
def candidates(tokenizer: PreTrainedTokenizerFast) -> Candidates:
    return Candidates(
        prompts=tuple(encode(tokenizer, text) for text in PROMPTS),
        targets=tuple(encode(tokenizer, text + END) for text in TARGETS),
        answers={
            kind: [[encode(tokenizer, text + END) for text in row] for row in rows] for kind, rows in ANSWERS.items()
        },
    )


def texts(pattern: str, kind: str) -> list[str]:
    """What is read of each answer of a kind."""
    return [
        pattern.format(prompt=prompt, answer=answer, target=target)
        for prompt, target, row in zip(PROMPTS, TARGETS, ANSWERS[kind], strict=True)
        for answer in row
    ]


@pytest.fixture
def other_base(tmp_path: Path) -> str:
    """A Llama of another width with a tokenizer of its own: another order of the bytes, whole "hello", EOS first."""
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True), "he", "ll", "hell", "hello"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    own = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, merges))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", model_max_length=64).save_pretrained(tmp_path)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=0,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return str(tmp_path)


# what is read


def test_answer_and_target_reads_exactly_the_ids_of_gpt2twins_text(
    candidates: Candidates, tokenizer: PreTrainedTokenizerFast
) -> None:
    reading = AnswerAndTarget()(candidates, tokenizer)
    for kind in ANSWERS:
        found = [
            torch.cat([start, branch]).tolist()
            for start, row in zip(reading.beginnings, reading.branches[kind], strict=True)
            for branch in row
        ]
        assert found == [encode(tokenizer, text).tolist() for text in texts(READS["answer and target"][1], kind)]
    first = torch.cat([reading.beginnings[0], reading.branches["sampled"][0][1]])
    assert tokenizer.decode(first) == "GEN: abc || TAR: a<|endoftext|>"
    with pytest.raises(LoraGANError, match="before must not be empty"):
        AnswerAndTarget(before="")


def test_answer_only_does_not_look_at_the_prompt(backbone: Backbone, candidates: Candidates) -> None:
    other = Candidates(
        (encode(backbone.tokenizer, "x"), encode(backbone.tokenizer, "A much longer prompt")),
        candidates.targets,
        candidates.answers,
    )
    for reads, alike in ((AnswerOnly(), True), (AnswerAndTarget(), True), (PromptAndAnswer(), False)):
        judge = AdapterJudge(reads)
        with judge.mode(backbone), torch.no_grad():
            left, right = (judge(backbone, given)["sampled"] for given in (candidates, other))
        assert torch.allclose(left, right, atol=1e-6) == alike


# the second adapter


@pytest.mark.parametrize("name", READS)
def test_the_adapter_scores_each_row_as_if_it_stood_alone(
    name: str, architecture: str, make_backbone: Callable[..., Backbone], candidates: Candidates
) -> None:
    reads, pattern = READS[name]
    backbone, judge = make_backbone(architecture), AdapterJudge(reads)
    with judge.mode(backbone), torch.no_grad():
        found = judge(backbone, candidates)
        for kind in ANSWERS:
            for outputs, text in zip(found[kind], texts(pattern, kind), strict=True):
                row = encode(backbone.tokenizer, text)
                hidden = backbone.causal_lm.base_model(input_ids=row[None]).last_hidden_state[0, -1]
                torch.testing.assert_close(outputs, backbone.judge_head(hidden), atol=1e-5, rtol=1e-4)
    assert {kind: tuple(outputs.shape) for kind, outputs in found.items()} == {
        "sampled": (4, 2),
        "odd": (1, 2),
        "none": (0, 2),
    }


def test_the_discriminator_can_start_from_the_generator(backbone: Backbone, bases: dict[str, str]) -> None:
    """Of one shape, which the fixture's are not: from then on both adapters say the same, until one of them learns."""
    with pytest.raises(LoraGANError, match="same rank"):
        AdapterJudge().start_from_generator(backbone)
    equal = Backbone(bases["gpt2"], LoraSettings(4, 8), LoraSettings(4, 8))
    randomise(equal)
    row, before = encode(equal.tokenizer, "Hello")[None], {n: p.clone() for n, p in equal.named_parameters()}
    AdapterJudge().start_from_generator(equal)
    logits = []
    for mode in (equal.generator, equal.discriminator, equal.reference):
        with mode(), torch.no_grad():
            logits.append(equal.causal_lm(input_ids=row).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    changed = {n for n, p in equal.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if f".{DISCRIMINATOR}." in n}
    with torch.no_grad():
        equal.parameters_of(GENERATOR)[0].add_(1)
    with equal.discriminator(), torch.no_grad():
        assert torch.equal(equal.causal_lm(input_ids=row).logits, logits[1]), "a copy, not the same weights"
    with pytest.raises(LoraGANError, match="HiddenStatesJudge cannot start from the generator's adapter"):
        HiddenStatesJudge().start_from_generator(equal)


@pytest.mark.parametrize("name", READS)
def test_more_than_fits_the_context_is_refused(name: str, backbone: Backbone) -> None:
    """256 places. The prompt has 100 tokens and the target 90: 157 more are too long behind either, 256 behind EOS."""
    long = Candidates(
        (torch.zeros(100, dtype=torch.long),),
        (encode(backbone.tokenizer, "t" * 89 + END),),
        {"sampled": [[encode(backbone.tokenizer, "a" * 157)]]},
    )
    if name == "answer only":
        long = Candidates(long.prompts, long.targets, {"sampled": [[encode(backbone.tokenizer, "a" * 256)]]})
    with pytest.raises(LoraGANError, match=r"more than its model's context of 256: lower .*max_new_tokens"):
        AdapterJudge(READS[name][0])(backbone, long)


# an own base


@pytest.mark.parametrize("name", READS)
def test_an_own_base_reads_the_same_text_in_its_own_tokens(
    name: str, backbone: Backbone, candidates: Candidates, other_base: str
) -> None:
    reads, pattern = READS[name]
    torch.manual_seed(4)
    judge = OwnBaseJudge(other_base, LoraSettings(2, 4), reads)
    randomise(judge)  # type: ignore[arg-type]
    with judge.mode(backbone), torch.no_grad():
        found = judge(backbone, candidates)
        for kind in ANSWERS:
            for outputs, text in zip(found[kind], texts(pattern, kind), strict=True):
                row = encode(judge.tokenizer, text.replace(END, "</s>"))
                hidden = judge.lm.get_base_model().model(input_ids=row[None]).last_hidden_state[0, -1]
                torch.testing.assert_close(outputs, judge.head(hidden), atol=1e-5, rtol=1e-4)
    assert len(judge._ids(encode(backbone.tokenizer, "hello hello" + END), backbone.tokenizer, ends=True)) == 4, (
        "hello, space, hello, EOS"
    )


def test_an_answer_that_spells_the_end_out_does_not_end_there(backbone: Backbone, other_base: str) -> None:
    judge = OwnBaseJudge(other_base)
    found = judge._ids(encode(backbone.tokenizer, "</s>!" + END), backbone.tokenizer, ends=True).tolist()
    assert found.count(0) == 1 and found[-1] == 0 and len(found) == 6


def test_an_own_base_is_frozen_and_learns_its_lora_and_head(build: Build, batch: PromptBatch, other_base: str) -> None:
    judge = OwnBaseJudge(other_base, LoraSettings(2, 4))
    module = build(judge=judge)
    names = {name for name, p in judge.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in judge.named_parameters() if "lora_" in name or name.startswith("head.")}
    learned = {id(p) for p in judge.learned(module.backbone)}
    assert learned == {id(p) for name, p in judge.named_parameters() if name in names}
    before, shared = {name: p.clone() for name, p in judge.state_dict().items()}, state(module)
    recorder, runner = fit(module, [batch], 3)
    assert moved(before, judge.state_dict()) == names
    assert all(f".{GENERATOR}." in name for name in moved(shared, recorder.weights[-1])), "the shared adapter rests"
    assert not any(part.training for part in judge.modules()), "dropout stays off"
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    saved = {name for name in checkpoint["state_dict"] if name.startswith("discriminator.")}
    assert saved == {f"discriminator.judge.{name}" for name in names}, "its base is not stored"
    assert runner.global_step == 3


def test_an_own_base_has_a_context_of_its_own(backbone: Backbone, candidates: Candidates, other_base: str) -> None:
    """64 places: 100 bytes fit into the generator's 256, not into these."""
    long = Candidates(
        candidates.prompts[:1], candidates.targets[:1], {"sampled": [[encode(backbone.tokenizer, "a" * 100 + END)]]}
    )
    AdapterJudge()(backbone, long)
    with pytest.raises(LoraGANError, match="context of 64"):
        OwnBaseJudge(other_base)(backbone, long)


# on the generator's hidden states


@pytest.fixture
def encoder(backbone: Backbone) -> Callable[..., HiddenStatesJudge]:
    def make(reads: JudgeInput | None = None) -> HiddenStatesJudge:
        torch.manual_seed(5)
        judge = HiddenStatesJudge(width=16, layers=2, heads=2, reads=reads)
        judge.build(backbone)
        return judge

    return make


@pytest.mark.parametrize("name", READS)
def test_the_encoder_reads_the_generators_states_of_the_answer(
    name: str, backbone: Backbone, candidates: Candidates, encoder: Callable[..., HiddenStatesJudge]
) -> None:
    """Row by row and without padding: states behind the beginning → projection → encoder → mean → head."""
    reads, pattern = READS[name]
    judge = encoder(reads)
    beginnings = {"prompt and answer": PROMPTS, "answer only": (END, END), "answer and target": ("GEN: ", "GEN: ")}
    found = judge(backbone, candidates)
    for kind, rows in ANSWERS.items():
        starts = [start for start, row in zip(beginnings[name], rows, strict=True) for _ in row]
        for outputs, text, start in zip(found[kind], texts(pattern, kind), starts, strict=True):
            row = encode(backbone.tokenizer, text)
            with backbone.generator(), torch.no_grad():
                states = backbone.causal_lm.base_model(input_ids=row[None]).last_hidden_state
            behind = states[:, len(encode(backbone.tokenizer, start)) :]
            wanted = judge.head(judge.encoder(judge.project(behind)).mean(1))[0]
            torch.testing.assert_close(outputs, wanted, atol=1e-5, rtol=1e-4)
    assert found["none"].shape == (0, 2)


def test_the_encoders_loss_never_reaches_the_generator(
    backbone: Backbone, candidates: Candidates, encoder: Callable[..., HiddenStatesJudge]
) -> None:
    judge = encoder()
    with judge.mode(backbone):
        judge(backbone, candidates)["sampled"].square().sum().backward()
    assert all(p.grad is None for p in backbone.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in judge.parameters())
    assert len(judge.learned(backbone)) == len(list(judge.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing_for_the_encoder(
    training: bool, backbone: Backbone, candidates: Candidates, encoder: Callable[..., HiddenStatesJudge]
) -> None:
    """A one-letter answer alone and beside one of 40; outside of training torch takes another path."""
    judge = encoder().train(training)
    prompts, targets = candidates.prompts[:1], candidates.targets[:1]
    short, long = encode(backbone.tokenizer, "b" + END), encode(backbone.tokenizer, "abcd" * 10 + END)
    with torch.set_grad_enabled(training):
        alone = judge(backbone, Candidates(prompts, targets, {"sampled": [[short]]}))["sampled"]
        beside = judge(backbone, Candidates(prompts, targets, {"sampled": [[short, long]]}))["sampled"]
    torch.testing.assert_close(alone[0], beside[0], atol=1e-6, rtol=1e-5)
    assert (beside[0] - beside[1]).abs().max() > 1e-3


def test_the_encoder_alone_learns_in_a_run(build: Build, batch: PromptBatch) -> None:
    judge = HiddenStatesJudge(width=16, layers=1, heads=2)
    module = build(judge=judge)
    before, shared = {name: p.clone() for name, p in judge.state_dict().items()}, state(module)
    recorder, _ = fit(module, [batch], 2)
    assert moved(before, judge.state_dict()) == set(before)
    assert all(f".{GENERATOR}." in name for name in moved(shared, recorder.weights[-1]))


@pytest.mark.parametrize("settings", [{"width": 10, "heads": 4}, {"layers": 0}, {"heads": 0}])
def test_the_encoders_shape_is_checked(settings: dict[str, int]) -> None:
    with pytest.raises(LoraGANError, match="multiple of heads"):
        HiddenStatesJudge(**settings)


def test_only_the_adapter_can_be_differentiated_through() -> None:
    found: list[type[Judge]] = [j for j in (AdapterJudge, HiddenStatesJudge, OwnBaseJudge) if j.differentiable]
    assert found == [AdapterJudge]
