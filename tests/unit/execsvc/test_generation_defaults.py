"""A model's own sampling parameters hold where requests give none, and bad ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from execsvc.model.generation import SamplingDefaults, from_gguf, sampling_defaults
from execsvc.model.source import open_model
from quire.errors import ConfigError, ModelFormatError


class _Source:
    """A model that brings these values."""

    path = Path("model-dir")

    def __init__(self, **values: Any) -> None:
        self._values = values

    def generation(self) -> dict[str, Any]:
        return self._values


def test_what_the_model_brings_holds_and_an_operator_goes_before_it() -> None:
    """A file of another model would otherwise have to be written for one value."""
    source = _Source(temperature=0.6, top_k=20, top_p=0.95, do_sample=False, eos_token_id=[1, 2], max_new_tokens=2048)
    assert sampling_defaults(source, "auto", None) == SamplingDefaults(0.6, 20, 0.95, max_tokens=2048)
    overridden = sampling_defaults(source, "auto", '{"temperature": 0, "min_p": 0.1, "max_new_tokens": null}')
    assert overridden == SamplingDefaults(0.0, 20, 0.95, 0.1, max_tokens=2048)


def test_nobody_s_defaults_are_no_defaults() -> None:
    """Programs that count on temperature 1 can have it."""
    assert sampling_defaults(_Source(temperature=0.6), "vllm", None) == SamplingDefaults()
    assert not sampling_defaults(_Source(temperature=0.6), "vllm", None).named()
    assert sampling_defaults(_Source(temperature=0.6), "vllm", '{"top_k": -1}') == SamplingDefaults(top_k=0)


def test_another_directory_s_file_can_be_named(tmp_path: Path) -> None:
    """The model's own directory may be read-only."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "repetition_penalty": 1.05}))
    found = sampling_defaults(_Source(temperature=0.6), str(tmp_path), None)
    assert found == SamplingDefaults(temperature=0.3, repetition_penalty=1.05)


def test_a_gguf_file_s_keys_are_known() -> None:
    """Converters write them under names of their own."""
    metadata = {"general.sampling.temp": 0.7, "general.sampling.top_k": 40, "general.sampling.penalty_repeat": 1.1}
    assert from_gguf(metadata | {"general.name": "x"}) == {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.1}


def test_the_packaged_model_has_its_card_s() -> None:
    """At temperature 1 a model of this size writes nonsense, which is what a new user would see first."""
    source = open_model("smollm2")
    try:
        assert sampling_defaults(source, "auto", None) == SamplingDefaults(temperature=0.2, top_p=0.9)
    finally:
        source.close()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -1}, "temperature: found -1, allowed is 0 .. 100"),
        ({"temperature": "hot"}, "temperature: found 'hot'"),
        ({"temperature": True}, "temperature: found True"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"top_k": 2.5}, "top_k: found 2.5, allowed is a whole number"),
        ({"top_k": -2}, "top_k: found -2"),
        ({"top_p": 0}, "top_p: found 0, allowed is greater than 0, at most 1"),
        ({"min_p": 2}, "min_p: found 2"),
        ({"repetition_penalty": 0}, "repetition_penalty: found 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, allowed is a whole number, 1 or more"),
    ],
)
def test_values_out_of_range_are_refused_when_the_model_is_loaded(values: dict[str, Any], said: str) -> None:
    """Otherwise every request that says nothing would be refused for what it did not say."""
    with pytest.raises(ModelFormatError, match=rf"model-dir: {said}.*--generation-config vllm goes without"):
        sampling_defaults(_Source(**values), "auto", None)
    if not isinstance(values.get("temperature"), float):
        with pytest.raises(ConfigError, match=f"override_generation_config: {said}"):
            sampling_defaults(_Source(), "auto", json.dumps(values))


@pytest.mark.parametrize(
    ("chosen", "override", "said"),
    [
        ("nowhere", None, "no file nowhere/generation_config.json; give 'auto', 'vllm' or a directory"),
        ("auto", "{", "override_generation_config: not JSON"),
        ("auto", "[1]", "override_generation_config: found '.1.', a JSON object is needed"),
        ("auto", '{"heat": 1}', "override_generation_config: found 'heat', allowed are temperature, top_k"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(chosen: str, override: str | None, said: str) -> None:
    """A typing error must not be passed over in silence."""
    with pytest.raises(ConfigError, match=said):
        sampling_defaults(_Source(), chosen, override)
