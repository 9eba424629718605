"""The scheduler level: equal logs agree in everything; planted faults are found at their step and named right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtwin.reports.cli import main
from kvtwin.sim.engines import engine_config
from kvtwin.sim.latency.linear import LinearLatency
from kvtwin.sim.sglang.config import sglang_config
from kvtwin.sim.sglang.simulate import simulate_sglang
from kvtwin.sim.vllm.config import VllmConfig
from kvtwin.sim.vllm.simulate import simulate
from kvtwin.traces.errors import InputError
from kvtwin.traces.readers import read_run
from kvtwin.traces.run import Run, RunInfo
from kvtwin.traces.table import from_columns
from kvtwin.validate.gates import METRICS, parse_gates
from kvtwin.validate.result import Check, ScheduleFinding
from kvtwin.validate.scheduler.align import NO_STEP, align
from kvtwin.validate.scheduler.compare import compare_schedulers
from kvtwin.validate.scheduler.predicted import replay_settings
from kvtwin.validate.scheduler.replay import replay_schedule
from kvtwin.validate.scheduler.residency import derived_residency

MS = 1_000_000
LATENCY = LinearLatency(6 * MS, 25_000, 20, 10_000)
SGLANG = {"engine": "sglang", "max_total_tokens": 6000, "chunked_prefill_size": 512, "version": "0.5.9"}


def _workload(num_requests: int = 120) -> Run:
    """Bursts of requests, half of which share a prefix, enough to preempt on 120 blocks."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(20, 500, num_requests)
    hashes = [[int(i % 2), *range(1000 * i + 10, 1000 * i + 10 + n // 16)] for i, n in enumerate(prompts.tolist())]
    columns = {
        "request_id": [f"r{i}" for i in range(num_requests)],
        "arrival_ns": np.cumsum(rng.integers(0, 60 * MS, num_requests)),
        "input_tokens": prompts,
        "output_tokens": rng.integers(2, 120, num_requests),
        "block_hashes": [ids[: n // 16] for ids, n in zip(hashes, prompts.tolist(), strict=True)],
    }
    return Run(RunInfo("workload", hash_block_tokens=16), {"requests": from_columns("requests", columns, "test")})


def _config(**changes: Any) -> VllmConfig:
    usual: dict[str, Any] = {"num_gpu_blocks": 120, "max_num_seqs": 12, "max_num_batched_tokens": 256}
    return VllmConfig(**{**usual, "async_scheduling": False, **changes})


@pytest.fixture(scope="module")
def log() -> Run:
    """A log with chunks, preemptions and prefix hits."""
    run = simulate(_workload(), _config(), LATENCY)
    assert sum(map(len, run.steps.column("preempted").to_pylist())) > 5
    assert max(run.requests.column("cached_tokens").to_pylist()) > 0
    return run


def _with_steps(run: Run, rows: list[int] | slice, *, renumber: bool = False) -> Run:
    steps = run.steps.take(np.arange(run.steps.num_rows)[rows])
    if renumber:
        steps = steps.set_column(0, steps.schema.field(0), pa.array(np.arange(steps.num_rows)))
    return Run(run.info, {"requests": run.requests, "steps": steps})


def _without(table: pa.Table, *names: str) -> pa.Table:
    for name in names:
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        table = table.set_column(place, field, pa.nulls(table.num_rows, field.type))
    return table


def _judge(log: Run, config: VllmConfig) -> tuple[ScheduleFinding, dict[str, Check]]:
    finding, checks = compare_schedulers(log, replay_schedule(log, config), name="log")
    return finding, {check.metric: check for check in checks}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_an_equal_scheduler_agrees_in_everything(asynchronous: bool, caching: bool) -> None:
    config = _config(async_scheduling=asynchronous, enable_prefix_caching=caching)
    finding, checks = _judge(simulate(_workload(), config, LATENCY), config)
    assert finding.num_identical == finding.num_steps and finding.first is finding.first_free_blocks is None
    assert max(abs(check.error) for check in checks.values()) < 1e-12
    assert {"identical_steps", "free_blocks", "waiting_time", "running_time", "finish_order"} <= checks.keys()
    assert checks.keys() <= set(METRICS)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_equal_sglang_scheduler_agrees_in_everything(overlap: bool, mixed: bool) -> None:
    settings = {**SGLANG, "disable_overlap_schedule": not overlap, "enable_mixed_chunk": mixed}
    config = sglang_config(settings, "test")
    run = simulate_sglang(_workload(), config, LATENCY)
    finding, checks = compare_schedulers(run, replay_schedule(run, config), name="log")
    assert finding.num_identical == finding.num_steps == run.steps.num_rows
    assert max(abs(check.error) for check in checks) < 1e-12


def _first_row(run: Run, differs: Any) -> int:
    return next(i for i, step in enumerate(run.steps.to_pylist()) if differs(step))


def test_a_token_budget_off_by_16_is_found_where_it_first_binds(log: Run) -> None:
    finding, checks = _judge(log, _config(max_num_batched_tokens=240))
    assert finding.first is not None and finding.first.what == "input_len"
    assert finding.first.step == _first_row(log, lambda step: sum(step["input_len"]) > 240)
    ours, theirs = (
        sum(tokens for _, _, tokens in step["batch"]) for step in (finding.first.measured, finding.first.simulated)
    )
    assert ours > theirs == 240
    assert checks["step_tokens_p99"].error == pytest.approx(240 / 256 - 1)


def test_one_sequence_less_is_found_where_the_batch_is_full() -> None:
    log = simulate(_workload(), _config(max_num_seqs=5), LATENCY)
    finding, _ = _judge(log, _config(max_num_seqs=4))
    assert finding.first is not None and finding.first.what == "members"
    assert finding.first.step == _first_row(log, lambda step: step["num_running"] > 4)
    assert finding.first.measured["num_running"] == 5 and finding.first.simulated["num_running"] == 4


def test_another_block_size_shows_in_free_blocks_at_once(log: Run) -> None:
    finding, checks = _judge(log, _config(block_size=8, num_gpu_blocks=240))
    assert finding.first_free_blocks is not None and finding.first_free_blocks.step == 0
    assert checks["free_blocks"].error < -0.9


def test_the_other_versions_rules_are_found(shared: Path) -> None:
    run = read_run(shared / "oracle" / "vllm019" / "b_tight_cached")
    finding, _ = compare_schedulers(
        run, replay_schedule(run, engine_config(replay_settings(run, {"version": "0.32"}), "test")), name="log"
    )
    # Evictions differ from step 163 on; which request hits how much first at 284 (ENGINES_VLLM.md).
    assert finding.first is not None and (finding.first.step, finding.first.what) == (284, "cache_len")


@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_step_dropped_is_one_episode(renumber: bool, asynchronous: bool) -> None:
    config = _config(async_scheduling=asynchronous)
    log = simulate(_workload(), config, LATENCY)
    rows = [row for row in range(log.steps.num_rows) if row != 200]
    finding, _ = _judge(_with_steps(log, rows, renumber=renumber), config)
    assert (finding.num_steps, finding.num_identical) == (log.steps.num_rows, log.steps.num_rows - 1)
    assert (finding.num_episodes, finding.longest_episode) == (1, 1)
    assert finding.first is not None and finding.first.what == "step not recorded"
    assert (finding.first.step, finding.first.resync_step) == (200, 200)
    assert finding.first.measured == {} and finding.first.simulated["step"] == 200
    assert any("1 steps are missing" in reason for reason in finding.not_judged)


def test_two_steps_swapped_are_found(log: Run) -> None:
    rows = list(range(log.steps.num_rows))
    rows[200], rows[201] = 201, 200
    finding, _ = _judge(_with_steps(log, rows), _config())
    assert finding.first is not None and finding.first.step == 200
    assert finding.num_identical == log.steps.num_rows - 1
    assert any("out of order: step 201" in reason for reason in finding.not_judged)


@pytest.mark.parametrize(
    ("column", "what"), [("preempted", "preempted"), ("finished", "finished"), ("num_free_blocks", "free blocks")]
)
def test_a_change_in_one_column_is_found_there(log: Run, column: str, what: str) -> None:
    values = log.steps.column(column).to_pylist()
    row = next(i for i, value in enumerate(values) if value) if column != "num_free_blocks" else 50
    values[row] = [] if column != "num_free_blocks" else values[row] + 1
    place = log.steps.schema.get_field_index(column)
    field = log.steps.schema.field(place)
    changed = log.steps.set_column(place, field, pa.array(values, field.type))
    finding, _ = compare_schedulers(Run(log.info, {"requests": log.requests, "steps": changed}), log, name="log")
    found = finding.first_free_blocks if column == "num_free_blocks" else finding.first
    assert found is not None and (found.step, found.what, found.resync_step) == (row, what, row + 1)


def test_the_order_of_a_batch_counts(log: Run) -> None:
    row = _first_row(log, lambda step: len(step["request"]) > 2)
    steps = log.steps.to_pylist()
    for name in ("request", "cache_len", "input_len"):
        steps[row][name] = steps[row][name][::-1]
    other = Run(log.info, {"requests": log.requests, "steps": pa.Table.from_pylist(steps, schema=log.steps.schema)})
    finding, _ = compare_schedulers(log, other, name="log")
    assert finding.first is not None and (finding.first.step, finding.first.what) == (row, "order")
    assert finding.num_identical == finding.num_steps - 1


def test_a_log_that_begins_in_the_middle() -> None:
    config = _config(enable_prefix_caching=False, num_gpu_blocks=600)
    whole = simulate(_workload(), config, LATENCY)
    part = _with_steps(whole, slice(150, None))
    assert min(part.steps.column("cache_len").to_pylist()[0]) > 0
    finding, _ = _judge(part, config)
    assert (finding.num_steps, finding.num_identical) == (part.steps.num_rows, part.steps.num_rows)
    assert any("begins in the middle" in reason for reason in finding.not_judged)


def test_an_sglang_log_that_begins_in_the_middle_is_judged_from_a_quiet_step_on() -> None:
    workload = _workload()
    requests = workload.requests.to_pydict()
    requests["arrival_ns"] = [at + (i // 40) * 100_000 * MS for i, at in enumerate(requests["arrival_ns"])]
    spaced = Run(RunInfo("workload"), {"requests": from_columns("requests", requests, "test")})
    config = sglang_config({**SGLANG, "max_total_tokens": 60_000, "disable_radix_cache": True}, "test")
    run = simulate_sglang(spaced, config, LATENCY)
    finding, _ = compare_schedulers(
        part := _with_steps(run, slice(30, None)), replay_schedule(part, config), name="log"
    )
    assert 0 < finding.num_steps == finding.num_identical < part.steps.num_rows
    assert any("judged from step" in reason for reason in finding.not_judged)


def test_a_log_that_stops_early(log: Run) -> None:
    finding, _ = _judge(_with_steps(log, slice(0, 200)), _config())
    assert (finding.num_steps, finding.num_identical) == (200, 200)


def test_a_log_with_parts_missing_says_what_was_not_judged(log: Run) -> None:
    lists, counts = ("preempted", "finished"), ("num_waiting", "num_running", "num_free_blocks")
    steps = _without(log.steps, "sched_ns", "update_ns", "instance", *lists, *counts)
    queues = ("waiting_ns", "prefetch_ns", "running_ns", "swapped_ns")
    requests = _without(log.requests, "queued_ns", "scheduled_ns", "first_token_ns", "finish_ns", *queues)
    finding, checks = _judge(Run(log.info, {"requests": requests, "steps": steps}), _config())
    assert finding.num_identical == finding.num_steps
    said = " ".join(finding.not_judged)
    for name in ("sched_ns", "update_ns", "queued_ns", *lists, *counts, "free blocks", "finish_order", "Running queue"):
        assert name in said
    assert checks.keys().isdisjoint({"free_blocks", "finish_order", "running_time"})


def test_queue_times_follow_from_preemptions() -> None:
    config = _config(enable_prefix_caching=False)
    run = simulate(_workload(), config, LATENCY)
    found = derived_residency(run)
    requests = run.requests.to_pydict()
    expected = np.array(requests["finish_ns"]) - np.array(requests["queued_ns"])
    assert (found["waiting"] + found["running"] == expected).all()
    preempted = np.array(requests["num_preemptions"]) > 0
    first_wait = np.array(requests["scheduled_ns"]) - np.array(requests["queued_ns"])
    assert (found["waiting"][preempted] > first_wait[preempted]).all()
    assert (found["waiting"][~preempted] == first_wait[~preempted]).all()


def test_gates(log: Run) -> None:
    gates = parse_gates({"identical_steps": 0.01, "queue_time": 0.5, "step_tokens": 0.0, "order": 0.1})
    twin = replay_schedule(log, _config(max_num_batched_tokens=240))
    verdicts = {check.metric: check.verdict for check in compare_schedulers(log, twin, name="log", gates=gates)[1]}
    assert verdicts["identical_steps"] == verdicts["step_tokens_p99"] == "fail"
    assert verdicts["admission_order"] == verdicts["waiting_time"] == "pass"


def test_runs_that_have_nothing_to_compare_are_refused(log: Run) -> None:
    with pytest.raises(InputError, match="no steps table"):
        compare_schedulers(_workload(), log, name="log")
    with pytest.raises(InputError, match="empty"):
        replay_schedule(_with_steps(log, []), _config())
    others = log.requests.set_column(0, log.requests.schema.field(0), pa.array([f"x{i}" for i in range(120)]))
    with pytest.raises(InputError, match="no request id in common"):
        compare_schedulers(log, Run(log.info, {"requests": others, "steps": log.steps}), name="log")
    steps = log.steps.to_pylist()
    steps[3]["instance"] = 1
    with pytest.raises(InputError, match="several instances"):
        replay_schedule(
            Run(log.info, {"requests": log.requests, "steps": pa.Table.from_pylist(steps, schema=log.steps.schema)}),
            _config(),
        )


keys = st.lists(st.integers(0, 12), max_size=40).map(lambda values: np.array(values, np.int64))


@settings(max_examples=300, deadline=None)
@given(keys, keys)
def test_aligning_is_symmetric_and_never_worse_than_by_position(one: Any, other: Any) -> None:
    rows, mirrored = align(one, other), align(other, one)
    assert rows.is_pair.sum() == mirrored.is_pair.sum()
    shorter = min(len(one), len(other))
    assert rows.is_pair.sum() >= (one[:shorter] == other[:shorter]).sum()
    for steps, values in ((rows.measured, one), (rows.simulated, other)):
        assert steps[steps != NO_STEP].tolist() == list(range(len(values)))
    assert (one[rows.measured[rows.is_pair]] == other[rows.simulated[rows.is_pair]]).all()
    assert align(one, one).is_pair.all()


def test_a_million_steps_align_around_many_differences() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 1 << 60, 1_000_000)
    other = np.insert(np.delete(one, rng.integers(0, len(one), 1000)), 300_000, [1, 2])
    assert align(one, other).is_pair.sum() >= len(one) - 1000


ENGINE = 'engine = "vllm"\nversion = "0.32.0"\nasync_scheduling = false\nenable_prefix_caching = false\n'


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "traces" / "targets" / "vllm-cpu-tiny" / "runs" / "saturated_1"
    engine = tmp_path / "engine.toml"
    engine.write_text(ENGINE)
    assert main(["validate", "scheduler", str(run), str(engine)]) == 0
    assert "854 of 854 steps identical" in capsys.readouterr().out
    engine.write_text(ENGINE + "max_num_batched_tokens = 496\n")
    assert main(["validate", "scheduler", str(run), str(engine)]) == 0
    text = capsys.readouterr().out
    assert "the default: tensor_parallel_size = 1" not in text and "watermark = 0.0" in text
    assert "first divergence: step 1, input_len" in text and "r3(0+34)" in text and "r3(0+18)" in text
    assert main(["validate", "scheduler", str(run), str(engine), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schedule"]["first"]["what"] == "input_len"
    assert {check["level"] for check in document["checks"]} == {"scheduler"}
    assert main(["validate", "scheduler", str(run), str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("log_name", ["vllm/i_async_tight", "vllm019/j_priority_self", "vllm019/j_async_priority"])
def test_the_oracles_vllm_logs_are_replayed_as_they_are(shared: Path, log_name: str) -> None:
    run = read_run(shared / "oracle" / log_name)
    finding, _ = compare_schedulers(
        run, replay_schedule(run, engine_config(replay_settings(run, {}), "test")), name="log"
    )
    assert finding.num_identical == finding.num_steps == run.steps.num_rows


@pytest.mark.parametrize(
    "log_name",
    [
        "sched_loop_ov_sep_p16",
        "sched_retract_norm_p16",
        "v059/sched_prio_p1",
        "hi_l2_write_back_p16",
        "hi_l2slow_write_back_p16",  # schedule() waits for write-backs while requests arrive
        "hi_l2slow_write_through_selective_p16",  # nothing runs, and who waits waits for a transfer
        "hi_l2_ov_mix",  # prompts quote answers, which a mixed step caches
        "v059/hi_l3slow_timeout",  # prefetches begin when a request comes, and end some before their reads
    ],
)
def test_the_oracles_sglang_logs_are_replayed_as_they_are(shared: Path, log_name: str) -> None:
    run = read_run(shared / "oracle" / "sglang" / f"{log_name}.jsonl.gz")
    finding, _ = compare_schedulers(
        run, replay_schedule(run, engine_config(replay_settings(run, {}), "test")), name="log"
    )
    assert finding.num_identical == finding.num_steps == run.steps.num_rows


def test_what_an_sglang_log_does_not_hold_is_said(shared: Path) -> None:
    """Without prompts, or the answers that they quote: judged up to the first hit that only these explain."""
    run = read_run(shared / "oracle" / "sglang" / "v059" / "hi_l2_write_back_p16.jsonl.gz")
    config = engine_config(replay_settings(run, {}), "test")
    requests = run.requests
    for name in ("output_block_hashes", "block_hashes"):
        place = requests.schema.get_field_index(name)
        requests = requests.set_column(place, name, pa.nulls(requests.num_rows, pa.list_(pa.uint64())))
        blind = Run(run.info, {"requests": requests, "steps": run.steps})
        finding, _ = compare_schedulers(blind, replay_schedule(blind, config), name="log")
        assert 0 < finding.num_steps == finding.num_identical < run.steps.num_rows
        assert any(f"{name} are not recorded" in reason for reason in finding.not_judged)
        assert f"steps {finding.num_steps} to {run.steps.num_rows - 1}, times in queues" in " ".join(finding.not_judged)
