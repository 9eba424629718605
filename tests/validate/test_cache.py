"""Cache event traces: read from each format, compared, replayed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.reports.cli import main
from kvtwin.sim.cache_replay import belady_hits, prompts_of
from kvtwin.traces.errors import InputError, KvtwinError
from kvtwin.traces.readers import read_run
from kvtwin.traces.readers.cache_events import read_cache_events
from kvtwin.traces.table import from_columns
from kvtwin.validate.cache import cache_figures, compare_cache, replay_events
from kvtwin.validate.gates import parse_gates

TAIR = "data/traces/tair/event_publisher.log.gz"


def write(path: Path, lines: list[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tair(kind: str, time_us: int, **more: Any) -> dict[str, Any]:
    """One event of a Tair log."""
    return {"component": "cache_manager", "type": kind, "trigger_time_us": time_us, **more}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two prompts that share a block, the second looked up when the first has been stored."""
    return write(
        tmp_path / "tair.jsonl",
        [
            tair("GetCacheLocation", 10, keys=[1, -2, 3]),
            tair("StartWriteCache", 11, keys=[1, -2, 3], write_session_id="a"),
            tair("FinishWriteCache", 12, write_session_id="a", success_block=2),
            tair("GetCacheLocation", 13, keys=[1, -2, 3]),
        ],
    )


def test_a_tair_hit_is_a_leading_key_that_a_finished_write_stored(log: Path) -> None:
    events = read_cache_events(log)
    assert cache_figures(events) == {
        "hit_rate": (2 / 6, 6), "hit_blocks_l3": (2.0, 2), "store_blocks_l3": (2.0, 2)
    }  # fmt: skip
    assert events.column("time_ns").to_pylist()[-1] == 3000
    assert set(events.column("block_hash").to_pylist()) == {1, 2**64 - 2, 3}


def test_vllm_events_are_stores_and_evictions_per_medium(tmp_path: Path) -> None:
    stored = {"type": "BlockStored", "block_hashes": [7, "abc"], "block_size": 16, "medium": "GPU"}
    removed = {"type": "BlockRemoved", "block_hashes": [7], "medium": "GPU"}
    path = write(
        tmp_path / "kv.jsonl",
        [{"ts": 1.5, "events": [stored]}, {"ts": 2.0, "events": [removed, {"type": "AllBlocksCleared"}]}],
    )
    events = read_cache_events(path)
    assert events.column("kind").to_pylist() == ["store", "store", "evict", "evict"]
    assert events.column("time_ns").to_pylist() == [0, 0, 500_000_000, 500_000_000]
    assert events.column("tokens").to_pylist() == [16, 16, 16, 16]


@pytest.mark.parametrize("case", ["hi_l2_write_through_p16", "hi_l3slow_wait_complete", "v059/hi_l3_ov_wait"])
def test_a_hicache_logs_hits_add_up_on_the_levels_they_came_from(case: str, shared: Path) -> None:
    log = shared / "oracle" / "sglang" / f"{case}.jsonl.gz"
    with gzip.open(log, "rt") as lines:
        summary = json.loads(list(lines)[-1])
    assert summary["retractions"] == 0
    figures = cache_figures(read_cache_events(log))
    hits = {level: figures.get(f"hit_tokens_l{level}", (0, 0))[0] for level in (1, 2, 3)}
    assert sum(hits.values()) == summary["cached_tokens"]
    with gzip.open(log, "rt") as lines:
        prompts = sum(line[4] for line in map(json.loads, lines) if isinstance(line, list) and line[0] == "R")
    assert figures["hit_rate"][0] == summary["cached_tokens"] / prompts
    assert hits[1] > 0
    assert (hits[2] + hits[3] <= figures["load_back_tokens_l1"][0]) and hits[2] > 0
    assert (hits[3] > 0) == ("l3" in case)


def test_what_a_recorded_run_hit_is_read_from_its_requests(shared: Path) -> None:
    run = read_run(shared / "data" / "vllm_cpu" / "shared_prefix_1")
    hits, prompts = (pc.sum(run.requests.column(name)).as_py() for name in ("cached_tokens", "input_tokens"))
    figures = cache_figures(read_cache_events(shared / "data" / "vllm_cpu" / "shared_prefix_1"))
    assert figures == {
        "hit_rate": (hits / prompts, 220),
        "hit_tokens_l1": (hits, sum(map(bool, run.requests.column("cached_tokens").to_pylist()))),
    }


def test_a_trace_of_block_hashes_is_what_an_endless_cache_finds(shared: Path, tmp_path: Path) -> None:
    """And a cache that holds all of it finds the same, in the same unit; one of 2,000 blocks less."""
    path = shared / "data" / "traces" / "mooncake" / "synthetic_trace.jsonl.gz"
    events = read_cache_events(path)
    prompts = prompts_of(read_run(path), 1)
    assert cache_figures(events)["hit_rate"][0] == belady_hits(prompts, prompts.distinct_tokens) / prompts.input_tokens
    checks = {check.metric: check for check in compare_cache(events, replay_events(events, 1_000_000), name="x")}
    assert {check.error for check in checks.values()} == {0.0}
    assert checks["hit_tokens_l1"].unit == "tokens"
    small = {check.metric: check for check in compare_cache(events, replay_events(events, 2_000), name="x")}
    assert small["hit_tokens_l1"].error < -0.1 and small["evict_for_store_l1"].simulated > 0
    lengths = write(
        tmp_path / "lengths.jsonl", [{"request_id": "a", "arrival_s": 0, "input_length": 5, "output_length": 2}]
    )
    with pytest.raises(InputError, match="neither cache events, nor cached_tokens, nor block hashes"):
        read_cache_events(lengths)


def test_evictions_are_told_apart_by_what_made_them() -> None:
    """A prompt that loads from the host, a copy to it, a prefetch into it, and a decode."""
    rows = [
        (0, 1, "lookup", 64), (0, 1, "evict", 16), (1, 1, "lookup", 64), (1, 1, "load_back", 32), (1, 1, "evict", 48),
        (2, 2, "store", 16), (2, 2, "evict", 1), (3, 3, "prefetch_start", 16), (3, 2, "evict", 2), (4, 1, "evict", 3),
    ]  # fmt: skip
    columns = dict(zip(("time_ns", "level", "kind", "tokens"), map(list, zip(*rows, strict=True)), strict=True))
    figures = cache_figures(from_columns("cache", columns, "test"))
    causes = {
        metric: value for metric, (value, _) in figures.items() if metric.startswith(("evict_for", "evict_alone"))
    }
    assert causes == {
        "evict_for_prompt_l1": 16, "evict_for_load_back_l1": 48, "evict_for_store_l2": 1, "evict_for_prefetch_l2": 2,
        "evict_alone_l1": 3,
    }  # fmt: skip


def evictions(blocks: list[int | None]) -> pa.Table:
    """Blocks stored, then evicted in this order."""
    stored = sorted(block for block in blocks if block is not None)
    columns = {
        "time_ns": range(len(stored) + len(blocks)),
        "level": [1] * (len(stored) + len(blocks)),
        "request": [None] * (len(stored) + len(blocks)),
        "kind": ["store"] * len(stored) + ["evict"] * len(blocks),
        "block_hash": [*stored, *blocks],
        "tokens": [16] * (len(stored) + len(blocks)),
    }
    return from_columns("cache", {name: list(values) for name, values in columns.items()}, "made here")


def test_evictions_in_reverse_order_are_told_though_every_sum_is_the_same() -> None:
    gates = parse_gates({"cache_evictions": 0.05})
    checks = compare_cache(evictions([1, 2, 3, 4]), evictions([4, 3, 2, 1]), name="x", gates=gates)
    assert {check.metric: check.error for check in checks if check.verdict == "fail"} == {"eviction_order_l1": -2.0}
    same = compare_cache(evictions([1, 2, 3, 4]), evictions([1, 2, 3, 4]), name="x", gates=gates)
    assert {check.verdict for check in same} <= {"pass", "no gate"}
    others = {
        check.metric: check for check in compare_cache(evictions([1, 2, 3, 4]), evictions([1, 5, 6, 4]), name="x")
    }
    assert others["evict_tokens_l1"].error == 0 and others["same_evictions_l1"].error == -0.5
    unnamed = compare_cache(evictions([1, 2]), evictions([None, None]), name="x")
    assert any("is not compared" in check.note for check in unnamed)
    assert not any("eviction_order" in check.metric for check in unnamed)


def test_a_trace_equals_itself(shared: Path) -> None:
    events = read_cache_events(shared / TAIR)
    checks = compare_cache(events, events, name="tair")
    assert {check.error for check in checks} == {0.0}
    assert [check.metric for check in checks] == ["hit_rate", "hit_blocks_l3", "store_blocks_l3"]


def test_a_large_cache_replays_the_real_logs_hits_and_a_small_one_fewer(shared: Path) -> None:
    events = read_cache_events(shared / TAIR)
    large = compare_cache(events, replay_events(events, 10_000), name="tair")
    assert {check.metric: check.error for check in large} == {
        "hit_rate": 0.0, "hit_blocks_l3": 0.0, "store_blocks_l3": 0.0
    }  # fmt: skip
    small = {check.metric: check for check in compare_cache(events, replay_events(events, 100), name="tair")}
    assert small["hit_rate"].error < -0.1
    assert small["evict_for_store_l3"].simulated > 0


def test_tokens_and_blocks_are_not_compared(log: Path, shared: Path) -> None:
    tokens = read_cache_events(shared / "oracle" / "sglang" / "hi_l2_lfu.jsonl.gz")
    with pytest.raises(InputError, match="one trace counts tokens"):
        compare_cache(tokens, read_cache_events(log), name="x")


def test_the_command_prints_checks_as_json(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "cache", str(log), "--capacity", "8", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {check["metric"] for check in checks} == {"hit_rate", "hit_blocks_l3", "store_blocks_l3"}
    assert main(["validate", "cache", str(log)]) == 2
    assert "either PREDICTED or --capacity" in capsys.readouterr().err


def test_gates_of_a_cache_are_asked(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cache of one block finds less than the log did."""
    gates = tmp_path / "gates.toml"
    for text, code in (("cache_hits = 0.0", 1), ("cache_hits = 1.0", 0), ("hit_rates = 0.1", 2)):
        gates.write_text(f"[gates]\n{text}\n")
        assert main(["validate", "cache", str(log), "--capacity", "1", "--gates", str(gates)]) == code
    assert "did you mean 'hit_rate'" in capsys.readouterr().err


def test_the_cache_command_keeps_below_beladys_bound(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(shared / "data" / "traces" / "mooncake" / "synthetic_trace.jsonl.gz")
    assert main(["cache", trace, "--capacity", "2000000", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [row["policy"] for row in results] == ["lru", "lfu", "fifo", "mru", "filo", "priority", "slru"]
    assert all(0 < row["hit_rate"] < row["belady_hit_rate"] for row in results)
    assert main(["cache", trace, "--policy", "best"]) == 2
    assert "one of lru" in capsys.readouterr().err


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(
                    st.sampled_from(["component", "type", "events", "ts", "keys", "trigger_time_us", "block_hashes"]),
                    inner,
                )
            ),
            max_leaves=12,
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([{"component": "cache_manager"}, {"events": []}, {"type": "meta", "sglang": "0.5.9"}]),
)
def test_whatever_stands_in_a_file_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any], head: dict[str, Any]
) -> None:
    path = write(tmp_path_factory.mktemp("events") / "x.jsonl", [head, *lines])
    with pytest.raises(KvtwinError) as caught:
        read_cache_events(path)
    assert "\n" not in str(caught.value)


# What vLLM 0.32.0 and 0.19.0 themselves encode: two blocks of 16 stored on the GPU at 100.5 s, one of them moved to the
# CPU at 100.75 s, everything cleared at 101 s.
PUBLISHED = {
    "maps": "93cb40592000000000009188a474797065ab426c6f636b53746f726564ac626c6f636b5f686173686573920bc42001010101010101010101"
    "01010101010101010101010101010101010101010101b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f696473dc00200001020304"
    "05060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1faa626c6f636b5f73697a6510a76c6f72615f6964c0a66d656469756da3475055"
    "a96c6f72615f6e616d65c0c093cb40593000000000009283a474797065ac426c6f636b52656d6f766564ac626c6f636b5f686173686573910ba66d"
    "656469756da347505588a474797065ab426c6f636b53746f726564ac626c6f636b5f686173686573910bb1706172656e745f626c6f636b5f686173"
    "68c0a9746f6b656e5f696473dc0010000102030405060708090a0b0c0d0e0faa626c6f636b5f73697a6510a76c6f72615f6964c0a66d656469756d"
    "a3435055a96c6f72615f6e616d65c00093cb40594000000000009181a474797065b0416c6c426c6f636b73436c6561726564c0",
    "arrays": "93cb40592000000000009199ab426c6f636b53746f726564920bc42001010101010101010101010101010101010101010101010101010101"
    "01010101c0dc0020000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f10c0a3475055c0c0c093cb4059300000000000"
    "9293ac426c6f636b52656d6f766564910ba347505599ab426c6f636b53746f726564910bc0dc0010000102030405060708090a0b0c0d0e0f10c0a3"
    "435055c0c00093cb40594000000000009191b0416c6c426c6f636b73436c6561726564c0",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", PUBLISHED)
def test_events_as_the_engines_publish_them(form: str, packed: bool, tmp_path: Path) -> None:
    pytest.importorskip("msgpack")
    path, payload = tmp_path / "events.bin", bytes.fromhex(PUBLISHED[form])
    path.write_bytes(gzip.compress(payload) if packed else payload)
    table = read_cache_events(path)
    rows = list(zip(*(table.column(name).to_pylist() for name in ("time_ns", "level", "kind", "tokens")), strict=True))
    assert rows == [
        (0, 1, "store", 16), (0, 1, "store", 16), (250_000_000, 1, "evict", 16), (250_000_000, 2, "store", 16),
        (500_000_000, 1, "evict", 16),
    ]  # fmt: skip
    blocks = table.column("block_hash").to_pylist()
    assert blocks[0] == blocks[2] == blocks[3] == 11 and blocks[1] == blocks[4] != 11


@pytest.mark.parametrize("cut", [1, 5, 40, 130])
def test_cut_payloads_get_one_line(cut: int, tmp_path: Path) -> None:
    pytest.importorskip("msgpack")
    path = tmp_path / "events.bin"
    path.write_bytes(bytes.fromhex(PUBLISHED["arrays"])[:-cut])
    with pytest.raises(InputError, match="payload"):
        read_cache_events(path)


def test_a_payload_whose_key_is_a_map_gets_one_line(tmp_path: Path) -> None:
    pytest.importorskip("msgpack")
    path = tmp_path / "events.bin"
    path.write_bytes(b"\x92\x01\x91\x81\x81\x01\x02\x03")
    with pytest.raises(InputError, match="row 1: not a msgpack payload"):
        read_cache_events(path)


@settings(max_examples=200)
@given(st.binary(min_size=1, max_size=60))
def test_any_payload_is_a_trace_or_one_line(tmp_path_factory: pytest.TempPathFactory, payload: bytes) -> None:
    pytest.importorskip("msgpack")
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(b"\x93" + payload)
    try:
        read_cache_events(path)
    except InputError as error:
        assert "\n" not in str(error)
