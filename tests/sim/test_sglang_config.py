from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports.cli import main
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.latency.profile import Profile
from kvtwin.sim.sglang.config import SGLANG_RULES, SglangConfig, rules_version, sglang_config
from kvtwin.traces.errors import InputError
from kvtwin.traces.run import Run

GOOD: dict[str, Any] = {"engine": "sglang", "max_total_tokens": 4096}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunked_prefil_size": 512}, "unknown setting 'chunked_prefil_size'; did you mean chunked_prefill_size?"),
        ({"zzz": 1}, "unknown setting 'zzz'; known: max_total_tokens"),
        ({"engine": "vllm"}, "engine is 'vllm': 'sglang' expected"),
        ({"max_total_tokens": None}, "max_total_tokens is missing"),
        ({"max_total_tokens": 0}, "max_total_tokens is 0: at least 1 expected"),
        ({"page_size": 64, "max_total_tokens": 100}, "a multiple of page_size (64) expected"),
        ({"page_size": "16"}, "page_size is '16': int expected"),
        ({"enable_mixed_chunk": 1}, "enable_mixed_chunk is 1: bool expected"),
        ({"schedule_policy": "lifo"}, "one of fcfs, lpm, dfs-weight, lof, random expected"),
        ({"radix_eviction_policy": "belady"}, "one of lru, lfu"),
        ({"schedule_conservativeness": float("nan")}, "schedule_conservativeness is nan: float expected"),
        ({"schedule_conservativeness": 0.0}, "schedule_conservativeness is 0.0: > 0"),
        ({"enable_priority_scheduling": True, "schedule_policy": "lpm"}, "with priority scheduling: fcfs or lof"),
        ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm is 'EAGLE': only None is simulated"),
        ({"dp_size": 2}, "dp_size is 2: only 1 is simulated"),
        ({"version": "latest"}, "version is 'latest': an SGLang version"),
        ({"hicache_storage_backend": "file"}, "needs enable_hierarchical_cache"),
        ({"enable_hierarchical_cache": True, "hicache_ratio": 1.0}, "the host must hold more: > 1"),
        ({"enable_hierarchical_cache": True, "disable_radix_cache": True}, "the hierarchical cache needs it"),
        ({"hicache_storage_backend_extra_config": "{"}, "is not JSON"),
        ({"hicache_storage_backend_extra_config": "[1]"}, "a table or JSON object expected"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        sglang_config({**GOOD, **settings}, "engine.toml")
    assert str(caught.value).startswith("engine.toml: ")
    assert message in str(caught.value)


def test_a_command_line_can_be_pasted() -> None:
    config = sglang_config(
        {
            "engine": "sglang", "--max-total-tokens": 4096, "page-size": 16, "tensor-parallel-size": 2,
            "--attention-backend": "fa3", "dp_size": 1, "hicache-storage-backend-extra-config": '{"prefetch_threshold": 64}',
        },
        "engine.toml",
    )  # fmt: skip
    assert (config.page_size, config.tp_size) == (16, 2)
    assert config.hicache_storage_backend_extra_config == {"prefetch_threshold": 64}


def test_what_sglang_chooses_itself() -> None:
    config = SglangConfig(max_total_tokens=1_000_000)
    assert config.context_length == 1_000_000
    assert config.max_running_requests == 2048
    assert SglangConfig(max_total_tokens=1_000_000, context_length=65_536).max_running_requests == 4096
    assert SglangConfig(max_total_tokens=64, chunked_prefill_size=-1).chunk_tokens is None
    assert not SglangConfig(max_total_tokens=64, chunked_prefill_size=-1, enable_mixed_chunk=True).mixes_chunks


def test_rules_follow_the_nearest_older_version() -> None:
    assert [rules_version(version) for version in ("0.4.0", "0.5.6", "0.5.8", "0.5.9", "0.6")] == [
        "0.5.6", "0.5.6", "0.5.6", "0.5.9", "0.5.9"
    ]  # fmt: skip
    assert SglangConfig(max_total_tokens=64, version="0.5.6.post2").rules is SGLANG_RULES["0.5.6"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"request_id": name, "arrival_s": 0.01 * place, "input_length": 40, "output_length": 5}
        for place, name in enumerate("abc")
    ]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "engine.toml").write_text('engine = "sglang"\nmax_total_tokens = 512\npage_size = 4\n')
    Profile(kind="linear", latency=LinearLatency(6_000_000, 25_000, 20, 10_000).to_json()).write(tmp_path / "p.json")
    return tmp_path


def simulate(folder: Path) -> int:
    places = [str(folder / "trace.jsonl"), "--engine", str(folder / "engine.toml"), "--profile", str(folder / "p.json")]
    return main(["simulate", *places, "-o", str(folder / "run"), "--record", "steps"])


def test_the_command_writes_a_run(folder: Path) -> None:
    assert simulate(folder) == 0
    run = Run.open(folder / "run")
    assert run.info.engine == "sglang 0.5.9 (rules of 0.5.9)"
    assert run.requests.column("finish_ns").null_count == 0
    # Overlap: "a" is prefilled, then decodes; "b" arrives while it does and is prefilled first.
    assert run.steps.column("request").to_pylist()[:2] == [[0], [0]]
    assert run.steps.column("input_len").to_pylist()[0] == [40]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ('engine = "sglang"\nmax_total_tokens = 40\n', "row 0, input_tokens: 40 + 5 tokens: more than the 28 that"),
        ('engine = "sglang"\npage_size = 4\n', "engine.toml: max_total_tokens is missing"),
        ('engine = "sglng"\nmax_total_tokens = 40\n', "engine is 'sglng': 'vllm' or 'sglang' expected"),
    ],
)
def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], engine: str, message: str) -> None:
    (folder / "engine.toml").write_text(engine)
    assert simulate(folder) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "run").exists()
