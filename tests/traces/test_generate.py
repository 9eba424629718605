"""Synthetic workloads: rates, gaps and lengths as theory has them, and conversations that hang together."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtwin.reports.cli import main
from kvtwin.traces.errors import InputError
from kvtwin.traces.generate.arrivals import arrival_times
from kvtwin.traces.generate.conversations import Conversations, generate
from kvtwin.traces.generate.distribution import Distribution
from kvtwin.traces.readers import read_run
from kvtwin.traces.rng import stream
from kvtwin.traces.run import Run
from kvtwin.traces.workload import prefix_blocks

parse = Distribution.parse
SPEC = Conversations(
    num_conversations=300,
    rate_per_s=2.0,
    burstiness=1.0,
    num_turns=parse("geometric:4"),
    turn_interval_s=parse("lognormal:20:1"),
    common_prefix_tokens=100,
    prefix_tokens=parse("exponential:300"),
    input_tokens=parse("lognormal:150:1"),
    output_tokens=parse("uniform:5:90"),
    block_tokens=16,
    seed=3,
)


# ---- distributions and arrivals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mean", "deviation"),
    [
        ("512", 512, 0),
        ("uniform:120:160", 140, 40 / math.sqrt(12)),
        ("exponential:60", 60, 60),
        ("geometric:5", 5, math.sqrt(5 * 4)),
        ("lognormal:1000:0.8", 1000, 800),
    ],
)
def test_mean_and_deviation_are_those_asked_for(text: str, mean: float, deviation: float) -> None:
    n = 200_000
    drawn = parse(text).sample(stream(1, text), n)
    assert parse(text).mean == mean
    assert drawn.mean() == pytest.approx(mean, abs=5 * deviation / math.sqrt(n))  # five standard errors
    assert drawn.std() == pytest.approx(deviation, rel=0.03, abs=1e-9)
    whole = parse(text).sample_whole(stream(1, text), n)
    assert whole.dtype == np.int64
    assert whole.mean() == pytest.approx(mean, abs=6 * deviation / math.sqrt(n))
    assert whole.min() >= 1


def test_both_ends_of_a_uniform_are_as_likely_as_the_rest() -> None:
    counts = np.bincount(parse("uniform:2:5").sample_whole(stream(0, "ends"), 40_000))
    assert counts[:2].sum() == 0
    assert len(counts) == 6
    assert counts[2:] == pytest.approx(np.full(4, 10_000), rel=0.05)
    assert set(parse("uniform:7:7").sample_whole(stream(0, "one"), 9)) == {7}


def test_whole_numbers_keep_their_least() -> None:
    assert parse("0").sample_whole(stream(0, "x"), 3).tolist() == [1, 1, 1]
    assert parse("0").sample_whole(stream(0, "x"), 3, least=0).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is no distribution"),
        ("normal:1:2", "is no distribution"),
        ("uniform:1:x", "is no distribution"),
        ("nan", "numbers from 0"),
        ("-1", "numbers from 0"),
        ("uniform:5", "2 numbers expected, 1 given"),
        ("uniform:5:4", "LOW is above HIGH"),
        ("geometric:0.5", "at least 1"),
        ("lognormal:0:1", "above 0"),
        ("exponential:1e300", "numbers from 0"),
    ],
)
def test_what_is_no_distribution_is_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        parse(text)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, math.inf])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    n, rate = 100_000, 8.0
    times = arrival_times(n, rate, burstiness, stream(0, "arrivals"))
    gaps_s = np.diff(times) / 1e9
    assert times[0] == 0
    assert len(times) == n
    assert (gaps_s >= 0).all()
    cv = 1 / math.sqrt(burstiness)
    assert gaps_s.mean() == pytest.approx(1 / rate, rel=5 * cv / math.sqrt(n) + 1e-9)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)
    neighbours = np.corrcoef(gaps_s[:-1], gaps_s[1:])[0, 1] if cv else 0.0
    assert abs(neighbours) < 5 / math.sqrt(n)


def test_poisson_counts_have_the_variance_of_their_mean() -> None:
    times = arrival_times(200_000, 10.0, 1.0, stream(5, "arrivals"))
    counts = np.bincount(times // 1_000_000_000)[:-1]  # arrivals in each second but the last, which is cut
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() == pytest.approx(10, rel=0.05)


def test_all_at_once_and_none() -> None:
    assert arrival_times(3, math.inf, 1.0, stream(0, "a")).tolist() == [0, 0, 0]
    assert arrival_times(1, 1.0, 1.0, stream(0, "a")).tolist() == [0]
    for rate, burstiness in ((0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0)):
        with pytest.raises(InputError, match="above 0 expected"):
            arrival_times(3, rate, burstiness, stream(0, "a"))
    with pytest.raises(InputError, match="last arrival"):
        arrival_times(9, 1e-12, 1.0, stream(0, "a"))


# ---- conversations -------------------------------------------------------------------------------------------


def rows_of(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = run.requests.to_pylist()
    return rows


def test_each_prompt_begins_with_the_one_before_and_its_answer() -> None:
    rows = rows_of(generate(SPEC))
    by_name = {row["request_id"]: row for row in rows}
    followed = 0
    for row in rows:
        assert len(row["block_hashes"]) == -(-row["input_tokens"] // 16)
        if row["parent_id"] is None:
            continue
        parent = by_name[row["parent_id"]]
        followed += 1
        assert parent["session_id"] == row["session_id"]
        assert parent["arrival_ns"] <= row["arrival_ns"]
        # The last block of the shorter prompt is partial: the same block, of which the longer one has more.
        assert row["block_hashes"][: len(parent["block_hashes"])] == parent["block_hashes"]
        assert row["input_tokens"] > parent["input_tokens"] + parent["output_tokens"]
    assert followed > 500


def test_conversations_share_the_whole_blocks_of_the_common_prefix_and_nothing_else() -> None:
    first = [row for row in rows_of(generate(SPEC)) if row["parent_id"] is None]
    assert len(first) == SPEC.num_conversations
    common = 100 // 16
    chains = [row["block_hashes"] for row in first]
    assert {tuple(chain[:common]) for chain in chains} == {tuple(range(common))}
    own = [block for chain in chains for block in chain[common:]]
    assert len(own) == len(set(own))


def test_numbers_of_turns_and_intervals_are_those_asked_for() -> None:
    rows = rows_of(generate(replace(SPEC, num_conversations=4000)))
    assert len(rows) / 4000 == pytest.approx(4, rel=0.05)
    by_name = {row["request_id"]: row for row in rows}
    gaps_s = [(row["arrival_ns"] - by_name[row["parent_id"]]["arrival_ns"]) / 1e9 for row in rows if row["parent_id"]]
    assert np.mean(gaps_s) == pytest.approx(20, rel=0.05)
    assert np.std(gaps_s) == pytest.approx(20, rel=0.15)
    starts = np.array([row["arrival_ns"] for row in rows if row["parent_id"] is None])
    assert np.diff(np.sort(starts)).mean() / 1e9 == pytest.approx(0.5, rel=0.08)


def test_a_prefix_cache_without_limits_finds_all_but_what_is_new() -> None:
    run = generate(SPEC)
    chains = prefix_blocks(run.requests, 16, 16)
    blocks = np.concatenate(chains)
    # Each conversation's longest prompt holds all its blocks; the common ones exist once.
    longest: dict[str, int] = {}
    for row in rows_of(run):
        longest[row["session_id"]] = max(longest.get(row["session_id"], 0), row["input_tokens"] // 16)
    common = 100 // 16
    assert len(np.unique(blocks)) == common + sum(most - common for most in longest.values())


def test_a_conversation_ends_where_the_model_s_length_does() -> None:
    whole, cut = generate(SPEC), generate(replace(SPEC, max_model_len=800))
    kept = {row["request_id"]: row for row in rows_of(cut)}
    fits = {
        row["request_id"]: row for row in rows_of(whole) if row["input_tokens"] + row["output_tokens"] <= 800
    }  # prompts only grow, so what fits is a beginning of its conversation
    assert 0 < len(fits) < whole.requests.num_rows
    assert kept.keys() == fits.keys()
    assert all(row["parent_id"] is None or row["parent_id"] in kept for row in kept.values())
    for name, row in kept.items():
        assert (row["arrival_ns"], row["input_tokens"]) == (fits[name]["arrival_ns"], fits[name]["input_tokens"])
    with pytest.raises(InputError, match="not one first turn fits"):
        generate(replace(SPEC, max_model_len=101))


def test_the_seed_decides_and_each_part_has_its_own_stream() -> None:
    one, again, other = generate(SPEC), generate(SPEC), generate(replace(SPEC, seed=4))
    assert one.requests.equals(again.requests)
    assert not one.requests.equals(other.requests)
    # Another distribution of answers shifts neither arrivals nor the number of turns.
    longer = generate(replace(SPEC, output_tokens=parse("500")))
    assert longer.requests.select(["request_id", "arrival_ns"]).equals(
        one.requests.select(["request_id", "arrival_ns"])
    )


def test_single_requests_have_neither_session_nor_hashes_of_their_own() -> None:
    single = replace(SPEC, num_turns=parse("1"), prefix_tokens=parse("0"), common_prefix_tokens=15)
    run = generate(single)
    assert run.info.hash_block_tokens is None
    assert run.requests.column("request_id").to_pylist()[:3] == ["r0", "r1", "r2"]
    for name in ("block_hashes", "session_id", "parent_id"):
        assert run.requests.column(name).null_count == run.requests.num_rows
    shared = generate(replace(single, common_prefix_tokens=33))
    assert shared.requests.column("block_hashes").to_pylist()[7][:2] == [0, 1]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_conversations": 0}, "num_conversations is 0: 1 to"),
        ({"num_conversations": 90_000_000}, "more than 100000000 requests"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"turn_interval_s": parse("2000000000")}, "turn_interval_s: all intervals"),
        ({"rate_per_s": 0.0}, "rate is 0.0"),
    ],
)
def test_what_cannot_be_generated_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        generate(replace(SPEC, **change))


# ---- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    return call


def test_a_run_folder_and_a_mooncake_trace_hold_the_same_requests(tmp_path: Path, cli: Callable[..., str]) -> None:
    words = ("trace", "generate", "multi-turn", "--num-conversations", 20, "--seed", 9)
    summary = json.loads(cli(*words, "-o", tmp_path / "run", "--json"))
    cli(*words, "-o", tmp_path / "trace.jsonl.gz")
    run, trace = read_run(tmp_path / "run"), read_run(tmp_path / "trace.jsonl.gz")
    assert run.info.kind == "workload"
    assert run.info.source["settings"]["seed"] == 9
    assert summary["num_requests"] == run.requests.num_rows > 20
    for column in ("input_tokens", "output_tokens"):
        assert run.requests.column(column).equals(trace.requests.column(column))
    late = run.requests.column("arrival_ns").to_numpy() - trace.requests.column("arrival_ns").to_numpy()
    assert ((late >= 0) & (late < 1_000_000)).all()
    # Sharing of whole blocks of 512 tokens survives.
    one, other = (prefix_blocks(side.requests, side.info.hash_block_tokens, 512) for side in (run, trace))
    for left, right in zip(one, other, strict=True):
        assert left.tolist() == right.tolist()


def test_random_takes_the_names_of_vllm_bench(tmp_path: Path, cli: Callable[..., str]) -> None:
    words = ("--num-prompts", 40, "--request-rate", "inf", "--input-len", "uniform:10:20", "--prefix-len", 128)
    text = cli("trace", "generate", "random", *words, "--output-len", 7, "-o", tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert text.startswith(f"{tmp_path / 'run'}: 40 requests, ")
    assert set(run.requests.column("arrival_ns").to_pylist()) == {0}
    assert set(run.requests.column("output_tokens").to_pylist()) == {7}
    inputs = run.requests.column("input_tokens").to_numpy()
    assert 138 <= inputs.min() < inputs.max() <= 148


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--input-len", "normal:5"), "'normal:5' is no distribution"),
        (("--conversation-rate", "0"), "rate is 0.0: above 0 expected"),
        (("--block-tokens", "100"), "--block-tokens 100: a Mooncake trace needs a divisor of 512"),
        (("--max-model-len", "9"), "not one first turn fits"),
    ],
)
def test_bad_options_leave_nothing_behind(
    words: tuple[str, ...], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", "generate", "multi-turn", *words, "-o", str(tmp_path / "trace.jsonl")]) == 2
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    assert main(["trace", "generate", "random", "-o", str(tmp_path / "there")]) == 2
