"""Backbone: which adapter is active, which parameters learn, and that nothing else moves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lora_gan.attention import TreeForward
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, BackboneSettings, LoraSettings, adapter_of, load_base
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.discriminator import OwnBaseDiscriminator
from lora_gan.errors import LoraGANError
from lora_gan.sampling import Sampling, sample
from lora_gan.tensors import kl_k3
from lora_gan.tree import PromptTree, grow
from tests.conftest import randomise

IDS = torch.tensor([[72, 101, 108, 108, 111, 44, 32]])
TREE = grow(
    [torch.tensor([72, 105])], {"target": [[torch.tensor([33, 10, 256])]], "negatives": [[torch.tensor([5, 6])]]}
)


def state(backbone: Backbone) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in backbone.state_dict().items()}


def moved(backbone: Backbone, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit-identical any more."""
    return {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}


def randomised(backbone: Backbone) -> Backbone:
    torch.manual_seed(2)
    randomise(backbone)
    return backbone


def logits(backbone: Backbone) -> Tensor:
    with torch.no_grad():
        return backbone.causal_lm(input_ids=IDS).logits


def test_adapters_at_initialisation_equal_the_base(
    architecture: str, bases: dict[str, str], make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone(architecture, trained=False)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(bases[architecture])(input_ids=IDS).logits
        with backbone.reference():
            reference = backbone.logprobs(TREE)["target"]
            torch.testing.assert_close(logits(backbone), wanted, atol=1e-5, rtol=0)
        with backbone.generator():
            assert torch.equal(logits(backbone), wanted)
            assert kl_k3(backbone.logprobs(TREE)["target"], reference).abs().max() == 0
        with backbone.discriminator():
            assert torch.equal(logits(backbone), wanted)


def test_only_lora_and_head_learn(backbone: Backbone) -> None:
    learning = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in backbone.named_parameters() if "lora_" in name or "score_head" in name}
    generator = {id(p) for p in backbone.parameters_of(GENERATOR)}
    discriminator = {id(p) for p in backbone.parameters_of(DISCRIMINATOR)}
    assert not generator & discriminator
    assert generator | discriminator == {id(p) for p in backbone.parameters() if p.requires_grad}
    assert {id(p) for p in backbone.score_head.parameters()} < discriminator
    rank = {p.shape[0] for name, p in backbone.named_parameters() if f"lora_A.{GENERATOR}" in name}
    assert rank == {4}


def test_every_linear_layer_but_the_head_has_an_adapter(
    architecture: str, bases: dict[str, str], make_backbone: Callable[..., Backbone]
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(bases[architecture])
    head = plain.get_output_embeddings()
    linear = {name for name, m in plain.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    assert len(linear) == {"gpt2": 8, "llama": 14, "qwen2": 14, "gpt_neox": 8}[architecture]
    names = [name for name, _ in make_backbone(architecture).causal_lm.named_parameters()]
    for role in (GENERATOR, DISCRIMINATOR):
        assert {name.split(".lora_A.")[0] for name in names if f".lora_A.{role}." in name} == linear


def test_reference_mode_has_no_gradient(backbone: Backbone) -> None:
    with backbone.reference():
        assert not backbone.logprobs(TREE)["target"].requires_grad
    with backbone.generator():
        assert backbone.logprobs(TREE)["target"].requires_grad


def test_a_generator_step_moves_the_generator_only(backbone: Backbone) -> None:
    before = state(backbone)
    optimizer = torch.optim.SGD(backbone.parameters_of(GENERATOR), lr=1.0)
    with backbone.generator():
        (-backbone.logprobs(TREE)["target"].mean()).backward()
        optimizer.step()
    assert moved(backbone, before) == {name for name in before if f".{GENERATOR}." in name}
    assert all(p.grad is None for p in backbone.parameters_of(DISCRIMINATOR))


def test_a_discriminator_step_moves_its_lora_and_head_only(backbone: Backbone) -> None:
    before = state(backbone)
    optimizer = torch.optim.SGD(backbone.parameters_of(DISCRIMINATOR), lr=1.0)
    with backbone.discriminator():
        outputs = backbone.score_branches(TREE)
        (outputs["target"] - outputs["negatives"] - 1).square().mean().backward()
        optimizer.step()
    head = {"score_head.weight"}  # the bias cancels in the difference
    assert moved(backbone, before) == head | {name for name in before if f".{DISCRIMINATOR}." in name}
    assert all(p.grad is None for p in backbone.parameters_of(GENERATOR))


def test_the_first_discriminator_step_moves_its_lora(make_backbone: Callable[..., Backbone]) -> None:
    """At initialisation B is 0, so A has no gradient yet, but B has."""
    backbone = make_backbone(trained=False)
    before = state(backbone)
    with backbone.discriminator():
        backbone.score_branches(TREE)["target"].sum().backward()
        torch.optim.SGD(backbone.parameters_of(DISCRIMINATOR), lr=1.0).step()
    assert {name for name in before if f"lora_B.{DISCRIMINATOR}" in name} <= moved(backbone, before)


def test_modes_differ_nest_and_restore(backbone: Backbone) -> None:
    with backbone.reference():
        base = logits(backbone)
    with backbone.generator():
        generator = logits(backbone)
        with backbone.discriminator():
            discriminator = logits(backbone)
            with backbone.reference():
                assert torch.equal(logits(backbone), base)
            assert torch.equal(logits(backbone), discriminator)
        assert torch.equal(logits(backbone), generator)
    assert torch.equal(logits(backbone), base), "outside every mode the base answers"
    assert (generator - base).abs().max() > 0.1
    assert (discriminator - base).abs().max() > 0.1
    assert (discriminator - generator).abs().max() > 0.1


def test_modes_restore_after_exceptions(backbone: Backbone) -> None:
    with backbone.generator():
        wanted = logits(backbone)
        with pytest.raises(RuntimeError, match="stop"), backbone.reference():
            raise RuntimeError("stop")
        assert torch.equal(logits(backbone), wanted)
        assert torch.is_grad_enabled()
    broken = PromptTree(TREE.ids + 1000, TREE.position_ids, TREE.segments, TREE.branches)
    with backbone.generator():
        with pytest.raises(IndexError):
            backbone.logprobs(broken)
        assert logits(backbone).shape == (1, 7, 257), "the head sees every place again"


def test_gradients_stay_on_after_every_switch(backbone: Backbone) -> None:
    """PEFT turns those of the inactive adapter off when it switches, which would freeze it for good."""
    for mode in (backbone.generator, backbone.reference, backbone.discriminator):
        with mode():
            pass
        assert all(
            p.requires_grad for p in [*backbone.parameters_of(GENERATOR), *backbone.parameters_of(DISCRIMINATOR)]
        )


def test_dropout_is_off_in_training(backbone: Backbone) -> None:
    backbone.train()
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("role", [GENERATOR, DISCRIMINATOR])
def test_adapters_load_with_plain_peft(
    architecture: str, role: str, bases: dict[str, str], make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    backbone = make_backbone(architecture)
    save_adapter(backbone, role, tmp_path / role)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[architecture]), str(tmp_path / role))
    with torch.no_grad(), backbone._mode(role):
        wanted = logits(backbone)
        torch.testing.assert_close(plain(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)
    with backbone.reference():
        assert (wanted - logits(backbone)).abs().max() > 0.1


def test_targets_may_be_named(bases: dict[str, str]) -> None:
    backbone = Backbone(bases["gpt2"], LoraSettings(2, 4, ["c_attn"]), LoraSettings(2, 4))
    adapted = {
        name.split(".lora_A")[0].split(".")[-1] for name, _ in backbone.lm.named_parameters() if "lora_A.gen" in name
    }
    assert adapted == {"c_attn"}


def test_a_low_precision_base_keeps_float32_adapters(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(dtype="bfloat16")
    kinds = {("lora_" in name or "score_head" in name, p.dtype) for name, p in backbone.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    with backbone.generator():
        assert backbone.logprobs(TREE)["target"].dtype == torch.float32


def test_an_unknown_base_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-model")
    with pytest.raises(LoraGANError, match="no-such-model"):
        Backbone(missing, LoraSettings(), LoraSettings())


def test_a_good_folder_is_not_sent_to_the_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    with pytest.raises(LoraGANError, match="AlbertConfig") as refused:
        load_base(str(tmp_path))
    assert "network" not in str(refused.value) and "causal language model" in str(refused.value)


def test_weights_that_are_missing_in_the_file_are_refused(bases: dict[str, str], tmp_path: Path) -> None:
    """One layer under another name: transformers would train on random numbers in its place."""
    shutil.copytree(bases["llama"], tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["renamed"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoraGANError, match=r"lack 1 of the model's weights, such as model.layers.1.mlp.up_proj.weight"):
        load_base(str(tmp_path / "base"))


def test_a_base_whose_logits_are_nan_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bases["llama"]).save_pretrained(tmp_path)
    backbone = Backbone(str(tmp_path), LoraSettings(2, 4), LoraSettings(2, 4))
    with backbone.generator(), pytest.raises(LoraGANError, match=r"logits of LlamaForCausalLM .* are NaN"):
        backbone.logprobs(TREE)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(bases["llama"], tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(LoraGANError, match="has 258 tokens, but the model has embeddings for 257"):
        Backbone(str(tmp_path / "base"), LoraSettings(2, 4), LoraSettings(2, 4))


def test_a_rank_is_at_least_one() -> None:
    with pytest.raises(LoraGANError, match="rank must be at least 1, got 0"):
        LoraSettings(rank=0)


# the snapshot


def snapshot_logits(backbone: Backbone) -> Tensor:
    with backbone.snapshot():
        return logits(backbone)


def test_before_a_snapshot_is_taken_it_is_the_base(backbone: Backbone) -> None:
    assert not backbone.has_snapshot
    with backbone.reference():
        assert torch.equal(snapshot_logits(backbone), logits(backbone))


def test_a_snapshot_is_the_generator_as_it_was(backbone: Backbone) -> None:
    """Later steps of the generator do not move it, and it moves nothing else; a later snapshot takes its place."""
    before = state(backbone)
    with backbone.generator():
        first = logits(backbone)
        backbone.take_snapshot()
        assert torch.equal(logits(backbone), first), "the mode stays as it was"
    assert not {name for name in before if not torch.equal(before[name], backbone.state_dict()[name])}
    assert torch.equal(snapshot_logits(backbone), first)

    frozen = state(backbone)
    optimizer = torch.optim.SGD(backbone.parameters_of(GENERATOR), lr=1.0)
    with backbone.generator():
        (-backbone.logprobs(TREE)["target"].mean()).backward()
        optimizer.step()
        second = logits(backbone)
    assert moved(backbone, frozen) == {name for name in frozen if f".{GENERATOR}." in name}
    assert torch.equal(snapshot_logits(backbone), first) and not torch.equal(first, second)
    backbone.take_snapshot()
    assert torch.equal(snapshot_logits(backbone), second)


def test_without_its_snapshot_a_backbone_is_as_before(backbone: Backbone) -> None:
    names, learning = list(backbone.state_dict()), {n for n, p in backbone.named_parameters() if p.requires_grad}
    with backbone.generator():
        before = logits(backbone)
        backbone.take_snapshot()
        backbone.drop_snapshot()
        assert torch.equal(logits(backbone), before), "the mode stays as it was"
    backbone.drop_snapshot()
    assert not backbone.has_snapshot and list(backbone.state_dict()) == names
    assert {n for n, p in backbone.named_parameters() if p.requires_grad} == learning
    with backbone.reference():
        assert torch.equal(snapshot_logits(backbone), logits(backbone))
    backbone.take_snapshot()
    assert torch.equal(snapshot_logits(backbone), before)


def test_a_snapshot_has_no_gradient_and_belongs_to_no_role(backbone: Backbone) -> None:
    roles = [{id(p) for p in backbone.parameters_of(role)} for role in (GENERATOR, DISCRIMINATOR)]
    learning = {id(p) for p in backbone.parameters() if p.requires_grad}
    backbone.take_snapshot()
    for mode in (backbone.snapshot, backbone.generator, backbone.discriminator, backbone.reference):
        with mode():
            assert {id(p) for p in backbone.parameters() if p.requires_grad} == learning
    assert roles == [{id(p) for p in backbone.parameters_of(role)} for role in (GENERATOR, DISCRIMINATOR)]
    with backbone.snapshot():
        assert not backbone.logprobs(TREE)["target"].requires_grad
    kinds = {p.dtype for name, p in backbone.named_parameters() if ".snapshot." in name}
    assert kinds == {torch.float32}


def test_a_snapshot_of_a_low_precision_base_is_in_float32(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(dtype="bfloat16")
    backbone.take_snapshot()
    assert {p.dtype for name, p in backbone.named_parameters() if ".snapshot." in name} == {torch.float32}
    with backbone.generator():
        assert torch.equal(snapshot_logits(backbone), logits(backbone))


# memory


def gradients(backbone: Backbone, losses: Callable[[], list[Tensor]]) -> dict[str, Tensor]:
    """Of both roles, after a generator's forward whose backward happens in the discriminator's mode."""
    backbone.zero_grad()
    for loss in losses():
        with backbone.discriminator():
            loss.backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(architecture: str, bases: dict[str, str]) -> None:
    """Also where another adapter is active by the time of the backward pass."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        backbone = Backbone(
            bases[architecture],
            LoraSettings(4, 8),
            LoraSettings(2, 4),
            BackboneSettings(gradient_checkpointing=checkpointing),
        )
        randomise(backbone)
        tree = grow([torch.tensor([1, 2, 3])], {"completion": [[torch.tensor([4, 5]), torch.tensor([6, 7, 8])]]})

        def losses(backbone: Backbone = backbone, tree: PromptTree = tree) -> list[Tensor]:
            with backbone.generator():
                generator = -backbone.logprobs(tree)["completion"].sum()
            with backbone.discriminator():
                discriminator = backbone.score_branches(tree)["completion"].square().sum()
            return [generator, discriminator]

        found.append(gradients(backbone, losses))
    plain, again = found
    assert plain.keys() == again.keys() and any(".generator." in n for n in plain)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


def test_gradient_checkpointing_keeps_less(bases: dict[str, str]) -> None:
    kept = {}
    for checkpointing in (False, True):
        backbone = Backbone(
            bases["gpt2"], LoraSettings(), LoraSettings(), BackboneSettings(gradient_checkpointing=checkpointing)
        )
        tree = grow([torch.arange(60)], {"completion": [[torch.arange(60)]]})
        weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, weights: set[int] = weights, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with backbone.generator(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            backbone.score_branches(tree)
        kept[checkpointing] = sum(sizes.values())
    assert kept[True] < 0.5 * kept[False], kept


def test_gradient_checkpointing_leaves_sampling_its_cache(bases: dict[str, str]) -> None:
    completions = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        backbone = Backbone(
            bases["llama"], LoraSettings(), LoraSettings(), BackboneSettings(gradient_checkpointing=checkpointing)
        )
        torch.manual_seed(3)
        with backbone.generator():
            completions.append(sample(backbone, [torch.tensor([1, 2])], 3, Sampling(max_new_tokens=6)))
    assert completions[0].texts == completions[1].texts


def test_quantization_needs_a_gpu(bases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LoraGANError, match="quantization: 4bit needs a CUDA GPU, and none was found; leave it out"):
        load_base(bases["gpt2"], quantization="4bit")
    with pytest.raises(LoraGANError, match="must be 4bit, 8bit or null, got '3bit'"):
        load_base(bases["gpt2"], quantization="3bit")


def test_quantization_needs_its_package(bases: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("lora_gan.number_formats.find_spec", lambda name: None)
    with pytest.raises(LoraGANError, match=r"pip install 'lora-gan\[quantization\]'"):
        load_base(bases["gpt2"], quantization="8bit")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_base_trains_its_adapters(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    backbone = Backbone("builtin", LoraSettings(), LoraSettings(), BackboneSettings("bfloat16", quantization)).to(
        "cuda"
    )
    tree = grow([torch.tensor([1, 2, 3], device="cuda")], {"completion": [[torch.tensor([4, 5], device="cuda")]]})
    with backbone.generator():
        (-backbone.logprobs(tree)["completion"].sum()).backward()
    moved = [p.grad for name, p in backbone.named_parameters() if ".generator." in name and "lora_B" in name]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in moved)


# shapes of adapters


def with_lora(base: str, *lora: LoraSettings) -> Backbone:
    torch.manual_seed(2)
    return Backbone(base, lora[0], lora[-1])


def learn(backbone: Backbone, steps: int = 3) -> None:
    """Both roles, each by the parameters that its optimizer gets."""
    for role, mode in ((GENERATOR, backbone.generator), (DISCRIMINATOR, backbone.discriminator)):
        optimizer = torch.optim.SGD(backbone.parameters_of(role), lr=0.1)
        for _ in range(steps):
            with mode():
                if role == GENERATOR:
                    loss = -backbone.logprobs(TREE)["target"].mean()
                else:
                    loss = backbone.score_branches(TREE)["target"].square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@pytest.mark.parametrize(
    ("architecture", "lora"),
    [
        ("gpt2", LoraSettings(4, 8, ["c_attn", "wte"])),
        ("llama", LoraSettings(4, 8, ["q_proj", "embed_tokens"])),
        ("llama", LoraSettings(4, 8, use_dora=True, use_rslora=True)),
        ("gpt2", LoraSettings(4, 8, use_dora=True)),
    ],
)
def test_all_of_an_adapter_learns_and_is_copied(architecture: str, lora: LoraSettings, bases: dict[str, str]) -> None:
    """PEFT names the matrices of word embeddings otherwise than those of linear layers."""
    backbone = with_lora(bases[architecture], lora)
    before = state(backbone)
    learn(backbone)
    adapters = {name for name in before if ".lora_" in name}
    assert moved(backbone, before) == adapters | {"score_head.weight", "score_head.bias"}
    assert {adapter_of(name) for name in adapters} == {GENERATOR, DISCRIMINATOR}
    with backbone.generator():
        wanted = logits(backbone)
        backbone.take_snapshot()
    assert torch.equal(snapshot_logits(backbone), wanted)
    learn(backbone)
    assert torch.equal(snapshot_logits(backbone), wanted)
    backbone.copy_adapter("snapshot", DISCRIMINATOR)
    with backbone.discriminator():
        assert torch.equal(logits(backbone), wanted)


def test_rslora_scales_by_the_root_of_the_rank(bases: dict[str, str]) -> None:
    scales = []
    for lora in (LoraSettings(4, 8), LoraSettings(4, 8, use_rslora=True)):
        backbone = with_lora(bases["gpt2"], lora)
        scales.append({m.scaling[GENERATOR] for m in backbone.modules() if isinstance(m, LoraLayer)})
    assert scales == [{2.0}, {4.0}]


def test_word_embeddings_are_those_of_the_mode(bases: dict[str, str]) -> None:
    backbone = with_lora(bases["llama"], LoraSettings(4, 8, ["q_proj", "embed_tokens"]))
    learn(backbone)
    ids, found = torch.tensor([72, 33]), []
    for mode in (backbone.generator, backbone.discriminator, backbone.reference):
        with mode():
            found.append(backbone.word_embeddings()[ids])
            torch.testing.assert_close(found[-1], backbone.causal_lm.get_input_embeddings()(ids))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prooj"], r"has no layer 'q_prooj'; set lora\.targets to all-linear or to layers among .*k_proj, lm_head"),
        (["q_proj", "v_prooj"], "has no layer 'v_prooj'"),  # PEFT would go on with q_proj alone
        ("q_proj", r"lora\.targets q_proj cannot have an adapter in LlamaForCausalLM .* layers among down_proj"),
        (["mlp"], "cannot have an adapter in LlamaForCausalLM .*LlamaMLP"),
    ],
)
def test_targets_that_are_no_layers_are_refused_by_name(targets: str | list[str], message: str, bases: Any) -> None:
    for lora in (
        [LoraSettings(4, 8, targets)],
        [LoraSettings(), LoraSettings(4, 8, targets)],
    ):
        with pytest.raises(LoraGANError, match=message):
            with_lora(bases["llama"], *lora)


def test_no_targets_are_refused() -> None:
    with pytest.raises(LoraGANError, match=r"lora\.targets is empty"):
        LoraSettings(targets=[])


def test_a_plain_head_is_part_of_the_loss(
    architecture: str, make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers and gradients as from the model's own logits."""
    backbone = make_backbone(architecture)
    results = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(TreeForward, "plain_head", None)
        with backbone.generator():
            predicted = backbone.predict(TREE, {"target": 0.7}, with_entropy=True)
            assert (predicted["target"].logits.head is not None) == plain
            values = [x for p in predicted.values() for x in (p.logprobs, p.entropy, p.hidden.sum(-1)) if x is not None]
            loss = torch.stack([(x * x).sum() for x in values]).sum()
            results.append([*values, *torch.autograd.grad(loss, backbone.parameters_of(GENERATOR))])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_head_that_may_change_is_none_of_the_loss(bases: dict[str, str]) -> None:
    adapted = with_lora(bases["llama"], LoraSettings(4, 8, ["q_proj", "lm_head"]))
    learning = with_lora(bases["llama"], LoraSettings(4, 8, ["q_proj"]))
    learning.causal_lm.lm_head.requires_grad_(True)
    for backbone in (adapted, learning):
        learn(backbone)
        with backbone.generator():
            found = backbone.predict(TREE)["target"]
            wanted = logits_of_target(backbone)
        assert found.logits.head is None
        torch.testing.assert_close(found.logits.whole(), wanted, atol=1e-5, rtol=1e-5)


def logits_of_target(backbone: Backbone) -> Tensor:
    """By the model's own forward."""
    return backbone.causal_lm(input_ids=torch.tensor([[72, 105, 33, 10, 256]])).logits[0, 1:-1]


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_that_of_peft(use_dora: bool, bases: dict[str, str], tmp_path: Path) -> None:
    """With the same random numbers the same logits as PEFT's in training mode, and without a gradient none."""
    lora = LoraSettings(4, 8, dropout=0.3, use_dora=use_dora)
    backbone = randomised(Backbone(bases["llama"], lora, LoraSettings(2, 4)))
    save_adapter(backbone, GENERATOR, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).train()
    torch.manual_seed(1)
    theirs = plain(input_ids=IDS).logits
    ids = [row.contiguous() for row in IDS]
    tree = grow([row[:1] for row in ids], {"all": [[row[1:]] for row in ids]})
    backbone.masks()
    with backbone.generator():
        torch.manual_seed(1)
        mine = backbone.predict(tree)["all"].logits.whole()
        with torch.no_grad():
            still = backbone.predict(tree)["all"].logits.whole()
            torch.testing.assert_close(
                still, plain.eval()(input_ids=IDS).logits[:, :-1].flatten(0, 1), atol=1e-5, rtol=0
            )
    torch.testing.assert_close(mine, theirs[:, :-1].flatten(0, 1), atol=1e-5, rtol=0)
    assert (mine - still).abs().max() > 0.01
    assert not any(module.training for module in backbone.modules())


def test_recomputed_layers_drop_the_same(bases: dict[str, str]) -> None:
    gradients = []
    for recompute in (False, True):
        settings = BackboneSettings(gradient_checkpointing=recompute)
        backbone = randomised(Backbone(bases["llama"], LoraSettings(4, 8, dropout=0.3), LoraSettings(2, 4), settings))
        tree = grow([IDS[0, :1]], {"all": [[IDS[0, 1:]]]})
        backbone.masks()
        torch.manual_seed(1)
        with backbone.generator():
            loss = backbone.logprobs(tree)["all"].sum()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters_of(GENERATOR) if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)


def test_dropout_of_a_discriminator_is_refused_since_its_scores_are_rewards(bases: dict[str, str]) -> None:
    with pytest.raises(LoraGANError, match="its scores are rewards"):
        Backbone(bases["llama"], LoraSettings(), LoraSettings(dropout=0.1))
    with pytest.raises(LoraGANError, match="its scores are rewards"):
        OwnBaseDiscriminator(bases["llama"], LoraSettings(dropout=0.1))
    with pytest.raises(LoraGANError, match="from 0 to below 1, got 1"):
        LoraSettings(dropout=1.0)


# bases that cannot be used


def test_an_adapter_as_base_is_refused_with_the_way_to_use_it(backbone: Backbone, tmp_path: Path) -> None:
    """transformers would load its base and switch the adapter off."""
    save_adapter(backbone, GENERATOR, tmp_path / "mine")
    base = backbone.lm.peft_config[GENERATOR].base_model_name_or_path
    message = f"give --model.base {base} and --model.generator.adapter {tmp_path / 'mine'}"
    for load in (load_base, OwnBaseDiscriminator):
        with pytest.raises(LoraGANError, match=f"is a PEFT adapter of the base '{base}'.*{message}"):
            load(str(tmp_path / "mine"))
    shutil.copy(tmp_path / "mine" / "adapter_config.json", base)
    try:
        with pytest.raises(LoraGANError, match=r"in a folder without adapter_config\.json"):
            load_base(base)
    finally:
        Path(base, "adapter_config.json").unlink()


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("left", [0, 4, 3000])
def test_a_base_cut_off_by_a_broken_download_is_one_clear_error(
    left: int, bases: dict[str, str], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(bases["gpt2"], tmp_path / "base"))
    os.truncate(base / "model.safetensors", left)
    with pytest.raises(LoraGANError, match=r"cannot load base .*base'"):
        load_base(str(base))
    (base / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(2000)}, base / "pytorch_model.bin")
    os.truncate(base / "pytorch_model.bin", left)
    with pytest.raises(LoraGANError, match=r"cannot load base .*base'"):
        load_base(str(base))


def test_a_base_that_would_execute_code_is_refused(bases: dict[str, str], tmp_path: Path, work_in: Path) -> None:
    base = Path(shutil.copytree(bases["gpt2"], tmp_path / "base"))
    (base / "model.safetensors").unlink()
    torch.save({"weight": Malicious()}, base / "pytorch_model.bin")
    with pytest.raises(LoraGANError, match=r"cannot load base .*base'"):
        load_base(str(base))
    assert not Path("executed").exists()
