"""Bad input: one line that names the file and the place, never another exception, nothing half written."""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.traces import InputError, KvtwinError
from kvtwin.traces.cli import add_commands
from kvtwin.traces.readers import READERS, read_run
from kvtwin.traces.schema import TABLES

Samples = Mapping[str, Callable[[Path], Path]]

# The line of each sample to spoil, as (file below the path or "", fields that must be there).
JSONL = {
    "kvtwin_jsonl": [("", ["request_id", "arrival_s", "input_length", "output_length"])],
    "mooncake": [("", ["timestamp", "input_length", "output_length", "hash_ids"])],
    "tair": [("", ["trigger_time_us", "keys"])],
    "llmservingsim_workload": [("", ["input_toks", "output_toks", "arrival_time_ns"])],
    "llmservingsim_run": [
        (
            "requests.jsonl",
            ["request_id", "input_toks", "output_toks", "arrival_time", "queued_ts", "first_token_ts", "last_token_ts"],
        )
    ],
    "sglang_simulator": [("", ["input_length", "output_length", "created_time", "gen_token_latencies"])],
    "vllm_recording": [
        ("trace.jsonl", ["request_id", "arrival_s", "input_length", "output_length"]),
        ("requests.jsonl", ["request_id", "due_s", "arrival_ns", "input_length", "output_length", "ttft_s", "e2e_s"]),
        ("steps.jsonl", ["step", "t_start_ns", "t_end_ns", "scheduled", "preempted", "finished", "free_blocks"]),
    ],
}
FIELDS = [(name, file, field) for name, files in JSONL.items() for file, fields in files for field in fields]
MISSING = "(missing)"
BAD = [
    MISSING,
    "null",
    "-1",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "9" * 30,
    "9" * 5000,
    "true",
    '"x"',
    "{}",
    '["?"]',
    "-0.5",
]


def _run_cli(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    result: int = args.run(args)
    return result


def _spoil(line: str, field: str, value: str) -> str:
    values = json.loads(line)
    if value == MISSING:
        del values[field]
        return json.dumps(values)
    values[field] = "@"
    return json.dumps(values).replace('"@"', value)


def _place(path: Path, file: str) -> Path:
    return path / file if file else path


def _assert_one_line(error: KvtwinError) -> None:
    assert "\n" not in str(error) and 0 < len(str(error)) < 1000


@pytest.mark.parametrize("value", BAD, ids=lambda value: value[:12])
@pytest.mark.parametrize(("name", "file", "field"), FIELDS)
def test_a_bad_field_is_named_with_its_row(
    name: str, file: str, field: str, value: str, samples: Samples, tmp_path: Path
) -> None:
    if value == '"x"' and field == "request_id":
        value = '""'  # any other string is a good name
    path = samples[name](tmp_path)
    place = _place(path, file)
    lines = place.read_text().splitlines()
    lines[1] = _spoil(lines[1], field, value)
    place.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        read_run(path, name)
    _assert_one_line(caught.value)
    assert caught.value.path == place
    assert caught.value.row == 2
    if "not JSON" not in str(caught.value):
        assert caught.value.column == field


@pytest.mark.parametrize("name", [name for name in JSONL if name not in ("llmservingsim_run", "sglang_simulator")])
def test_unsorted_arrivals(name: str, samples: Samples, tmp_path: Path) -> None:
    path = samples[name](tmp_path)
    place = _place(path, JSONL[name][0][0])
    lines = place.read_text().splitlines()
    field = next(f for f in ("arrival_s", "timestamp", "arrival_time_ns", "trigger_time_us") if f in lines[0])
    lines[0] = _spoil(lines[0], field, "9000")
    place.write_text("\n".join(lines))
    if name == "vllm_recording":  # a recording's order is that of its requests file, which a reader may sort
        assert read_run(path).requests.num_rows == 3
        return
    with pytest.raises(InputError, match=f"row 2, {field}: .* before the row above"):
        read_run(path, name)


@pytest.mark.parametrize("name", ["kvtwin_jsonl", "llmservingsim_run", "vllm_recording"])
def test_duplicate_ids(name: str, samples: Samples, tmp_path: Path) -> None:
    path = samples[name](tmp_path)
    place = _place(path, JSONL[name][0][0])
    lines = place.read_text().splitlines()
    place.write_text("\n".join([*lines, lines[-1]]))
    with pytest.raises(InputError, match=r"request_id: .* occurs twice"):
        read_run(path, name)


@pytest.mark.parametrize("stamp", ["0e999999999999999999999", "1e-99999999999999999999"])
def test_exponents_beyond_decimals(stamp: str, samples: Samples, tmp_path: Path) -> None:
    path = samples["llmservingsim_run"](tmp_path)
    lines = (path / "requests.jsonl").read_text().splitlines()
    lines[0] = _spoil(lines[0], "queued_ts", stamp)
    (path / "requests.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"row 1, queued_ts: .* is not a number of seconds"):
        read_run(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop(), "'c' of the trace is missing"),
        (lambda r: r[0].update(request_id="z"), "row 1, request_id: 'z' is not in the trace"),
        (lambda r: r[1].update(input_length=4), r"row 2, input_length: 4 differs from the trace \(3\)"),
        (lambda r: r[2].update(e2e_s=0.05), "row 3, e2e_s: is shorter than ttft_s"),
    ],
)
def test_recording_whose_files_disagree(
    change: Callable[[list[dict[str, Any]]], None], words: str, samples: Samples, tmp_path: Path
) -> None:
    path = samples["vllm_recording"](tmp_path)
    rows = [json.loads(line) for line in (path / "requests.jsonl").read_text().splitlines()]
    change(rows)
    (path / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=words):
        read_run(path)


@pytest.mark.parametrize(
    ("scheduled", "words"),
    [
        ([["z", 0, 1]], "'z' is not a request of this recording"),
        ([["a", 0]], "an entry is not"),
        ([["a", -1, 1]], "-1 tokens"),
        ([["a", 0, 0]], "0 tokens"),
        ([["a", 0, 1 << 40]], "1099511627776 tokens"),
        ([[{}, 0, 1]], "'{}' is not a request"),
    ],
)
def test_bad_batch(scheduled: list[Any], words: str, samples: Samples, tmp_path: Path) -> None:
    path = samples["vllm_recording"](tmp_path)
    lines = (path / "steps.jsonl").read_text().splitlines()
    lines[3] = _spoil(lines[3], "scheduled", json.dumps(scheduled))
    (path / "steps.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=f"steps.jsonl, row 4, scheduled: {words}"):
        read_run(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a format"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no rows"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1\n", "row 2: 2 fields, but the header has 3"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,0\n", "row 2, GeneratedTokens: 0 tokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,1\n", "row 2, ContextTokens: 'x' is not an integer"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-16 18:15:46,1,1\n", "row 2, TIMESTAMP: '2023-13-16 18:15:46'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n9023-11-16 18:15:46,1,1\n", "row 2, TIMESTAMP: .* outside 1970"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,1,1\n2023-11-16 18:15:45,1,1\n",
            "row 3, TIMESTAMP: 2023-11-16 18:15:45 is before the row above",
        ),
    ],
)  # fmt: skip
def test_bad_azure(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_run(path)


def _spoil_bytes(data: bytes, cut: float, flips: list[tuple[float, int]]) -> bytes:
    """Cut a file short and change some of its bytes; positions are fractions of its length."""
    spoilt = bytearray(data[: int(len(data) * cut)])
    for where, value in flips:
        if spoilt:
            spoilt[int(where * (len(spoilt) - 1))] = value
    return bytes(spoilt)


SPOILS = st.tuples(
    st.floats(0, 1), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3), st.integers(0, 20)
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60)
@given(spoil=SPOILS)
def test_spoilt_bytes_give_a_good_run_or_one_line(
    name: str, packed: bool, samples: Samples, spoil: tuple[float, list[tuple[float, int]], int]
) -> None:
    cut, flips, which = spoil
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = samples[name](folder)
        files = sorted(file for file in path.rglob("*")) if path.is_dir() else [path]
        victim = files[which % len(files)]
        data = victim.read_bytes()
        if packed and victim.suffix != ".parquet":
            data = gzip.compress(data, mtime=0)
        victim.write_bytes(_spoil_bytes(data, cut, flips))
        before = sorted(folder.rglob("*"))
        try:
            _run_cli("trace", "info", str(path), "--format", name, "--json")
            _run_cli("trace", "import", str(path), "--format", name, "-o", str(folder / "out"))
        except KvtwinError as error:
            _assert_one_line(error)
            assert sorted(folder.rglob("*")) == before


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("name", JSONL)
@settings(max_examples=80)
@given(data=st.data())
def test_any_json_value_gives_a_good_run_or_one_line(name: str, samples: Samples, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = samples[name](Path(scratch))
        file, _ = data.draw(st.sampled_from(JSONL[name]))
        place = _place(path, file)
        lines = place.read_text().splitlines()
        row = data.draw(st.integers(0, len(lines) - 1))
        field = data.draw(st.sampled_from(sorted(json.loads(lines[row]))))
        lines[row] = _spoil(lines[row], field, json.dumps(data.draw(VALUES)))
        place.write_text("\n".join(lines))
        try:
            run = read_run(path, name)
            assert all(getattr(run, key).num_rows for key in TABLES if run.has(key))
        except InputError as error:
            _assert_one_line(error)
            assert str(place.name) in str(error) or str(path) in str(error)


def test_a_run_folder_of_lies(samples: Samples, tmp_path: Path) -> None:
    path = samples["kvtwin"](tmp_path)
    head = json.loads((path / "run.json").read_text())
    for key, value in (
        ("schema_version", 99), ("kind", "dream"), ("hash_block_tokens", 0), ("engine_config", 3), ("engine", 5), ("x", 1),
    ):  # fmt: skip
        (path / "run.json").write_text(json.dumps({**head, key: value}))
        with pytest.raises(InputError, match=f"{path / 'run.json'}.*"):
            read_run(path)


def test_import_refuses_an_existing_output(samples: Samples, tmp_path: Path) -> None:
    path = samples["mooncake"](tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        _run_cli("trace", "import", str(path), "-o", str(tmp_path / "out"))


def test_gzip_bombs_stop_at_the_longest_line(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"a": "' + b"x" * (70 << 20))
    with pytest.raises(InputError, match="row 1: line is longer than"):
        read_run(path)
