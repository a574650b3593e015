"""Backbone: which adapter is active, which parameters learn, and that nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_gan.backbone import DISCRIMINATOR, GENERATOR, Backbone, BackboneSettings, LoraSettings, load_base
from lora_gan.checkpointing.adapters import save_adapter
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
    monkeypatch.setattr("lora_gan.backbone.find_spec", lambda name: None)
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
