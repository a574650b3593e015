"""Packed weights compute the same and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.activations import NewGELUActivation

from lora_gan.backbone import Backbone
from lora_gan.onednn import _operators_exist, onednn_layout

IDS = torch.tensor([[72, 101, 108, 108, 111]])


def test_the_same_logits_on_all_architectures(architecture: str, make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone(architecture)
    with backbone.generator(), torch.no_grad():
        plain = backbone.causal_lm(input_ids=IDS).logits
        with onednn_layout(backbone.causal_lm):
            inside = backbone.causal_lm(input_ids=IDS).logits
        torch.testing.assert_close(inside, plain, atol=2e-5, rtol=1e-5)
        assert torch.equal(backbone.causal_lm(input_ids=IDS).logits, plain)


def test_the_activation_in_one_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 4), NewGELUActivation()).requires_grad_(False)
    x = torch.randn(50, 4) * 5
    plain = model(x)
    with onednn_layout(model):
        torch.testing.assert_close(model(x), plain, atol=1e-6, rtol=1e-6)
        assert "forward" in vars(model[1])
    assert "forward" not in vars(model[1])


def test_what_is_trained_is_not_packed_and_forward_is_restored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    try:
        with onednn_layout(model):
            assert "forward" in vars(model[0]) and "forward" not in vars(model[1])
            raise KeyError
    except KeyError:
        pass
    assert "forward" not in vars(model[0])


def test_nothing_is_packed_under_autocast() -> None:
    model = nn.Linear(4, 4).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), onednn_layout(model):
        assert "forward" not in vars(model)


def test_nothing_is_packed_where_torch_lacks_the_operators(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lora_gan.onednn.OPERATORS", ("_no_such_operator",))
    _operators_exist.cache_clear()
    model = nn.Linear(4, 4).requires_grad_(False)
    with onednn_layout(model):
        assert "forward" not in vars(model)
    assert "torch.ops.mkldnn has no _no_such_operator in this version" in caplog.text
    _operators_exist.cache_clear()
