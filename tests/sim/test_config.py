from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtwin.sim.vllm.config import VllmConfig, read_settings, recorded_settings, rules_version, vllm_config
from kvtwin.traces.errors import InputError

GOOD: dict[str, Any] = {"num_gpu_blocks": 1000, "version": "0.19.0"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_num_batched_token": 512},
            "unknown setting 'max_num_batched_token'; did you mean max_num_batched_tokens?",
        ),
        ({"max_num_seqs": 0}, "max_num_seqs is 0: at least 1 expected"),
        ({"max_num_seqs": "many"}, "max_num_seqs is 'many': int expected"),
        ({"max_num_seqs": True}, "max_num_seqs is True: int expected"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1: bool expected"),
        ({"watermark": float("nan")}, "watermark is nan: float expected"),
        ({"watermark": 0.1}, "watermark is 0.1: vLLM 0.19.0 has no such option"),
        ({"policy": "lifo"}, '"fcfs" or "priority" expected'),
        ({"version": "latest"}, "version is 'latest'"),
        ({"engine": "sglnag"}, "engine is 'sglnag': 'vllm' or 'sglang' expected"),
        ({"data_parallel_size": 2}, "data_parallel_size is 2: only 1 is simulated"),
        ({"max_model_len": 100_000}, "the KV cache holds 15984 tokens"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}, "without chunked prefill"),
    ],
)
def test_bad_settings_are_one_line_that_says_what_would_be_right(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        vllm_config({**GOOD, **settings}, "engine.toml")
    assert str(caught.value).startswith("engine.toml: ")
    assert message in str(caught.value)


def test_the_number_of_blocks_has_no_default() -> None:
    with pytest.raises(InputError, match="num_gpu_blocks is missing"):
        vllm_config({}, "engine.toml")


def test_flags_of_a_server_can_be_pasted() -> None:
    config = vllm_config({**GOOD, "scheduling_policy": "priority", "dtype": "bfloat16", "seed": 42}, "engine.toml")
    assert config == VllmConfig(num_gpu_blocks=1000, version="0.19.0", policy="priority")
    assert config.max_model_len == 999 * 16


@pytest.mark.parametrize(
    ("version", "rules"), [("0.19", "0.19"), ("0.31.9", "0.19"), ("0.32.0", "0.32"), ("1.0", "0.32"), ("0.8", "0.19")]
)
def test_a_version_follows_the_nearest_older_rules(version: str, rules: str) -> None:
    assert rules_version(version) == rules


def test_settings_come_from_toml_json_and_a_recordings_meta(tmp_path: Path) -> None:
    (tmp_path / "engine.toml").write_text("max_num_seqs = 7\n")
    (tmp_path / "meta.json").write_text(
        json.dumps({"vllm_version": "0.19.0", "engine_kwargs": {"max_num_seqs": 9, "compilation_config": {"a": 1}}})
    )
    assert read_settings(tmp_path / "engine.toml") == {"max_num_seqs": 7}
    assert read_settings(tmp_path / "meta.json") == {"max_num_seqs": 9, "version": "0.19.0"}
    assert recorded_settings({"tokenizer": "x", "block_size": 16}) == {"block_size": 16}


@given(st.text(max_size=60))
def test_no_text_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("engine") / "engine.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        vllm_config({**GOOD, **read_settings(path)}, path)
    except InputError as error:
        assert "\n" not in str(error)


@given(st.dictionaries(st.sampled_from([*VllmConfig.__slots__, "x"]), st.one_of(st.integers(), st.floats(), st.text())))
def test_no_value_is_a_traceback(settings: dict[str, Any]) -> None:
    try:
        vllm_config({**GOOD, **settings}, "engine.toml")
    except InputError as error:
        assert "\n" not in str(error)
