"""`kvtwin trace export` to Mooncake and CSV: what is written reads back as what was there."""

from __future__ import annotations

import csv as python_csv
import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import csv

from kvtwin.reports.cli import main
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import read_run
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.traces.writers.mooncake import write_mooncake
from kvtwin.traces.writers.requests_csv import write_csv


def make_run(block_tokens: int | None, **columns: Any) -> Run:
    given: dict[str, Any] = {
        "request_id": ["a", 'b, "c"', "d"],
        "arrival_ns": [1_999_999, 2_000_000, 7_000_001],
        "input_tokens": [1024, 1300, 600],
        "output_tokens": [1, 2, 3],
    }
    return Run(
        RunInfo("workload", hash_block_tokens=block_tokens),
        {"requests": from_columns("requests", given | columns, "x")},
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_hashes_of_512_tokens_are_kept(tmp_path: Path) -> None:
    run = make_run(512, block_hashes=[[9, 8], [9, 8, 7], [9, 5]])
    assert write_mooncake(run, tmp_path / "t.jsonl") == 3
    assert lines(tmp_path / "t.jsonl") == [
        {"timestamp": 1, "input_length": 1024, "output_length": 1, "hash_ids": [0, 1]},
        {"timestamp": 2, "input_length": 1300, "output_length": 2, "hash_ids": [0, 1, 2]},
        {"timestamp": 7, "input_length": 600, "output_length": 3, "hash_ids": [0, 3]},
    ]
    assert read_run(tmp_path / "t.jsonl").requests.column("block_hashes").to_pylist() == [[0, 1], [0, 1, 2], [0, 3]]


def test_shorter_hashes_keep_the_sharing_of_whole_blocks(tmp_path: Path) -> None:
    # Blocks of 256 tokens: the third differs in its fourth block, so only its first 512 tokens are shared.
    chains = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 3]]
    write_mooncake(make_run(256, block_hashes=chains), tmp_path / "t.jsonl")
    found = [line["hash_ids"] for line in lines(tmp_path / "t.jsonl")]
    assert [len(ids) for ids in found] == [2, 3, 2]
    assert found[0] == found[1][:2]
    assert found[2][0] == found[0][0]
    assert found[2][1] not in found[1]  # a partial block, which has less in it than the others' whole ones


def test_request_ids_of_any_kind_are_one_cell_of_csv(tmp_path: Path) -> None:
    names = ["</script><script>'\u2028,\n\"", "=HYPERLINK(1)", "\r;\t|"]
    write_csv(make_run(None, request_id=names), tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as stream:
        head, *rows = python_csv.reader(stream)
    assert [dict(zip(head, row, strict=True))["request_id"] for row in rows] == names


@pytest.mark.parametrize("columns", [{}, {"block_hashes": [None, [4], None]}])
def test_unknown_prompts_are_shared_with_nobody(columns: dict[str, Any], tmp_path: Path) -> None:
    write_mooncake(make_run(512 if columns else None, **columns), tmp_path / "t.jsonl")
    ids = [hash_id for line in lines(tmp_path / "t.jsonl") for hash_id in line["hash_ids"]]
    assert len(ids) == len(set(ids)) == 7


def test_hashes_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hash_block_tokens is 100: a Mooncake trace needs a divisor of 512"):
        write_mooncake(make_run(100, block_hashes=[[1], [2], [3]]), tmp_path / "t.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_csv_holds_the_table(tmp_path: Path) -> None:
    run = make_run(512, block_hashes=[[9, 8], None, []], session_id=["s", None, "s"])
    assert write_csv(run, tmp_path / "t.csv") == 3
    table = csv.read_csv(tmp_path / "t.csv").to_pydict()
    assert list(table) == ["request_id", "arrival_ns", "input_tokens", "output_tokens", "session_id", "block_hashes"]
    assert table["request_id"] == ["a", 'b, "c"', "d"]
    assert table["arrival_ns"] == [1_999_999, 2_000_000, 7_000_001]
    assert table["block_hashes"] == ["9 8", "", ""]


@pytest.mark.parametrize("kind", ["mooncake", "csv"])
def test_the_command_writes_one_format(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(512, block_hashes=[[9, 8], [9, 8, 7], [9, 5]]).write(tmp_path / "run")
    out = tmp_path / "out.txt"
    assert main(["trace", "export", str(tmp_path / "run"), f"--{kind}", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 requests\n"
    assert len(out.read_text().splitlines()) == (3 if kind == "mooncake" else 4)
    assert main(["trace", "export", str(tmp_path / "run"), "--csv", "a", "--mooncake", "b"]) == 2
    assert main(["trace", "export", str(tmp_path / "run")]) == 2
