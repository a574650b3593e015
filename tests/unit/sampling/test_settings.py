"""Settings of sampling are checked."""

from __future__ import annotations

import pytest

from lora_gan.errors import LoraGANError
from lora_gan.sampling import Sampling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "do_sample: false"),
        ({"temperature": -1.0}, "temperature must be > 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"base": "int4"}, "int8 or null"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]
