"""One small hand-written sample of every format, so that a clone without the real measurements tests every reader."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvtwin.traces.readers import vllm_recording

Sample = Callable[[Path], Path]
Rows = list[dict[str, Any]]

TRACE: Rows = [
    {"request_id": "a", "arrival_s": 0.25, "input_length": 5, "output_length": 2, "hash_ids": [7, 8]},
    {"request_id": "b", "arrival_s": 0.25, "input_length": 3, "output_length": 1, "hash_ids": [9], "priority": -1},
    {"request_id": "c", "arrival_s": 0.5, "input_length": 8, "output_length": 1, "hash_ids": [7, 8]},
]
CONFIG = {"block_size": 2, "hash_id_tokens": 4, "max_num_seqs": 2}
CLIENT: Rows = [  # of an engine recording; b reached the scheduler before a
    {"request_id": "a", "due_s": 0.25, "arrival_ns": 250000300, "ttft_s": 0.01, "tpot_s": 0.02, "e2e_s": 0.03},
    {"request_id": "b", "due_s": 0.25, "arrival_ns": 250000200, "ttft_s": 0.01, "tpot_s": 0.0, "e2e_s": 0.01},
    {"request_id": "c", "due_s": 0.5, "arrival_ns": 500000001, "ttft_s": 0.1, "tpot_s": 0.0, "e2e_s": 0.1},
]
LENGTHS = ("input_length", "output_length")
REQUESTS: Rows = [{**row, **{k: asked[k] for k in LENGTHS}} for row, asked in zip(CLIENT, TRACE, strict=True)]
COUNTS = {"num_waiting": 0, "num_running": 2, "free_blocks": 9}
STEPS: Rows = [
    {"step": 0, "t_sched_ns": 250001000, "t_start_ns": 250002000, "t_end_ns": 260000000, "t_update_ns": 260000500,
     "scheduled": [["b", 0, 3], ["a", 0, 5]], "preempted": [], "finished": ["b"], **COUNTS},
    {"step": 1, "t_sched_ns": 260001000, "t_start_ns": 260002000, "t_end_ns": 280000000, "t_update_ns": 280000500,
     "scheduled": [["a", 5, 1]], "preempted": [], "finished": ["a"], **COUNTS},
    {"step": 2, "t_sched_ns": 500001000, "t_start_ns": 500002000, "t_end_ns": 550000000, "t_update_ns": 550000500,
     "scheduled": [["c", 4, 2]], "preempted": ["c"], "finished": [], **COUNTS},
    {"step": 3, "t_sched_ns": 550001000, "t_start_ns": 550002000, "t_end_ns": 600000000, "t_update_ns": 600000500,
     "scheduled": [["c", 0, 8]], "preempted": [], "finished": ["c"], **COUNTS},
]  # fmt: skip

BENCH: Rows = [
    {"request_id": "bench-0", "input_toks": 10, "output_toks": 2, "arrival_time": 1777142838.338653123,
     "queued_ts": 100.5, "scheduled_ts": 100.6, "first_token_ts": 100.7, "last_token_ts": 100.8},
    {"request_id": "bench-1", "input_toks": 20, "output_toks": 3, "arrival_time": 1777142839.338653123,
     "queued_ts": 101.500000007, "scheduled_ts": 101.6, "first_token_ts": 101.7, "last_token_ts": 101.8},
]  # fmt: skip
BENCH_TEXT = [  # a Python float would lose the last digits of the epoch stamps
    json.dumps(row).replace(str(row["arrival_time"]), f"{second}.338653123")
    for row, second in zip(BENCH, (1777142838, 1777142839), strict=True)
]
BENCH_META = {
    "model": "llama",
    "vllm_version": "0.19.0",
    "engine_kwargs": {"model": "llama", "max_num_seqs": 128, "max_model_len": None},
}
WORKLOAD: Rows = [
    {"input_toks": 33, "output_toks": 2, "arrival_time_ns": 5, "input_tok_ids": [*range(32), 99], "output_tok_ids": []},
    {"input_toks": 32, "output_toks": 1, "arrival_time_ns": 5, "input_tok_ids": [*range(16), *range(50, 66)]},
]
MOONCAKE: Rows = [
    {"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [3, 4]},
    {"timestamp": 3001, "input_length": 512, "output_length": 1, "hash_ids": [3]},
]
SGLANG_CASE = {
    "workload": {"kind": "poisson", "seed": 1, "n": 2, "rate": 10, "in_lo": 3, "in_hi": 6, "out_lo": 2, "out_hi": 2,
                 "n_prefix": 1, "prefix_len": 4},
    "config": {"page_size": 1, "pool_tokens": 1000, "overlap": False},
}  # fmt: skip
SGLANG_LOG: list[Any] = [
    {"type": "meta", "sglang": "0.5.9", "case": SGLANG_CASE, "fields": []},
    [1, 100, 300, "E", 90, [[0, 0, 7], [1, 4, 6]], 17, [], 0, 0, 980, 5, 9, 0.7, [], [], [], [0, 1], 0, [], []],
    [2, 300, 400, "D", 300, [0, 1], 17, [], 0, 2, 978, 5, 9, 0.7, [1], [], [], [], 0, [], []],
    [3, 400, 500, "D", 400, 0, 19, [], 0, 2, 976, 5, 9, 0.7, [], [0], [], [], 0, [], []],
    ["R", 0, 0, 50, 7, 2, 100, 300, 400, 0, 0],
    ["R", 1, 1, 60, 10, 3, 100, 300, 500, 4, 1],
    {"type": "summary", "status": "ok"},
]
TAIR: Rows = [
    {"component": "cache_manager", "type": "GetCacheLocation", "trigger_time_us": 10, "keys": [1, -2, 3], "block_mask": 1},
    {"component": "cache_manager", "type": "GetCacheLocation", "trigger_time_us": 11, "keys": [1, -2, 4]},
    {"component": "cache_manager", "type": "StartWriteCache", "trigger_time_us": 12, "keys": [1, -2, 5, 6],
     "write_session_id": "a"},
    {"component": "cache_manager", "type": "FinishWriteCache", "trigger_time_us": 13, "write_session_id": "a",
     "success_block": 4},
]  # fmt: skip
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:59.9999999,374,44
2023-11-16 18:16:00.0000001,396,109
"""
LLMSERVINGSIM = """instance id,request id,model,input,output,arrival,end_time,latency,queuing_delay,TTFT,TPOT
0,1,llama,20,2,1000,4000,3000,100,2000,1000
0,0,llama,10,3,500,2500,2000,0,1000,500
"""
VIDUR = """Request Id,request_e2e_time,prefill_e2e_time,request_scheduling_delay,request_inter_arrival_delay,\
request_num_prefill_tokens,request_num_decode_tokens
0,1.5,0.25,0.125,,374,44.0
1,,,,0.5,20,2
"""
BLIS = {
    "completed_requests": 1,
    "ttft_mean_ms": 20.5,
    "requests": [
        {"arrived_at": 0.25, "requestID": "request_0", "num_prefill_tokens": 374, "num_decode_tokens": 44,
         "ttft_ms": 20.5, "itl_ms": 8.1, "e2e_ms": 368.8, "scheduling_delay_ms": 1.5},
        {"arrived_at": 0.5, "requestID": "request_1", "num_prefill_tokens": 20, "num_decode_tokens": 2,
         "ttft_ms": 0, "itl_ms": 0, "e2e_ms": 0, "scheduling_delay_ms": 0},
    ],
}  # fmt: skip
VLLM_BENCH = {
    "backend": "vllm", "model_id": "llama", "input_lens": [10, 20, 30], "output_lens": [3, 0, 1],
    "ttfts": [0.25, 0.0, 0.5], "itls": [[0.125, 0.125], [], []], "start_times": [100.5, 100.75, 100.0],
    "errors": ["", "refused", ""],
}  # fmt: skip

SIMULATED_SGLANG: Rows = [
    {"rid": "5f3a", "session_id": None, "last_event_time": 0.75, "input_length": 10, "output_length": 2,
     "final_device_hit_len": 4, "queue_start": 0.0, "queue_end": 0.125, "created_time": 0.0,
     "gen_token_latencies": [0.5, 0.25]},
    {"rid": "77b1", "session_id": None, "last_event_time": 0.75, "input_length": 20, "output_length": 3,
     "final_device_hit_len": 0, "queue_start": 0.375, "queue_end": -1.25, "created_time": 0.25,
     "gen_token_latencies": []},
]  # fmt: skip


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_recording(folder: Path) -> Path:
    target = folder / "recording"
    target.mkdir()
    for name, rows in (("trace", TRACE), ("requests", REQUESTS), ("steps", STEPS)):
        write_jsonl(target / f"{name}.jsonl", rows)
    (target / "config.json").write_text(json.dumps(CONFIG))
    (target / "summary.json").write_text(json.dumps({"vllm": "0.32.0", "threads": 1}))
    return target


def make_bench(folder: Path) -> Path:
    target = folder / "bench"
    target.mkdir()
    (target / "requests.jsonl").write_text("\n".join(BENCH_TEXT))
    (target / "meta.json").write_text(json.dumps(BENCH_META))
    return target


def make_azure(folder: Path) -> Path:
    path = folder / "azure.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    return path


SAMPLES: Mapping[str, Sample] = {
    "kvtwin": lambda folder: vllm_recording.read(make_recording(folder)).write(folder / "run"),
    "kvtwin_jsonl": lambda folder: make_tiny_trace(folder),
    "vllm_recording": make_recording,
    "llmservingsim_run": make_bench,
    "llmservingsim_workload": lambda folder: write_jsonl(folder / "workload.jsonl", WORKLOAD),
    "sglang_log": lambda folder: write_jsonl(folder / "sglang.jsonl", SGLANG_LOG),
    "mooncake": lambda folder: write_jsonl(folder / "mooncake.jsonl", MOONCAKE),
    "tair": lambda folder: write_jsonl(folder / "tair.jsonl", TAIR),
    "azure2023": make_azure,
    "vllm_bench": lambda folder: write_text(folder / "bench.json", json.dumps(VLLM_BENCH)),
    "llmservingsim_requests": lambda folder: write_text(folder / "llmservingsim.csv", LLMSERVINGSIM),
    "vidur_requests": lambda folder: write_text(folder / "request_metrics.csv", VIDUR),
    "blis": lambda folder: write_text(folder / "blis.json", json.dumps(BLIS, indent=2)),
    "sglang_simulator": lambda folder: write_jsonl(folder / "request.jsonl", SIMULATED_SGLANG),
}


def make_tiny_trace(folder: Path) -> Path:
    """The trace with one hash per prompt, as blocks of 512 tokens (the format's default) ask for."""
    rows = [{**row, "hash_ids": row["hash_ids"][:1]} for row in TRACE]
    return write_jsonl(folder / "requests.kvtwin.jsonl", rows)


@pytest.fixture(scope="session")
def samples() -> Mapping[str, Sample]:
    """For each format, a function that writes its sample into a folder and returns the path to read."""
    return SAMPLES


KERNELS = {
    "attention": "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,8.5\n16,0,1,16,9.5\n",
    "dense": "layer,tokens,time_us\nact_fn,1,2.5\nact_fn,2,2.75\n",
    "per_sequence": "layer,sequences,time_us\nlm_head,1,700\n",
    "skew": "regime,n,nb,ratio,skew,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_max_us,t_skew_us,alpha\n"
    "pure,2,1,0.5,4.0,0,0,128,512,320,46.5,50.1,47.4,0.25\npure,2,1,0.5,4.0,0,0,16,64,40,30,30,30,\n",
    "moe": "tokens,activated_experts,time_us\n1,8,50.25\n",
}


@pytest.fixture
def kernel_profile(tmp_path: Path) -> Path:
    """A kernel profile folder with tp1 (all tables) and tp2 (no skew, no moe)."""
    folder = tmp_path / "bf16"
    for degree, names in ((1, [*KERNELS]), (2, ["attention", "dense", "per_sequence"])):
        (folder / f"tp{degree}").mkdir(parents=True)
        for name in names:
            (folder / f"tp{degree}" / f"{name}.csv").write_text(KERNELS[name])
    (folder / "meta.yaml").write_text("vllm_version: 0.19.0\nmeasurement_iterations: 3\ntp_degrees: [1, 2]\n")
    return folder
