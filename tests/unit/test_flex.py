"""FlexAttention: the same tree, the same predictions, where it is used and where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from lora_gan import backbone as backbones
from lora_gan.backbone import Backbone
from lora_gan.flex import FLEX, attention_by, attention_of, block_mask, is_long
from lora_gan.tree import PromptTree, grow


def text(length: int, seed: int) -> Tensor:
    return torch.randint(1, 250, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tree() -> PromptTree:
    """Trees of 158 and 69 columns: two blocks, the second one with padding."""
    first = [[text(60, 1), text(70, 2), text(8, 3)], [text(5, 4), text(31, 5)]]
    return grow([text(20, 6), text(33, 7)], {"sampled": first})


def test_the_block_mask_is_that_of_the_tree(tree: PromptTree) -> None:
    found = block_mask(tree)
    assert found.shape == (2, 1, 158, 158) and len(found.kv_num_blocks[0, 0]) == 2
    assert torch.equal(create_mask(found.mask_mod, 2, 1, 158, 158, "cpu"), tree.attention_mask)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_predictions_are_those_of_sdpa(
    name: str, tree: PromptTree, make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone(name)
    masks = []
    monkeypatch.setattr("lora_gan.attention.block_mask", lambda tree: masks.append(tree) or block_mask(tree))
    with backbone.generator(), torch.no_grad():
        wanted = backbone.predict(tree)["sampled"]
        assert not masks
        monkeypatch.setattr(backbones, "is_long", lambda tree: True)
        found = backbone.predict(tree)["sampled"]
        assert len(masks) == 2, "the small tree that is measured, and this one"
        backbone.predict(tree)
        assert len(masks) == 3
    torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.hidden, wanted.hidden, atol=1e-5, rtol=1e-5)
    assert attention_of(backbone.causal_lm) == "sdpa"


def test_it_is_used_under_autocast(tree: PromptTree, make_backbone: Callable[..., Backbone]) -> None:
    """Autocast leaves queries and keys in float32 behind rotary embeddings, and values in bfloat16."""
    backbone = make_backbone("llama")
    backbone.masks()
    assert backbone._takes_blocks()
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone._takes_blocks()
    assert len(backbone._tree_forward._blocks) == 2


def test_a_model_that_does_not_take_it_keeps_sdpa(
    tree: PromptTree, make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_backbone("llama")
    with backbone.generator(), torch.no_grad():
        wanted = backbone.logprobs(tree)["sampled"]
        monkeypatch.setattr(backbones, "is_long", lambda tree: True)
        monkeypatch.setattr("lora_gan.flex._function", lambda compiled: lambda query, *_, **__: query)
        assert not backbone._takes_blocks()
        assert torch.equal(backbone.logprobs(tree)["sampled"], wanted)
    assert attention_of(backbone.causal_lm) == "sdpa"


def test_a_cpu_never_uses_it_and_the_name_is_restored(tree: PromptTree, make_backbone: Callable[..., Backbone]) -> None:
    assert not is_long(tree)
    model = make_backbone("llama").causal_lm
    with pytest.raises(KeyError), attention_by(model, FLEX):
        assert attention_of(model) == FLEX
        raise KeyError
    assert attention_of(model) == "sdpa"
