"""Architectures and input formats: every score against the same row computed alone, through transformers only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lora_gan.advantages import MovingAverage
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, LoraSettings
from lora_gan.discriminator import (
    AdapterDiscriminator,
    ClosenessBCE,
    CompletionAndTarget,
    CompletionOnly,
    DiscriminatorModel,
    HiddenStatesDiscriminator,
    InputFormat,
    LikelihoodDiscriminator,
    OwnBaseDiscriminator,
    PairwiseDiscriminator,
    PairwisePayoff,
    PromptAndCompletion,
    TargetAndCompletion,
    WorkOnly,
)
from lora_gan.discriminator.inputs import completion_leads
from lora_gan.errors import LoraGANError
from lora_gan.final_answer import AfterMarker
from lora_gan.sampling import Sampling
from lora_gan.types import DiscriminatorBatch, PromptBatch
from tests.conftest import randomise
from tests.helpers.steps import Build, fit, moved, state

END = "<|endoftext|>"
PROMPTS = ("Say a", "Q: hello?")
TARGETS = ("a", "hi")
ANSWERS = {"sampled": (("b", "abc"), ("hi", "")), "odd": ((), ("hello hello",)), "none": ((), ())}
READS = {
    "prompt and completion": (PromptAndCompletion(), "{prompt}{completion}" + END),
    "completion only": (CompletionOnly(), END + "{completion}" + END),
    "completion and target": (CompletionAndTarget(), "GEN: {completion} || TAR: {target}" + END),
}


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long)


@pytest.fixture
def disc_batch(tokenizer: PreTrainedTokenizerFast) -> DiscriminatorBatch:
    return DiscriminatorBatch(
        prompts=tuple(encode(tokenizer, text) for text in PROMPTS),
        targets=tuple(encode(tokenizer, text + END) for text in TARGETS),
        completions={
            kind: [[encode(tokenizer, text + END) for text in row] for row in rows] for kind, rows in ANSWERS.items()
        },
    )


def texts(pattern: str, kind: str) -> list[str]:
    """What is read of each completion of a kind."""
    return [
        pattern.format(prompt=prompt, completion=completion, target=target)
        for prompt, target, row in zip(PROMPTS, TARGETS, ANSWERS[kind], strict=True)
        for completion in row
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


def test_completion_and_target_reads_exactly_the_ids_of_gpt2twins_text(
    disc_batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    reading = CompletionAndTarget()(disc_batch, tokenizer)
    for kind in ANSWERS:
        found = [
            torch.cat([start, branch]).tolist()
            for start, row in zip(reading.beginnings, reading.branches[kind], strict=True)
            for branch in row
        ]
        assert found == [encode(tokenizer, text).tolist() for text in texts(READS["completion and target"][1], kind)]
    first = torch.cat([reading.beginnings[0], reading.branches["sampled"][0][1]])
    assert tokenizer.decode(first) == "GEN: abc || TAR: a<|endoftext|>"
    with pytest.raises(LoraGANError, match="before must not be empty"):
        CompletionAndTarget(before="")


def test_completion_only_does_not_look_at_the_prompt(backbone: Backbone, disc_batch: DiscriminatorBatch) -> None:
    other = DiscriminatorBatch(
        (encode(backbone.tokenizer, "x"), encode(backbone.tokenizer, "A much longer prompt")),
        disc_batch.targets,
        disc_batch.completions,
    )
    for reads, alike in ((CompletionOnly(), True), (CompletionAndTarget(), True), (PromptAndCompletion(), False)):
        model = AdapterDiscriminator(reads)
        with model.mode(backbone), torch.no_grad():
            left, right = (model(backbone, given)["sampled"] for given in (disc_batch, other))
        assert torch.allclose(left, right, atol=1e-6) == alike


def test_work_only_reads_what_stands_before_the_final_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    said = (("3 + 4 = 7 #### 7", "no answer"), ("#### 7", ""))
    completions = {"sampled": [[encode(tokenizer, text + END) for text in row] for row in said], "none": [[], []]}
    prompts = tuple(encode(tokenizer, text) for text in PROMPTS)
    reading = WorkOnly(AfterMarker())(DiscriminatorBatch(prompts, prompts, completions), tokenizer)
    assert [start.tolist() for start in reading.beginnings] == [[tokenizer.eos_token_id]] * 2
    found = [[tokenizer.decode(branch) for branch in row] for row in reading.branches["sampled"]]
    assert found == [["3 + 4 = 7" + END, "no answer" + END], [END, END]]
    assert reading.branches["none"] == [[], []]


def test_the_final_answer_does_not_change_the_score_of_the_work(
    build: Build, make_batch: Callable[..., PromptBatch]
) -> None:
    """A step of a real run; a gradient through tokens that moved would be wrong, so it is refused."""
    model = AdapterDiscriminator(WorkOnly(AfterMarker()))
    module = build(model=model, adversarial=0.5)
    before = state(module)
    fit(module, [make_batch(("Say a", "a b #### c"), ("Hi", "#### yes"))], 1)
    assert any(DISCRIMINATOR in name for name in moved(before, state(module)))
    tokenizer, prompts = module.backbone.tokenizer, tuple(encode(module.backbone.tokenizer, text) for text in PROMPTS)
    rows = [[encode(tokenizer, text + END)] for text in ("a b #### c", "a b #### another")]
    with model.mode(module.backbone), torch.no_grad():
        scores = model(module.backbone, DiscriminatorBatch(prompts, prompts, {"sampled": rows}))["sampled"][:, 0]
    assert scores[0] == pytest.approx(float(scores[1]), abs=1e-6) != 0
    with pytest.raises(LoraGANError, match="AdapterDiscriminator that reads WorkOnly is none"):
        build(model=AdapterDiscriminator(WorkOnly(AfterMarker())), coupled=0.1)


# the second adapter


@pytest.mark.parametrize("name", READS)
def test_the_adapter_scores_each_row_as_if_it_stood_alone(
    name: str, architecture: str, make_backbone: Callable[..., Backbone], disc_batch: DiscriminatorBatch
) -> None:
    reads, pattern = READS[name]
    backbone, model = make_backbone(architecture), AdapterDiscriminator(reads)
    with model.mode(backbone), torch.no_grad():
        found = model(backbone, disc_batch)
        for kind in ANSWERS:
            for outputs, text in zip(found[kind], texts(pattern, kind), strict=True):
                row = encode(backbone.tokenizer, text)
                hidden = backbone.causal_lm.base_model(input_ids=row[None]).last_hidden_state[0, -1]
                torch.testing.assert_close(outputs, backbone.score_head(hidden), atol=1e-5, rtol=1e-4)
    assert {kind: tuple(outputs.shape) for kind, outputs in found.items()} == {
        "sampled": (4, 2),
        "odd": (1, 2),
        "none": (0, 2),
    }


def test_the_discriminator_can_start_from_the_generator(backbone: Backbone, bases: dict[str, str]) -> None:
    """Of one shape, which the fixture's are not: from then on both adapters say the same, until one of them learns."""
    with pytest.raises(LoraGANError, match="same rank"):
        AdapterDiscriminator().start_from_generator(backbone)
    equal = Backbone(bases["gpt2"], LoraSettings(4, 8), LoraSettings(4, 8))
    randomise(equal)
    row, before = encode(equal.tokenizer, "Hello")[None], {n: p.clone() for n, p in equal.named_parameters()}
    AdapterDiscriminator().start_from_generator(equal)
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
    with pytest.raises(LoraGANError, match="HiddenStatesDiscriminator cannot start from the generator's adapter"):
        HiddenStatesDiscriminator().start_from_generator(equal)


@pytest.mark.parametrize("name", READS)
def test_more_than_fits_the_context_is_refused(name: str, backbone: Backbone) -> None:
    """256 places. The prompt has 100 tokens and the target 90: 157 more are too long behind either, 256 behind EOS."""
    long = DiscriminatorBatch(
        (torch.zeros(100, dtype=torch.long),),
        (encode(backbone.tokenizer, "t" * 89 + END),),
        {"sampled": [[encode(backbone.tokenizer, "a" * 157)]]},
    )
    if name == "completion only":
        long = DiscriminatorBatch(long.prompts, long.targets, {"sampled": [[encode(backbone.tokenizer, "a" * 256)]]})
    with pytest.raises(LoraGANError, match=r"more than its model's context of 256: lower .*max_new_tokens"):
        AdapterDiscriminator(READS[name][0])(backbone, long)


# an own base


@pytest.mark.parametrize("name", READS)
def test_an_own_base_reads_the_same_text_in_its_own_tokens(
    name: str, backbone: Backbone, disc_batch: DiscriminatorBatch, other_base: str
) -> None:
    reads, pattern = READS[name]
    torch.manual_seed(4)
    model = OwnBaseDiscriminator(other_base, LoraSettings(2, 4), reads)
    randomise(model)  # type: ignore[arg-type]
    with model.mode(backbone), torch.no_grad():
        found = model(backbone, disc_batch)
        for kind in ANSWERS:
            for outputs, text in zip(found[kind], texts(pattern, kind), strict=True):
                row = encode(model.tokenizer, text.replace(END, "</s>"))
                hidden = model.lm.get_base_model().model(input_ids=row[None]).last_hidden_state[0, -1]
                torch.testing.assert_close(outputs, model.head(hidden), atol=1e-5, rtol=1e-4)
    assert len(model._ids(encode(backbone.tokenizer, "hello hello" + END), backbone.tokenizer, ends=True)) == 4, (
        "hello, space, hello, EOS"
    )


def test_an_completion_that_spells_the_end_out_does_not_end_there(backbone: Backbone, other_base: str) -> None:
    model = OwnBaseDiscriminator(other_base)
    found = model._ids(encode(backbone.tokenizer, "</s>!" + END), backbone.tokenizer, ends=True).tolist()
    assert found.count(0) == 1 and found[-1] == 0 and len(found) == 6


def test_an_adapter_that_cannot_learn_is_named(build: Build, other_base: str, caplog: pytest.LogCaptureFixture) -> None:
    """The discriminator reads the states before the head."""
    build(generator_lora=LoraSettings(2, 4, ["c_attn", "lm_head"]))
    assert "never learns" not in caplog.text
    build(discriminator_lora=LoraSettings(2, 4, ["c_attn", "lm_head"]))
    OwnBaseDiscriminator(other_base, LoraSettings(2, 4, ["lm_head"]))
    assert caplog.text.count("adapter on the language-model head never learns") == 2


def test_an_own_base_is_frozen_and_learns_its_lora_and_head(build: Build, batch: PromptBatch, other_base: str) -> None:
    model = OwnBaseDiscriminator(other_base, LoraSettings(2, 4))
    module = build(model=model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if "lora_" in name or name.startswith("head.")}
    learned = {id(p) for p in model.trainable(module.backbone)}
    assert learned == {id(p) for name, p in model.named_parameters() if name in names}
    before, shared = {name: p.clone() for name, p in model.state_dict().items()}, state(module)
    recorder, runner = fit(module, [batch], 3)
    assert moved(before, model.state_dict()) == names
    assert all(f".{GENERATOR}." in name for name in moved(shared, recorder.weights[-1])), "the shared adapter rests"
    assert not any(part.training for part in model.modules()), "dropout stays off"
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    saved = {name for name in checkpoint["state_dict"] if name.startswith("discriminator.")}
    assert saved == {f"discriminator.model.{name}" for name in names}, "its base is not stored"
    assert runner.global_step == 3


def test_an_own_base_recomputes_its_layers(backbone: Backbone, disc_batch: DiscriminatorBatch, other_base: str) -> None:
    """The gradient is the same to the bit, and less is kept for it."""
    gradients, kept = [], list[int]()
    for checkpointing in (False, True):
        torch.manual_seed(6)
        model = OwnBaseDiscriminator(other_base, gradient_checkpointing=checkpointing)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(partial(note, sizes), lambda tensor: tensor):
            loss = torch.cat(list(model(backbone, disc_batch).values())).square().sum()
        gradients.append(torch.autograd.grad(loss, model.trainable(backbone)))
        kept.append(sum(sizes.values()))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True)) and kept[1] < 0.8 * kept[0]
    with pytest.raises(LoraGANError, match=r"4bit needs (a CUDA GPU|bitsandbytes)"):
        OwnBaseDiscriminator(other_base, quantization="4bit")


def note(sizes: dict[int, int], tensor: Tensor) -> Tensor:
    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


def test_an_own_base_has_a_context_of_its_own(
    backbone: Backbone, disc_batch: DiscriminatorBatch, other_base: str
) -> None:
    """64 places: 100 bytes fit into the generator's 256, not into these."""
    long = DiscriminatorBatch(
        disc_batch.prompts[:1], disc_batch.targets[:1], {"sampled": [[encode(backbone.tokenizer, "a" * 100 + END)]]}
    )
    AdapterDiscriminator()(backbone, long)
    with pytest.raises(LoraGANError, match="context of 64"):
        OwnBaseDiscriminator(other_base)(backbone, long)


# on the generator's hidden states


@pytest.fixture
def encoder(backbone: Backbone) -> Callable[..., HiddenStatesDiscriminator]:
    def make(reads: InputFormat | None = None) -> HiddenStatesDiscriminator:
        torch.manual_seed(5)
        model = HiddenStatesDiscriminator(width=16, layers=2, heads=2, input_format=reads)
        model.build(backbone)
        return model

    return make


@pytest.mark.parametrize("name", READS)
def test_the_encoder_reads_the_generators_states_of_the_completion(
    name: str, backbone: Backbone, disc_batch: DiscriminatorBatch, encoder: Callable[..., HiddenStatesDiscriminator]
) -> None:
    """Row by row and without padding: states behind the beginning → projection → encoder → mean → head."""
    reads, pattern = READS[name]
    model = encoder(reads)
    beginnings = {
        "prompt and completion": PROMPTS,
        "completion only": (END, END),
        "completion and target": ("GEN: ", "GEN: "),
    }
    found = model(backbone, disc_batch)
    for kind, rows in ANSWERS.items():
        starts = [start for start, row in zip(beginnings[name], rows, strict=True) for _ in row]
        for outputs, text, start in zip(found[kind], texts(pattern, kind), starts, strict=True):
            row = encode(backbone.tokenizer, text)
            with backbone.generator(), torch.no_grad():
                states = backbone.causal_lm.base_model(input_ids=row[None]).last_hidden_state
            behind = states[:, len(encode(backbone.tokenizer, start)) :]
            wanted = model.head(model.encoder(model.project(behind)).mean(1))[0]
            torch.testing.assert_close(outputs, wanted, atol=1e-5, rtol=1e-4)
    assert found["none"].shape == (0, 2)


def test_the_encoders_loss_never_reaches_the_generator(
    backbone: Backbone, disc_batch: DiscriminatorBatch, encoder: Callable[..., HiddenStatesDiscriminator]
) -> None:
    model = encoder()
    with model.mode(backbone):
        model(backbone, disc_batch)["sampled"].square().sum().backward()
    assert all(p.grad is None for p in backbone.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert len(model.trainable(backbone)) == len(list(model.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_nothing_for_the_encoder(
    training: bool,
    backbone: Backbone,
    disc_batch: DiscriminatorBatch,
    encoder: Callable[..., HiddenStatesDiscriminator],
) -> None:
    """A one-letter completion alone and beside one of 40; outside of training torch takes another path."""
    model = encoder().train(training)
    prompts, targets = disc_batch.prompts[:1], disc_batch.targets[:1]
    short, long = encode(backbone.tokenizer, "b" + END), encode(backbone.tokenizer, "abcd" * 10 + END)
    with torch.set_grad_enabled(training):
        alone = model(backbone, DiscriminatorBatch(prompts, targets, {"sampled": [[short]]}))["sampled"]
        beside = model(backbone, DiscriminatorBatch(prompts, targets, {"sampled": [[short, long]]}))["sampled"]
    torch.testing.assert_close(alone[0], beside[0], atol=1e-6, rtol=1e-5)
    assert (beside[0] - beside[1]).abs().max() > 1e-3


def test_the_encoder_alone_learns_in_a_run(build: Build, batch: PromptBatch) -> None:
    model = HiddenStatesDiscriminator(width=16, layers=1, heads=2)
    module = build(model=model)
    before, shared = {name: p.clone() for name, p in model.state_dict().items()}, state(module)
    recorder, _ = fit(module, [batch], 2)
    assert moved(before, model.state_dict()) == set(before)
    assert all(f".{GENERATOR}." in name for name in moved(shared, recorder.weights[-1]))


@pytest.mark.parametrize("settings", [{"width": 10, "heads": 4}, {"layers": 0}, {"heads": 0}])
def test_the_encoders_shape_is_checked(settings: dict[str, int]) -> None:
    with pytest.raises(LoraGANError, match="multiple of heads"):
        HiddenStatesDiscriminator(**settings)


@pytest.mark.parametrize("name", ["adapter", "own base", "hidden states"])
def test_scores_are_in_float32_under_bf16_mixed(name: str, backbone: Backbone, disc_batch: DiscriminatorBatch) -> None:
    """A head whose bias is a large score: completions that differ by less than a step of bfloat16 do not tie."""
    model = {
        "adapter": AdapterDiscriminator,
        "own base": lambda: OwnBaseDiscriminator("builtin", LoraSettings(2, 4)),
        "hidden states": HiddenStatesDiscriminator,
    }[name]()
    model.build(backbone)
    head = model.head if isinstance(model, OwnBaseDiscriminator | HiddenStatesDiscriminator) else backbone.score_head
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), model.mode(backbone):
        head.weight.mul_(0.01)
        head.bias.fill_(8.0)
        scores = torch.cat(list(model(backbone, disc_batch).values()))[:, 0]
    assert scores.dtype == torch.float32
    assert len(scores.bfloat16().unique()) < len(scores.unique())


def test_only_the_adapter_can_be_differentiated_through() -> None:
    found: list[type[DiscriminatorModel]] = [
        j
        for j in (
            AdapterDiscriminator,
            HiddenStatesDiscriminator,
            OwnBaseDiscriminator,
            LikelihoodDiscriminator,
            PairwiseDiscriminator,
        )
        if j.differentiable
    ]
    assert found == [AdapterDiscriminator]


# the likelihood as a score


@torch.no_grad()
def log_probability(backbone: Backbone, prompt: Tensor, completion: Tensor) -> float:
    """Of a completion in the active mode, from plain rows."""
    logits: Tensor = backbone.causal_lm(input_ids=torch.cat([prompt, completion])[None]).logits[0]
    found = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, completion[:, None])
    return float(found.sum())


@torch.no_grad()
def test_likelihood_scores_are_the_ratio_to_the_reference(backbone: Backbone, disc_batch: DiscriminatorBatch) -> None:
    """Intercept + β·(log p − log p_reference), the reference being the base and later the generator's snapshot."""
    model = LikelihoodDiscriminator(beta=0.25)
    model.intercept.data.fill_(0.5)
    for _ in range(2):
        with model.mode(backbone):
            found = model(backbone, disc_batch)
        for kind, rows in disc_batch.completions.items():
            wanted = []
            for prompt, completions in zip(disc_batch.prompts, rows, strict=True):
                for completion in completions:
                    with backbone.discriminator():
                        mine = log_probability(backbone, prompt, completion)
                    with backbone.snapshot():
                        wanted.append(0.5 + 0.25 * (mine - log_probability(backbone, prompt, completion)))
            assert found[kind][:, 0].tolist() == pytest.approx(wanted, abs=1e-4)
            assert found[kind].shape == (len(wanted), 2) and not found[kind][:, 1].any()
        backbone.take_snapshot()


def test_likelihood_learns_with_its_adapter_and_its_intercept_alone(build: Build, batch: PromptBatch) -> None:
    """The linear head of the backbone is not its own."""
    module = build(model=LikelihoodDiscriminator(), objective=ClosenessBCE(), discriminator_updates=1)
    before = state(module)
    fit(module, [batch], 1)
    learned = {name for name in moved(before, state(module)) if "generator" not in name}
    assert learned and all(f".{DISCRIMINATOR}." in name for name in learned)
    assert not module.discriminator.model.intercept.detach().equal(torch.zeros(()))  # type: ignore[arg-type]
    for beta in (0.0, float("inf")):
        with pytest.raises(LoraGANError, match="beta must be a finite number above 0"):
            LikelihoodDiscriminator(beta)


# target and completion side by side


def test_both_candidates_stand_behind_the_prompt(
    disc_batch: DiscriminatorBatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    reading = TargetAndCompletion(after=" ?")(disc_batch, tokenizer)
    assert reading.beginnings == disc_batch.prompts
    leads = completion_leads(disc_batch)
    seen = set()
    for kind, rows in ANSWERS.items():
        for b, row in enumerate(rows):
            for completion, found, first in zip(row, reading.branches[kind][b], leads[kind][b], strict=True):
                pair = (completion, TARGETS[b]) if first else (TARGETS[b], completion)
                assert tokenizer.decode(found) == " A: {} B: {} ?".format(*pair) + END
                seen.add(first)
    assert seen == {True, False}


def test_half_of_the_pairs_stand_in_each_order_and_each_always_in_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    """Neither the place in the batch nor the kind decides, and one pair of answers has no order of its own."""
    prompts = tuple(encode(tokenizer, f"Q{n}: ") for n in range(400))
    yes, no = (encode(tokenizer, text + END) for text in ("yes", "no"))
    batch = DiscriminatorBatch(prompts, (yes,) * 400, {"sampled": [[no]] * 400, "hard": [[yes, no]] * 400})
    found = completion_leads(batch)
    order = [row[0] for row in found["sampled"]]
    assert 150 < sum(order) < 250
    assert order == [row[1] for row in found["hard"]]
    chosen = list(range(7, 400, 3))
    assert completion_leads(batch.of(chosen))["sampled"] == [[order[b]] for b in chosen]


@torch.no_grad()
def test_a_score_is_the_margin_in_favour_of_the_completion(backbone: Backbone, disc_batch: DiscriminatorBatch) -> None:
    """From a plain row of its own: the head's first number, turned where the completion is second, 0 for a copy."""
    model = PairwiseDiscriminator()
    leads = completion_leads(disc_batch)
    with model.mode(backbone):
        found = model(backbone, disc_batch)
        for kind, rows in ANSWERS.items():
            wanted = []
            for b, row in enumerate(rows):
                for text, first in zip(row, leads[kind][b], strict=True):
                    pair = (text, TARGETS[b]) if first else (TARGETS[b], text)
                    ids = encode(backbone.tokenizer, PROMPTS[b] + " A: {} B: {}".format(*pair) + END)
                    states = backbone.causal_lm.base_model(input_ids=ids[None]).last_hidden_state[0, -1]
                    margin, tie = backbone.score_head(states).tolist()
                    wanted.append([0.0 if text == TARGETS[b] else margin if first else -margin, tie])
            torch.testing.assert_close(found[kind], torch.tensor(wanted).view(-1, 2), atol=1e-4, rtol=1e-4)
    assert found["sampled"][2, 0] == 0.0


@pytest.fixture
def separable(make_batch: Callable[..., PromptBatch]) -> Callable[[int, int], PromptBatch]:
    return lambda first, last: make_batch(*((f"Q{n}", f"a{n % 7}a", f"z{n % 5}z") for n in range(first, last)))


def test_a_critic_names_the_target_whichever_place_it_has(
    build: Build, separable: Callable[[int, int], PromptBatch]
) -> None:
    """Trained on 32 prompts, asked about 60 others."""
    module = build(
        model=PairwiseDiscriminator(),
        objective=PairwisePayoff(),
        policy=0.0,
        supervised=0.0,
        sampling=Sampling(max_new_tokens=2),
        num_generations=1,
        advantage=MovingAverage(),
        discriminator_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    )
    fit(module, [separable(0, 32)], 40)
    others = separable(40, 100)
    asked = DiscriminatorBatch(
        others.prompt_ids, others.target_ids, {"hard": [list(row) for row in others.negative_ids]}
    )
    leads = torch.tensor(completion_leads(asked)["hard"])[:, 0]
    with module.discriminator.model.mode(module.backbone), torch.no_grad():
        score = module.discriminator.model(module.backbone, asked)["hard"][:, 0]
    assert leads.any() and not leads.all()
    for place in (leads, ~leads):
        assert (score[place] < 0).float().mean() > 0.9


def test_a_pairwise_objective_needs_a_pairwise_model(build: Build) -> None:
    with pytest.raises(LoraGANError, match=r"AdapterDiscriminator does not compare .*choose PairwiseDiscriminator"):
        build(objective=PairwisePayoff())
    module = build(model=PairwiseDiscriminator(), objective=PairwisePayoff())
    assert not module.discriminator.can_judge(module.backbone)
    with pytest.raises(LoraGANError, match="coupled needs a differentiable discriminator"):
        build(model=PairwiseDiscriminator(), objective=PairwisePayoff(), coupled=1.0)
