"""`kvtwin trace info` and `kvtwin trace import`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvtwin.traces import InputError, Run
from kvtwin.traces.cli import add_commands
from kvtwin.traces.readers import READERS
from kvtwin.traces.schema import REQUESTS

Samples = Mapping[str, Callable[[Path], Path]]
Cli = Callable[..., str]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str | Path) -> str:
        parser = argparse.ArgumentParser()
        add_commands(parser.add_subparsers(required=True))
        args = parser.parse_args([str(word) for word in words])
        assert args.run(args) == 0
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("name", READERS)
def test_info_of_every_format(name: str, samples: Samples, tmp_path: Path, cli: Cli) -> None:
    path = samples[name](tmp_path)
    summary = json.loads(cli("trace", "info", path, "--json"))
    assert summary["format"] == name
    assert summary["num_requests"] in (2, 3)
    assert {"request_id", "arrival_ns"} <= set(summary["columns"])
    text = cli("trace", "info", path)
    assert f"format            {name}" in text and "None" not in text


def test_info_values(samples: Samples, tmp_path: Path, cli: Cli) -> None:
    summary: dict[str, Any] = json.loads(cli("trace", "info", samples["vllm_recording"](tmp_path), "--json"))
    assert summary["num_steps"] == 4
    assert (summary["arrivals_span_s"], summary["arrivals_per_s"]) == (0.25, 8.0)
    assert summary["input_tokens"] == pytest.approx({"mean": 16 / 3, "p50": 5.0, "p90": 7.4, "p99": 7.94, "max": 8.0})
    assert summary["prefix_sharing"] == {
        "hash_block_tokens": 4,
        "tokens_seen_before": 4,  # c repeats the first block of a; the second is full in c only
        "share_of_input": 0.25,
    }
    assert summary["latency_ms"]["ttft"]["mean"] == pytest.approx((10 + 10 + 100) / 3 + 0.0005)


def test_info_of_an_empty_run(tmp_path: Path, cli: Cli) -> None:
    from kvtwin.traces import RunInfo

    Run(RunInfo("workload"), {"requests": REQUESTS.empty_table()}).write(tmp_path / "run")
    summary = json.loads(cli("trace", "info", tmp_path / "run", "--json"))
    assert (summary["num_requests"], summary["input_tokens"], summary["arrivals_per_s"]) == (0, None, None)


def test_block_size_of_formats_that_leave_it_open(samples: Samples, tmp_path: Path, cli: Cli) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"request_id": "x", "arrival_s": 0, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}\n')
    summary = json.loads(cli("trace", "info", trace, "--hash-block-tokens", "8", "--json"))
    assert summary["prefix_sharing"]["hash_block_tokens"] == 8
    for words, problem in (
        ((trace,), "2 ids for 9 tokens: 1 expected"),
        ((trace, "--hash-block-tokens", "0"), "0 tokens per block hash: 1 to"),
        ((samples["mooncake"](tmp_path), "--hash-block-tokens", "8"), "mooncake fixes the tokens"),
    ):
        with pytest.raises(InputError, match=problem):
            cli("trace", "info", *words)


def test_import_twice_gives_the_same_bytes(samples: Samples, tmp_path: Path, cli: Cli) -> None:
    path = samples["vllm_recording"](tmp_path)
    words = ("--hardware", "a box", "--model", "a model")
    text = cli("trace", "import", path, "-o", tmp_path / "one", *words)
    assert text == f"{tmp_path / 'one'}: 3 requests, 4 steps (vllm_recording)\n"
    summary = json.loads(cli("trace", "import", path, "-o", tmp_path / "two", *words, "--json"))
    assert summary["rows"] == {"requests": 3, "steps": 4}
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert Run.open(tmp_path / "one").info.hardware == "a box"
