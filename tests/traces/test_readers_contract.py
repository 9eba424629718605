"""What every reader owes: schema-valid tables, provenance without machine paths, a byte-identical round trip."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from kvtwin.traces import InputError, Run
from kvtwin.traces.readers import READERS, detect, read_run
from kvtwin.traces.schema import TABLES
from kvtwin.traces.table import check_table

Samples = Mapping[str, Callable[[Path], Path]]

REAL = {
    "data/vllm_cpu/shared_prefix_1": ("vllm_recording", 220, 5788),
    "data/vllm_cpu/saturated_2": ("vllm_recording", 220, 930),
    "oracle/vllm/h_edges": ("vllm_recording", 180, 3317),
    "oracle/vllm019/j_async_priority": ("vllm_recording", 350, 1047),
    "oracle/sglang/v059/sched_prio_p1.jsonl.gz": ("sglang_log", 220, 3326),
    "oracle/vllm/c_synth_300/trace.jsonl.gz": ("kvtwin_jsonl", 300, None),
    "data/runs/llmservingsim/RTXPRO6000__Llama-3.1-8B": ("llmservingsim_run", 300, None),
    "data/runs/llmservingsim/workloads/sharegpt-llama-3.1-8b-300-sps10.jsonl.gz": ("llmservingsim_workload", 300, None),
    "data/traces/mooncake/conversation_trace.jsonl.gz": ("mooncake", 12031, None),
    "data/traces/mooncake/synthetic_trace.jsonl.gz": ("mooncake", 3993, None),
    "data/traces/tair/event_publisher.log.gz": ("tair", 102, None),
    "data/traces/azure2023/AzureLLMInferenceTrace_code.csv.gz": ("azure2023", 8819, None),
    "data/traces/azure2023/AzureLLMInferenceTrace_conv.csv.gz": ("azure2023", 19366, None),
}


def _check_run(run: Run, folder: Path) -> None:
    for key in TABLES:
        if run.has(key):
            table = getattr(run, key)
            assert table.schema.equals(TABLES[key], check_metadata=True)
            check_table(table, key, "test")
    if run.requests.column("block_hashes").null_count < run.requests.num_rows:
        assert run.info.hash_block_tokens
    assert str(folder) not in json.dumps(asdict(run.info), allow_nan=False)
    again = Run.open(run.write(folder / "first"))
    assert again.info == run.info
    again.write(folder / "second")
    for file in (folder / "first").iterdir():
        assert file.read_bytes() == (folder / "second" / file.name).read_bytes(), file.name


def test_every_format_has_a_sample(samples: Samples) -> None:
    assert set(samples) == set(READERS)


@pytest.mark.parametrize("name", READERS)
def test_sample(name: str, samples: Samples, tmp_path: Path) -> None:
    path = samples[name](tmp_path)
    assert detect(path) == name
    _check_run(read_run(path), tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in READERS if name != "kvtwin"])
def test_gzip_is_unpacked_whatever_the_name(name: str, samples: Samples, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    path = samples[name](plain)
    shutil.copytree(plain, packed, dirs_exist_ok=True)
    for file in packed.rglob("*"):
        if file.is_file() and not file.name.endswith(".gz"):
            file.write_bytes(gzip.compress(file.read_bytes()))
            if file.suffix == ".jsonl":
                file.rename(file.with_name(file.name + ".gz"))
    other = packed / path.relative_to(plain)
    other = other if other.exists() else other.with_name(other.name + ".gz")
    assert detect(other) == name
    assert read_run(other).requests.equals(read_run(path).requests)


@pytest.mark.parametrize("path", REAL)
def test_real_data(path: str, shared: Path, tmp_path: Path) -> None:
    name, num_requests, num_steps = REAL[path]
    assert detect(shared / path) == name
    run = read_run(shared / path)
    assert run.requests.num_rows == num_requests
    assert (run.steps.num_rows if run.has("steps") else None) == num_steps
    _check_run(run, tmp_path / "out")


def test_oracle_counts_follow_from_its_steps(shared: Path) -> None:
    """The oracle states cache hits and preemptions per request; engine recordings leave them to the steps."""
    from kvtwin.traces.readers import vllm_recording as reader

    for case in sorted((shared / "oracle" / "vllm").iterdir()):
        run = read_run(case)
        steps = {name: run.steps.column(name).to_pylist() for name in ("sched_ns", "request", "cache_len", "preempted")}
        derived = reader._first_admissions(steps, run.requests.num_rows)
        for name in ("cached_tokens", "num_preemptions"):
            assert derived[name] == run.requests.column(name).to_pylist(), (case.name, name)


def test_bundled_recordings_are_what_the_reader_gives_today(shared: Path, root: Path, tmp_path: Path) -> None:
    bundled = root / "traces" / "targets" / "vllm-cpu-tiny" / "runs"
    names = sorted(folder.name for folder in bundled.iterdir())
    assert names == sorted(folder.name for folder in (shared / "data" / "vllm_cpu").iterdir() if folder.is_dir())
    for name in names:
        fresh, kept = read_run(shared / "data" / "vllm_cpu" / name), Run.open(bundled / name)
        assert kept.requests.equals(fresh.requests) and kept.steps.equals(fresh.steps)
        assert kept.info.source == fresh.info.source and kept.info.engine_config == fresh.info.engine_config


def test_bundled_recordings_open(root: Path) -> None:
    for folder in (root / "traces" / "targets" / "vllm-cpu-tiny" / "runs").iterdir():
        run = Run.open(folder)
        check_table(run.steps, "steps", folder)
        assert run.requests.column("first_token_ns").null_count == 0
        assert run.info.hardware and run.info.model and run.info.engine == "vllm 0.32.0"


@pytest.mark.parametrize("text", ["", "hello\n", "a,b\n1,2\n", '{"x": 1}\n', "[1]\n", '{"x": \n'])
def test_unknown_file_lists_the_known_formats(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_run(path)
    assert "mooncake" in str(caught.value) or "not JSON" in str(caught.value)


def test_unknown_folder_name_and_nothing(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "known: kvtwin"), (tmp_path / "no", "no such file")):
        with pytest.raises(InputError, match=words):
            detect(path)
    with pytest.raises(InputError, match="unknown format 'mooncace'; known: kvtwin"):
        read_run(tmp_path, "mooncace")
