"""Decoding in place, as on a GPU, run on the CPU: the same tokens as over growing buffers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_gan.backbone import Backbone
from lora_gan.sampling import Sampling, decoder, draw_uniform, prepare, sampler
from lora_gan.types import Rollout

ENDS = [*range(0, 256, 9)]


def prompts(backbone: Backbone) -> list[Tensor]:
    texts = ["Hello, you", "Hi", "What is the capital of France?"]
    return [torch.tensor(backbone.tokenizer.encode(text)) for text in texts]


def drawn(backbone: Backbone, way: sampler._Way, how: Sampling, seen: list[Tensor], k: int = 3) -> Rollout:
    torch.manual_seed(5)
    choices = sampler._Drawn(backbone, how, draw_uniform(3 * k, how, backbone.device))
    with backbone.generator(), torch.no_grad():
        way(backbone, prompts(backbone), k, choices, seen.append)
    return sampler.gather(backbone, choices.ids, choices.logprobs, choices.ends, choices.finished, k)


@pytest.mark.parametrize(
    "how",
    [Sampling(12), Sampling(12, top_p=0.8, temperature=0.7), Sampling(12, do_sample=False)],
    ids=["1", "p", "greedy"],
)
def test_the_same_completions(
    how: Sampling, architecture: str, make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "LOOK", 2)
    monkeypatch.setattr(sampler, "FEWEST", 1)
    backbone = make_backbone(architecture)
    prepare(backbone)
    backbone.causal_lm.generation_config.eos_token_id = ENDS
    rows: list[Tensor] = []
    found = drawn(backbone, sampler._decode_in_place, how, rows)
    wanted = drawn(backbone, sampler._decode, how, [])
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.mask, wanted.mask)
    assert torch.equal(found.truncated, wanted.truncated)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-5, rtol=0)
    sizes = [len(row) for row in rows[1:]]
    assert sizes[0] == 9 and all(size in (1, 2, 4, 8) for size in sizes[1:]), "powers of two, so few graphs"
    assert all((row.diff() >= 0).all() for row in rows), "rows stay in the order of the prompts"


def test_the_way_is_right_as_measured_at_the_first_call(
    architecture: str, make_backbone: Callable[..., Backbone]
) -> None:
    backbone = make_backbone(architecture)
    with backbone.reference():
        assert sampler._is_right(backbone, sampler._decode_in_place)


def test_every_step_works_on_the_same_tensors(backbone: Backbone) -> None:
    """What a CUDA graph needs: a step writes in place and no number in it comes from Python."""
    choices = sampler._Drawn(backbone, Sampling(8), draw_uniform(6, Sampling(8), backbone.device))
    with backbone.generator(), torch.no_grad():
        made = decoder.InPlaceDecoder(backbone, prompts(backbone), 2, 8, choices.draw, graphs=True)
        state = [made.column, made.t, made.position, made.token, made.rows, made.seen, choices.ids, choices.logprobs]
        state += [
            choices.ends,
            choices.finished,
            *(x for layer in made.cache.layers for x in (layer.keys, layer.values)),
        ]
        places, shapes = [x.data_ptr() for x in state], [x.shape for x in state]
        for _ in range(3):
            made.advance()
        after = [made.column, made.t, made.position, made.token, made.rows, made.seen, choices.ids, choices.logprobs]
        after += [
            choices.ends,
            choices.finished,
            *(x for layer in made.cache.layers for x in (layer.keys, layer.values)),
        ]
    assert places == [x.data_ptr() for x in after] and shapes == [x.shape for x in after]
    assert made.t.item() == 3 and made.column.item() == max(map(len, prompts(backbone))) + 3


def test_a_step_reads_nothing_back(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under FakeTensor rules a read of a value would fail; here the reads themselves are forbidden."""

    def forbidden(*args: object) -> None:
        raise AssertionError("a step reads a value")

    choices = sampler._Drawn(backbone, Sampling(8), draw_uniform(6, Sampling(8), backbone.device))
    with backbone.generator(), torch.no_grad():
        made = decoder.InPlaceDecoder(backbone, prompts(backbone), 2, 8, choices.draw, graphs=True)
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(Tensor, name, forbidden)
        made.advance()
        monkeypatch.undo()
    assert made.t.item() == 1
