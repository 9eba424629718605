"""Chrome trace export: held to the rules of the Trace Event Format document, and to what the run says."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from kvtwin.reports.cli import main
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import read_run
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.writers import perfetto
from kvtwin.traces.writers.perfetto import write_perfetto

HOSTILE = '</script>"\\\n\x00\ud83d\ude00'.encode("utf-16", "surrogatepass").decode("utf-16")


def make_run(**steps: Any) -> Run:
    """Request 0 is preempted at step 1 and runs again from step 3 on; request 1 never finishes."""
    requests: dict[str, Any] = {
        "request_id": ["r0", HOSTILE],
        "arrival_ns": [1000, 1000],
        "input_tokens": [8, 8],
        "output_tokens": [4, 4],
        "queued_ns": [1100, None],
        "scheduled_ns": [2000, 2000],
        "first_token_ns": [3000, None],
        "finish_ns": [9001, None],
        "prefetch_ns": [300, None],
        "swapped_ns": [10, None],
    }
    given: dict[str, Any] = {
        "step": [0, 1, 2, 3],
        "sched_ns": [2000, 4000, 5000, 7000],
        "start_ns": [2100, 4100, 5100, 7100],
        "end_ns": [3000, 5000, 6000, 9001],
        "request": [[0, 1], [1], [1], [0]],
        "cache_len": [[0, 0], [8], [9], [0]],
        "input_len": [[8, 8], [1], [1], [9]],
        "preempted": [[], [0], [], []],
        "finished": [[], [], [], [0]],
        "num_waiting": [0, 1, 1, 0],
        "num_running": [2, 1, 1, 1],
        "num_free_blocks": [5, 7, 7, 6],
        **steps,
    }
    tables = {"requests": from_columns("requests", requests, "x"), "steps": from_columns("steps", given, "x")}
    return Run(RunInfo("recorded"), tables)


def exported(run: Run, path: Path) -> list[dict[str, Any]]:
    counts = write_perfetto(run, path)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"}
    events: list[dict[str, Any]] = document["traceEvents"]
    assert Counter(event["ph"] for event in events) == counts
    check_format(events)
    return events


def check_format(events: list[dict[str, Any]]) -> None:
    """The rules of the format: fields per kind, slices of a thread disjoint or nested, async slices nested by id."""
    ends: dict[tuple[int, int], float] = defaultdict(float)
    stacks: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    last: dict[tuple[str, int, str], float] = defaultdict(float)
    check_names(events)
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["name"], str)
        kind = event["ph"]
        if kind == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            continue
        assert event["ts"] >= 0
        if kind == "X":
            track = (event["pid"], event["tid"])
            assert event["dur"] >= 0
            assert event["ts"] >= ends[track] - 1e-6
            ends[track] = event["ts"] + event["dur"]
        elif kind == "C":
            assert event["args"]
            assert all(isinstance(value, int) for value in event["args"].values())
        else:
            key = (event["cat"], event["pid"], event["id2"]["local"])
            assert event["ts"] >= last[key]
            last[key] = event["ts"]
            if kind == "b":
                stacks[key].append(event["name"])
            else:
                assert kind == "e"
                assert stacks[key].pop() == event["name"]


def check_names(events: list[dict[str, Any]]) -> None:
    """Every process and every thread that has events is named once; only fields of the format occur."""
    allowed = {
        "M": {"tid"},
        "X": {"tid", "cat", "ts", "dur"},
        "C": {"ts"},
        "b": {"cat", "id2", "ts"},
        "e": {"cat", "id2", "ts"},
    }
    for event in events:
        assert set(event) <= {"ph", "pid", "name", "args"} | allowed[event["ph"]]
    named = Counter((event["name"], event["pid"], event.get("tid")) for event in events if event["ph"] == "M")
    processes = {("process_name", event["pid"], None) for event in events}
    threads = {("thread_name", event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    assert named == Counter(processes | threads)


def phases(events: list[dict[str, Any]], row: int) -> list[tuple[str, str, float]]:
    return [
        (event["ph"], event["name"], event["ts"]) for event in events if event.get("id2") == {"local": f"0x{row:x}"}
    ]


def test_a_request_with_every_phase(tmp_path: Path) -> None:
    events = exported(make_run(), tmp_path / "t.json")
    assert phases(events, 0) == [
        ("b", "r0", 0.0),
        ("b", "frontend", 0.0), ("e", "frontend", 0.1),
        ("b", "waiting", 0.1), ("e", "waiting", 0.7),
        ("b", "prefetch", 0.7), ("e", "prefetch", 1.0),
        ("b", "running", 1.0), ("e", "running", 3.0),
        ("b", "swapped", 3.0), ("e", "swapped", 6.0),
        ("b", "running", 6.0), ("e", "running", 8.001),
        ("e", "r0", 8.001),
    ]  # fmt: skip
    assert phases(events, 1) == [
        ("b", HOSTILE, 0.0),
        ("b", "waiting", 0.0),
        ("e", "waiting", 1.0),
        ("b", "running", 1.0),
    ]


def test_steps_and_counters(tmp_path: Path) -> None:
    events = exported(make_run(), tmp_path / "t.json")
    steps = [event for event in events if event["ph"] == "X"]
    assert [(step["name"], step["tid"], step["ts"], step["dur"]) for step in steps] == [
        ("step 0", 0, 1.1, 0.9), ("step 1", 0, 3.1, 0.9), ("step 2", 0, 4.1, 0.9), ("step 3", 0, 6.1, 1.901),
    ]  # fmt: skip
    assert steps[1]["args"] == {
        "num_reqs": 1, "num_preempted": 1, "num_finished": 0, "num_tokens": 1, "context_tokens": 8,
    }  # fmt: skip
    counters = [(event["name"], event["ts"], event["args"]) for event in events if event["ph"] == "C"]
    assert [args for name, _, args in counters if name == "requests"] == [
        {"running": 2, "waiting": 0}, {"running": 1, "waiting": 1}, {"running": 1, "waiting": 0},
    ]  # fmt: skip
    assert [(ts, args["free"]) for name, ts, args in counters if name != "requests"] == [(1.0, 5), (3.0, 7), (6.0, 6)]


def test_overlapping_steps_lie_in_lanes(tmp_path: Path) -> None:
    run = make_run(start_ns=[2100, 2500, 2900, 3100], end_ns=[3000, 3200, 3300, 9001])
    events = exported(run, tmp_path / "t.json")
    assert [event["tid"] for event in events if event["ph"] == "X"] == [0, 1, 2, 0]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["instance 0", "steps", "steps, overlapping 1", "steps, overlapping 2"]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_batches_on_disk_give_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    whole = exported(make_run(), tmp_path / "whole.json")
    monkeypatch.setattr(perfetto, "_BATCH_ROWS", rows)
    assert exported(Run.open(make_run().write(tmp_path / "run")), tmp_path / "parts.json") == whole
    assert exported(make_run(), tmp_path / "memory.json") == whole


def test_a_run_without_steps_and_an_empty_one(tmp_path: Path) -> None:
    run = make_run()
    events = exported(Run(run.info, {"requests": run.requests}), tmp_path / "t.json")
    assert [name for kind, name, _ in phases(events, 0) if kind == "b"] == [
        "r0",
        "frontend",
        "waiting",
        "prefetch",
        "running",
    ]
    empty = Run(run.info, {"requests": run.requests.slice(0, 0)})
    assert exported(empty, tmp_path / "empty.json") == []


def test_a_real_recording(shared: Path, tmp_path: Path) -> None:
    run = read_run(shared / "data" / "vllm_cpu" / "saturated_1")
    events = exported(run, tmp_path / "t.json")
    begins = Counter(event["name"] for event in events if event["ph"] == "b")
    num_preemptions = sum(run.requests["num_preemptions"].to_pylist())
    assert num_preemptions > 0
    assert begins["running"] == run.requests.num_rows + num_preemptions
    assert sum(event["ph"] == "X" for event in events) == run.steps.num_rows


def test_compressed_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    write_perfetto(make_run(), tmp_path / "t.json")
    paths = [tmp_path / "one.json.gz", tmp_path / "two.json.gz"]
    for path in paths:
        write_perfetto(make_run(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert gzip.decompress(paths[0].read_bytes()) == (tmp_path / "t.json").read_bytes()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run().write(tmp_path / "run")
    assert main(["trace", "export", str(run), "--perfetto", str(tmp_path / "t.json.gz"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["events"] == {"X": 4, "C": 6, "b": 10, "e": 8, "M": 2}
    assert main(["trace", "export", str(tmp_path / "none"), "--perfetto", str(tmp_path / "x.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_perfetto(make_run(), tmp_path / "file" / "t.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_perfetto(make_run(), tmp_path / "folder")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder"]


def test_cut_off_steps_get_one_line(shared: Path, tmp_path: Path) -> None:
    run = Run.open(read_run(shared / "data" / "vllm_cpu" / "poisson_1").write(tmp_path / "run"))
    steps = tmp_path / "run" / "steps.parquet"
    steps.write_bytes(steps.read_bytes()[:3000])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        write_perfetto(run, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
