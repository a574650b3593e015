"""The prompt tree: where everything stands, and that it computes what separate rows compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lora_gan.backbone import GENERATOR, Backbone
from lora_gan.tree import PADDING, grow, grow_scored

Completions = dict[str, list[list[Tensor]]]

PROMPTS = [torch.tensor([10, 11]), torch.tensor([12, 13, 14])]
ANSWERS: Completions = {
    "sampled": [
        [torch.tensor([20]), torch.tensor([21, 22])],
        [torch.tensor([23, 24, 25]), torch.tensor([26])],
    ],
    "target": [[torch.tensor([30])], [torch.tensor([31, 32])]],
}


def test_a_tree_drawn_by_hand() -> None:
    tree = grow(PROMPTS, ANSWERS)
    assert tree.ids[0, :6].tolist() == [10, 11, 20, 21, 22, 30]
    assert tree.ids[1].tolist() == [12, 13, 14, 23, 24, 25, 26, 31, 32]
    assert tree.position_ids[0, :6].tolist() == [0, 1, 2, 2, 3, 2]
    assert tree.position_ids[1].tolist() == [0, 1, 2, 3, 4, 5, 3, 3, 4]
    assert tree.segments.tolist() == [[0, 0, 1, 2, 2, 3, -1, -1, -1], [0, 0, 0, 1, 1, 1, 2, 3, 3]]

    sampled = tree.branches["sampled"]
    assert sampled.row.tolist() == [0, 0, 1, 1]
    assert sampled.ids.tolist() == [[20, 0, 0], [21, 22, 0], [23, 24, 25], [26, 0, 0]]
    assert sampled.mask.tolist() == [[True, False, False], [True, True, False], [True] * 3, [True, False, False]]
    assert sampled.columns.tolist() == [[2, 0, 0], [3, 4, 0], [3, 4, 5], [6, 0, 0]]
    assert sampled.parents.tolist() == [[1, 0, 0], [1, 3, 0], [2, 3, 4], [2, 0, 0]]
    assert sampled.last.tolist() == [2, 4, 5, 6]

    target = tree.branches["target"]
    assert target.row.tolist() == [0, 1]
    assert target.columns.tolist() == [[5, 0], [7, 8]]
    assert target.parents.tolist() == [[1, 0], [2, 7]]
    assert target.last.tolist() == [5, 8]


def test_who_sees_whom() -> None:
    mask = grow(PROMPTS, ANSWERS).attention_mask
    assert mask.shape == (2, 1, 9, 9)
    drawn = [
        "x........",  # 10, the prompt
        "xx.......",  # 11
        "xxx......",  # 20, completion 1
        "xx.x.....",  # 21, completion 2
        "xx.xx....",  # 22
        "xx...x...",  # 30, target
    ]
    assert ["".join(".x"[sees] for sees in row) for row in mask[0, 0, :6].int().tolist()] == drawn
    drawn = [
        "x........",  # 12, the prompt
        "xx.......",
        "xxx......",
        "xxxx.....",  # 23, completion 1
        "xxxxx....",
        "xxxxxx...",
        "xxx...x..",  # 26, completion 2
        "xxx....x.",  # 31, target
        "xxx....xx",
    ]
    assert ["".join(".x"[sees] for sees in row) for row in mask[1, 0].int().tolist()] == drawn
    assert mask.any(-1).all(), "a query that sees nothing would be NaN"


def test_kinds_may_be_empty_and_counts_may_differ() -> None:
    tree = grow(PROMPTS, {"none": [[], []], "some": [[], [torch.tensor([5]), torch.tensor([6, 7])]]})
    assert tree.branches["none"].row.numel() == 0
    assert tree.branches["none"].last.tolist() == []
    assert tree.branches["some"].row.tolist() == [1, 1]
    assert tree.branches["some"].columns.tolist() == [[3, 0], [4, 5]]


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ([torch.tensor([1])], {"target": [[torch.tensor([], dtype=torch.long)]]}),
        ([torch.tensor([], dtype=torch.long)], {"target": [[torch.tensor([1])]]}),
    ],
)
def test_nothing_grows_from_nothing(prompts: Sequence[Tensor], completions: Completions) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        grow(prompts, completions)


# the tree computes what separate rows compute


def bushy() -> tuple[list[Tensor], Completions]:
    """Three prompts with branches of unequal length, drawn at random."""
    torch.manual_seed(3)

    def tokens(n: int) -> Tensor:
        return torch.randint(0, 256, (n,))

    prompts = [tokens(5), tokens(2), tokens(9)]
    sampled = [[tokens(1), tokens(6)], [tokens(4), tokens(2)], [tokens(3), tokens(3)]]
    target = [[tokens(7)], [tokens(1)], [tokens(4)]]
    negatives = [[tokens(2)], [], [tokens(5), tokens(1)]]
    return prompts, {"sampled": sampled, "target": target, "negatives": negatives}


def alone(backbone: Backbone, prompt: Tensor, branch: Tensor) -> Tensor:
    """Log-probabilities (T,) of one branch by transformers' own forward on ``prompt + branch``."""
    logits = backbone.causal_lm(input_ids=torch.cat([prompt, branch])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, branch[:, None]).squeeze(1)


def each_alone(
    backbone: Backbone, prompts: Sequence[Tensor], completions: Mapping[str, list[list[Tensor]]]
) -> list[Tensor]:
    return [alone(backbone, prompts[b], x) for rows in completions.values() for b, row in enumerate(rows) for x in row]


def test_tree_equals_rows(architecture: str, make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(architecture, "float64")
    prompts, completions = bushy()
    tree = grow(prompts, completions)
    with backbone.generator():
        found = backbone.logprobs(tree)
        values = torch.cat([found[kind][tree.branches[kind].mask] for kind in completions])
        wanted = torch.cat(each_alone(backbone, prompts, completions))
        assert wanted.std() > 1, "the distributions should be peaked"
        torch.testing.assert_close(values.double(), wanted, atol=1e-5, rtol=0)
        assert all((found[kind][~tree.branches[kind].mask] == 0).all() for kind in completions)

        torch.testing.assert_close(values.mean().double(), wanted.mean(), atol=1e-5, rtol=0)
        weights = backbone.parameters_of(GENERATOR)
        ours = torch.autograd.grad(-values.mean(), weights)
        theirs = torch.autograd.grad(-wanted.mean(), weights)
    assert max(gradient.abs().max() for gradient in theirs) > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_temperature_divides_the_logits_of_its_kind(backbone: Backbone) -> None:
    prompts, completions = bushy()
    tree = grow(prompts, completions)
    branch = completions["sampled"][0][1]  # the second of all sampled branches
    with backbone.generator(), torch.no_grad():
        tempered, plain = backbone.logprobs(tree, {"sampled": 0.7}), backbone.logprobs(tree)
        logits = backbone.causal_lm(input_ids=torch.cat([prompts[0], branch])[None]).logits[0, len(prompts[0]) - 1 : -1]
    wanted = (logits / 0.7).log_softmax(-1).gather(1, branch[:, None]).squeeze(1)
    torch.testing.assert_close(tempered["sampled"][1], wanted, atol=1e-4, rtol=0)
    assert torch.equal(tempered["target"], plain["target"])


def test_neighbours_and_padding_change_nothing(architecture: str, make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(architecture)
    prompts, completions = bushy()
    tree = grow(prompts, completions)
    assert (tree.segments == PADDING).any()
    dirty = replace(
        tree,
        ids=torch.where(tree.segments == PADDING, 77, tree.ids),
        position_ids=torch.where(tree.segments == PADDING, 5, tree.position_ids),
    )
    single = grow(prompts[:1], {"target": completions["target"][:1]})
    with backbone.generator(), torch.no_grad():
        wanted = backbone.logprobs(tree)
        for kind, values in backbone.logprobs(dirty).items():
            torch.testing.assert_close(values, wanted[kind], atol=1e-5, rtol=0)
        among_others = wanted["target"][0][tree.branches["target"].mask[0]]
        torch.testing.assert_close(among_others, backbone.logprobs(single)["target"][0], atol=1e-5, rtol=0)


def test_the_discriminator_scores_as_separate_rows(architecture: str, make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(architecture, "float64")
    prompts, completions = bushy()
    tree = grow(prompts, completions)
    with backbone.discriminator(), torch.no_grad():
        found = backbone.score_branches(tree)
        for kind, rows in completions.items():
            texts = [torch.cat([prompts[b], branch]) for b, row in enumerate(rows) for branch in row]
            hidden = [backbone.causal_lm.base_model(input_ids=text[None]).last_hidden_state[0, -1] for text in texts]
            head = backbone.score_head
            wanted = torch.stack(hidden).float() @ head.weight.T + head.bias  # (M, 2)
            torch.testing.assert_close(found[kind], wanted, atol=1e-5, rtol=0)
    assert found["sampled"].std() > 0.05


def test_leaving_out_last_tokens_changes_no_log_probability(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("gpt2")
    prompts = [torch.tensor([72, 105]), torch.tensor([81, 58, 32])]
    completions = {
        "sampled": [[torch.tensor([97, 98, 256]), torch.tensor([256])], [torch.tensor([99])]],
        "none": [[], []],
    }
    with backbone.generator():
        whole, scored = (
            backbone.logprobs(grow(prompts, completions)),
            backbone.logprobs(grow_scored(prompts, completions)),
        )
    assert grow_scored(prompts, completions).ids.shape == (2, 4)  # of 6: prompt 2, branches 2 + 0
    torch.testing.assert_close(scored["sampled"], whole["sampled"], atol=1e-5, rtol=0)
    assert len(scored["none"]) == 0
    with pytest.raises(ValueError, match="at least one token"):
        grow_scored(prompts, {"sampled": [[torch.tensor([], dtype=torch.long)], []]})
