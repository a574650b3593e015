"""Architectures: trees, separate rows and the sampler give what each model's own forward gives, or it is refused.

The models are small and random. The reference is the model's own forward on one text alone, without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_gan.attention import BY_LAYER, ONE, WINDOWED, Masks, separate, window_sizes
from lora_gan.backbone import GENERATOR, Backbone, BackboneSettings, LoraSettings
from lora_gan.discriminator.models import OwnBaseDiscriminator
from lora_gan.errors import LoraGANError
from lora_gan.evolution.multi_lora import sample_population
from lora_gan.evolution.population import read_weights
from lora_gan.sampling import Sampling, draw_uniform, sample
from lora_gan.tree import PromptTree, grow, grow_scored
from lora_gan.types import DiscriminatorBatch
from tests.conftest import randomise
from tests.helpers.architectures import EOS, small

LORA = LoraSettings(2, 4)
FAST: dict[str, tuple[dict[str, Any], str | None]] = {  # settings; how it takes the mask, None: in separate rows
    "mistral": ({}, WINDOWED),
    "qwen2": ({}, BY_LAYER),
    "gemma2": ({"attn_logit_softcapping": 1.0, "final_logit_softcapping": 5.0}, BY_LAYER),
    "gemma3_text": ({}, BY_LAYER),
    "gemma3": ({}, BY_LAYER),
    "phi3": ({}, WINDOWED),
    "olmo3": ({}, BY_LAYER),
    "llama4_text": ({}, BY_LAYER),
    "gpt_oss": ({}, BY_LAYER),
    "gptj": ({}, ONE),
    "bloom": ({}, None),
    "lfm2": ({}, None),
    "qwen3_next": ({}, None),
}
UNMADE = {  # architecture: why no small model can be made here
    "blt": "4633 million parameters",  # its patcher has sizes of its own
    "dots3_note": "keys must be integer layer indices",  # its settings name the layers of the full size
    "dots3_note_text": "38 million parameters",
    "gemma3n": "requires the timm library",  # for its vision tower; its text part is in the list
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",  # drafts for another model
    "git": "86 million parameters",
    "musicgen": "no attribute 'dropout'",  # transformers cannot build it from its own configuration
    "musicgen_melody": "no attribute 'dropout'",
    "phi4_multimodal": "870 million parameters",
    "qwen4_exp": "unsupported operand type",  # nor this
    "qwen4_exp_text": "unsupported operand type",
}
REFUSED = {  # architecture: why it is refused
    **dict.fromkeys(["cpmant", "xlm", "xlnet"], "not a causal language model"),
    **dict.fromkeys(["falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"], "'out_proj' is incompatible"),
    **dict.fromkeys(["camembert", "data2vec-text", "roberta", "roberta-prelayernorm"], "gives other logits"),
    **dict.fromkeys(["xlm-roberta", "xlm-roberta-xl", "xmod"], "gives other logits"),  # it counts positions otherwise
    **dict.fromkeys(["emu3", "mllama"], "Unrecognized configuration class"),  # a text part saved alone
    "gemma4_unified_assistant": "does not run on plain text",
    "prophetnet": "does not run on plain text",
}
NOISE = {"zamba2": 5e-4}  # its step of decoding rounds otherwise than its scan
PROMPTS, COMPLETIONS = (14, 9), (12, 5, 9)  # tokens; longer than the windows of 8

Make = Callable[..., tuple[Backbone, PreTrainedModel]]


@pytest.fixture
def make(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Make:
    """A backbone on a small model of an architecture, and the model itself."""

    def make(architecture: str, lora: LoraSettings = LORA, **settings: Any) -> tuple[Backbone, PreTrainedModel]:
        folder = save(small(architecture, **settings), tokenizer, tmp_path / architecture)
        return Backbone(folder, lora, lora), AutoModelForCausalLM.from_pretrained(folder).eval()

    return make


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts() -> tuple[list[Tensor], list[list[Tensor]]]:
    """Two prompts with three completions each."""
    rng = torch.Generator().manual_seed(1)

    def tokens(n: int) -> Tensor:
        return torch.randint(3, EOS, (n,), generator=rng)

    return [tokens(n) for n in PROMPTS], [[tokens(n) for n in COMPLETIONS] for _ in PROMPTS]


def alone(model: PreTrainedModel, prompt: Tensor, completion: Tensor) -> Tensor:
    """(T,) log-probabilities by the model's own forward on one text."""
    logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, completion[:, None]).squeeze(1)


def each_alone(model: PreTrainedModel, prompts: list[Tensor], completions: list[list[Tensor]]) -> Tensor:
    """The same of all completions, one after the other."""
    return torch.cat([alone(model, p, c) for p, row in zip(prompts, completions, strict=True) for c in row])


def flat(backbone: Backbone, tree: PromptTree) -> Tensor:
    """The tree's log-probabilities of all completions, one after the other."""
    return backbone.logprobs(tree)["x"][tree.branches["x"].mask]


def in_rows(backbone: Backbone) -> None:
    """Evaluate trees in separate rows from now on."""
    backbone.masks()
    forward = backbone._tree_forward
    forward._found = dict.fromkeys(forward._found)


def equals_its_own_forward(backbone: Backbone, model: PreTrainedModel, noise: float = 1e-5) -> None:
    prompts, completions = texts()
    tree = grow_scored(prompts, {"x": completions})
    with backbone.reference():
        found = flat(backbone, tree)
        wanted = each_alone(model, prompts, completions)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        for asked in (prompts, [prompts[0], prompts[0].flip(0)]):
            torch.manual_seed(2)
            rollout = sample(backbone, asked, 2, Sampling(max_new_tokens=14))
            drawn = [list(rollout.completion_ids[:2]), list(rollout.completion_ids[2:])]
            found = rollout.logprobs[rollout.mask]
            torch.testing.assert_close(found, each_alone(model, asked, drawn), atol=noise, rtol=1e-5)
        in_rows(backbone)
        torch.testing.assert_close(flat(backbone, tree), wanted, atol=1e-5, rtol=1e-5)
    with backbone.generator():
        torch.testing.assert_close(flat(backbone, tree), wanted, atol=1e-5, rtol=1e-5)


# every architecture


@pytest.mark.parametrize("architecture", FAST)
def test_an_important_architecture_equals_its_own_forward(architecture: str, make: Make) -> None:
    """Sliding windows, chunks, attention without SDPA, ALiBi, convolutions, linear attention, a multimodal model."""
    settings, kind = FAST[architecture]
    backbone, model = make(architecture, **settings)
    with backbone.reference():
        masks = backbone.masks()
    assert (masks.kind if masks else None) == kind
    equals_its_own_forward(backbone, model)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in FAST])
def test_every_architecture_equals_its_own_forward_or_is_refused_by_name(architecture: str, make: Make) -> None:
    if architecture in UNMADE:
        with pytest.raises(Exception) as unmade:
            small(architecture)
        assert UNMADE[architecture] in f"{unmade.type.__name__}: {unmade.value}"
        return
    if architecture in REFUSED:
        with pytest.raises(LoraGANError, match=REFUSED[architecture]):
            equals_its_own_forward(*make(architecture))
        return
    equals_its_own_forward(*make(architecture), NOISE.get(architecture, 1e-5))


# what else runs on trees


def test_gradients_through_windows_equal_those_of_separate_rows(make: Make) -> None:
    backbone, _ = make("gemma2")
    randomise(backbone)
    prompts, completions = texts()
    tree, weights = grow(prompts, {"x": completions}), backbone.parameters_of(GENERATOR)
    with backbone.generator():
        found = torch.autograd.grad(flat(backbone, tree).mean(), weights)
        in_rows(backbone)
        wanted = torch.autograd.grad(flat(backbone, tree).mean(), weights)
    assert max(gradient.abs().max() for gradient in wanted) > 1e-3
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_checkpointing_of_separate_rows_keeps_the_gradients(make: Make, tmp_path: Path) -> None:
    plain, _ = make("lfm2")
    spared = Backbone(str(tmp_path / "lfm2"), LORA, LORA, BackboneSettings(gradient_checkpointing=True))
    randomise(plain)
    spared.load_state_dict(plain.state_dict())
    prompts, completions = texts()
    gradients = []
    for backbone in (plain, spared):
        with backbone.generator():
            loss = flat(backbone, grow(prompts, {"x": completions})).mean()
            gradients.append(torch.autograd.grad(loss, backbone.parameters_of(GENERATOR)))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "settings", "plain"),
    [
        ("gemma2", {"final_logit_softcapping": 1000.0}, False),
        ("cohere", {}, False),  # a scale
        ("granite", {"logits_scaling": 2.0}, False),
        ("gemma3_text", {}, True),
        ("lfm2", {}, True),
    ],
)
def test_whether_the_head_is_a_product_is_measured(
    architecture: str, settings: dict[str, Any], plain: bool, make: Make
) -> None:
    backbone, _ = make(architecture, **settings)
    backbone.masks()
    assert (backbone._tree_forward.plain_head is not None) == plain


@pytest.mark.parametrize("architecture", ["gemma3_text", "lfm2"])
def test_scores_are_read_at_the_end_of_each_branch_also_from_embeddings(architecture: str, make: Make) -> None:
    backbone, model = make(architecture)
    prompts, completions = texts()
    tree = grow(prompts, {"x": completions, "none": [[], []]})
    with backbone.reference():
        found = backbone.score_branches(tree)["x"]
        ends = [
            model.base_model(input_ids=torch.cat([prompt, completion])[None]).last_hidden_state[0, -1]
            for prompt, row in zip(prompts, completions, strict=True)
            for completion in row
        ]
        wanted = backbone.score_head(torch.stack(ends))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        embedded = model.get_input_embeddings()(tree.ids)
        torch.testing.assert_close(backbone.score_branches(tree, embedded)["x"], wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(backbone.word_embeddings()[tree.ids], embedded)


@pytest.mark.parametrize("architecture", ["gemma2", "lfm2"])
def test_an_own_base_of_the_discriminator_takes_the_same_path(
    architecture: str, make: Make, backbone: Backbone, tmp_path: Path
) -> None:
    _, base = make(architecture)
    model = OwnBaseDiscriminator(str(tmp_path / architecture), LORA)
    prompts, completions = texts()
    batch = DiscriminatorBatch(tuple(prompts), (completions[0][0], completions[1][0]), {"sampled": completions})
    with torch.no_grad(), model.mode(backbone):
        found = model(backbone, batch)["sampled"]
        reading = model.input_format(model._translated(batch, backbone.tokenizer), model.tokenizer)
        rows = [
            torch.cat([start, branch])
            for b, start in enumerate(reading.beginnings)
            for branch in reading.branches["sampled"][b]
        ]
        ends = [base.base_model(input_ids=row[None]).last_hidden_state[0, -1] for row in rows]
        torch.testing.assert_close(found, model.head(torch.stack(ends)), atol=1e-5, rtol=1e-4)


def test_a_population_samples_as_its_members_alone(make: Make) -> None:
    backbone, _ = make("lfm2")
    how, prompts = Sampling(max_new_tokens=8), texts()[0]
    uniform = draw_uniform(4, how, backbone.device, torch.Generator().manual_seed(0))
    members, alone = [], []
    for _ in range(2):
        randomise(backbone)
        members.append(read_weights(backbone))
        with backbone.generator():
            alone.append(sample(backbone, prompts, 2, how, uniform))
    assert not torch.equal(alone[0].ids, alone[1].ids)
    for found, wanted in zip(sample_population(backbone, members, prompts, 2, how, uniform), alone, strict=True):
        assert torch.equal(found.ids, wanted.ids)
        torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_low_precision_is_no_reason_for_separate_rows(make: Make, tmp_path: Path) -> None:
    make("olmoe")
    backbone = Backbone(str(tmp_path / "olmoe"), LORA, LORA, BackboneSettings("bfloat16"))
    with backbone.reference():
        assert backbone.masks() is not None


# the parts of a model that are adapted


def test_adapters_are_in_the_text_part_of_a_multimodal_model(make: Make) -> None:
    for targets in ("all-linear", ["q_proj", "fc1"]):
        backbone, model = make("gemma3", LoraSettings(2, 4, targets))
        text = model.config.text_config
        assert backbone.hidden_size == text.hidden_size and backbone.context_length == text.max_position_embeddings
        adapted = [name for name, _ in backbone.causal_lm.named_parameters() if "lora_" in name]
        assert adapted and all("language_model" in name for name in adapted)


def test_a_router_that_returns_several_tensors_gets_no_adapter(make: Make) -> None:
    backbone, _ = make("llama4_text")
    adapted = [name for name, _ in backbone.causal_lm.named_parameters() if "lora_" in name]
    assert adapted and not any("router" in name for name in adapted)


def test_an_added_mask_is_in_the_data_type_of_autocast(make: Make) -> None:
    backbone, model = make("llama")
    prompts, completions = texts()
    tree = grow_scored(prompts, {"x": completions})
    masks = backbone.masks()
    assert masks is not None and masks.additive == torch.float32
    query, visible = tree.position_ids, tree.attention_mask
    assert torch.equal(masks(visible, query, query) == 0, visible)
    with backbone.reference(), torch.autocast("cpu", torch.bfloat16):
        lower = backbone.masks()
        assert lower is not None and lower(visible, query, query).dtype == torch.bfloat16
        found, wanted = flat(backbone, tree), each_alone(model, prompts, completions)
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_sees_nothing_gives_no_nan(dtype: torch.dtype) -> None:
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    visible[:, :, 1] = False
    added = Masks(LlamaConfig(), additive=dtype)(visible, torch.arange(3)[None], torch.arange(3)[None])
    query, key, value = torch.randn(3, 1, 2, 3, 8).to(dtype)
    key.requires_grad_()
    found = scaled_dot_product_attention(query, key, value, attn_mask=added)
    found.sum().backward()
    assert key.grad is not None and found.isfinite().all() and key.grad.isfinite().all()
    assert torch.equal(found[:, :, 0], value[:, :, 0])


def test_small_windows_are_there_for_the_comparison_only(make: Make) -> None:
    backbone, _ = make("gemma3_text")
    with backbone.reference():
        backbone.masks()
    assert window_sizes(backbone.causal_lm.config) == {"sliding_attention": 8}


@pytest.mark.parametrize("architecture", ["falcon", "gpt2"])
def test_linear_layers_of_an_architectures_own_class_get_adapters(architecture: str, make: Make) -> None:
    backbone, _ = make(architecture)
    adapted = {name.split(".lora_A")[0] for name, _ in backbone.causal_lm.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 8  # attention's two and the MLP's two of two layers


# refusals


def test_a_model_that_sees_later_tokens_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = AutoModelForCausalLM.from_config(BertConfig(vocab_size=257, **sizes))
    backbone = Backbone(save(bert, tokenizer, tmp_path / "bert"), LORA, LORA)
    with backbone.generator(), pytest.raises(LoraGANError, match=r"BertLMHeadModel .* not a causal language model"):
        backbone.logprobs(grow([torch.tensor([5, 6])], {"x": [[torch.tensor([7])]]}))


@pytest.mark.slow
def test_mamba_learns_in_the_layers_that_can_be_adapted(make: Make) -> None:
    equals_its_own_forward(*make("mamba", LoraSettings(2, 4, ["in_proj"])))


def test_the_branches_of_a_tree_as_rows_drawn_by_hand() -> None:
    first, second = torch.tensor([10, 11]), torch.tensor([12])
    branches = {"a": [[torch.tensor([20, 21]), torch.tensor([22])], []]}
    rows = separate(grow([first, second], branches))
    assert rows.tree.tolist() == [0, 0, 1] and rows.lengths.tolist() == [4, 3, 1]
    assert rows.columns[0].tolist() == [0, 1, 2, 3]
    assert rows.columns[1, :3].tolist() == [0, 1, 4]
    assert rows.columns[2, :1].tolist() == [0]
    assert rows.row[0].tolist() == [0, 0, 0, 0, 1] and rows.place[0].tolist() == [0, 1, 2, 3, 2]
    assert int(rows.row[1, 0]) == 2
