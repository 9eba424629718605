"""Tables of operator times: each format's units and traps, by hand-written samples, and bad files."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvtwin.traces import InputError
from kvtwin.traces.readers.op_tables import detect, read_op_table
from kvtwin.traces.readers.optable import OpTable

ATTENTION = """prefill_chunk,kv_prefill,n_decode,kv_decode,time_us
0,0,4,128,9.5
64,0,0,0,12.25
64,128,4,128,20.5
"""
NEWER_ATTENTION = """layer,prefill_chunk,prefill_key,n_decode,kv_decode,decode_q_len,time_us,measurement_protocol
attention,0,0,4,128,1,9.5,v4
attention,0,0,4,128,4,11.5,v4
attention,64,32,0,0,1,12.25,v4
attention,64,16.5,4,128,1,20.5,v4
"""
SKEW = """regime,n,nb,ratio,skew,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_max_us,t_skew_us,alpha
pure,4,1,0.25,1.5,0,0,128,192,144,46.5,50.1,48.0,0.25
mixed,4,1,0.25,1.5,16,0,128,192,144,46.5,50.1,60.0,
"""
LAYERS = "layer_name,input,kv_cache,tp_size,latency(ns)\nrope,1,0,2,2642\nrope,2,0,2,2650\nattn,1,0,2,9000\n"
SPLITWISE = """model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,e2e_time,tensor_parallel,suspect
llama2-70b,a100,512,2,128,196.25,54.5,7168.9,8,False
llama2-70b,a100,512,64,128,794.0,67.5,7168.9,8,True
"""
VIDUR = """time_stats.emb.min,time_stats.emb.max,time_stats.emb.mean,time_stats.emb.median,time_stats.emb.std,num_tokens,\
num_tensor_parallel_workers
0.004,0.006,0.0045,0.005,0.0001,1,2
0.004,0.036,0.0090,0.005,0.0100,8,2
"""
FRONTIER = """time_stats.attn_prefill.mean,time_stats.attn_prefill.median,time_stats.attn_prefill.std,\
time_stats.attn_decode.mean,time_stats.attn_decode.median,time_stats.attn_decode.std,\
block_size,batch_size,prefill_chunk_size,kv_cache_size,is_prefill,n_q_head,n_kv_head,num_tensor_parallel_workers,mode,\
seq_lens
0.0205,0.0205,0.0001,0,0,0,16,1,64,32,True,32,8,2,even,[64]
0,0,0,0.0085,0.0085,0.0001,16,4,0,128,False,32,8,2,even,"[1, 1, 1, 1]"
0.0305,0.0305,0.0001,0,0,0,16,2,0,0,True,32,8,2,random,"[100, 30]"
0.0305,0.0305,0.0001,0.009,0.009,0,16,2,0,0,True,32,8,2,true_mixed,
"""
V0_ATTENTION = """time_stats.attn_decode.mean,time_stats.attn_decode.median,time_stats.attn_decode.std,\
batch_size,prefill_chunk_size,kv_cache_size,is_prefill,n_q_head,n_kv_head,num_tensor_parallel_workers
0.0085,0.0085,0.0001,4,0,128,False,32,8,2
"""
COLLECTIVE = """time_stats.all_reduce.mean,time_stats.all_reduce.median,time_stats.all_reduce.std,rank,num_workers,size,\
collective,devices_per_node,max_devices_per_node
0.0105,0.0105,0.0001,0,4,2048,all_reduce,4,8
"""


def write(path: Path, text: str, *, packed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def rows_of(table: OpTable) -> list[dict[str, Any]]:
    """Every row of every operator, as plain values."""
    found = []
    for sample in table.samples:
        for at in range(len(sample)):
            load = {name: values[at].item() for name, values in sample.columns.items()}
            found.append({"op": sample.op, **load, "time_us": round(float(sample.time_us[at]), 6)})
    return found


GEMM = {
    "framework": "VLLM", "version": "0.24.0", "device": "NVIDIA B200", "op_name": "gemm", "kernel_source": "torch",
    "gemm_dtype": "bfloat16", "m": 8, "n": 1024, "k": 4096, "latency": 0.0125,
}  # fmt: skip
DECODE = {
    "framework": "VLLM", "version": "0.24.0", "device": "NVIDIA B200", "op_name": "generation_attention",
    "kernel_source": "fa3", "batch_size": 4, "isl": 1, "num_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "kv_cache_dtype": "fp8", "step": 127, "window_size": 128, "latency": 0.009,
}  # fmt: skip
ALLREDUCE = {
    "framework": "vLLM", "version": "0.24.0", "device": "NVIDIA B200", "op_name": "all_reduce",
    "kernel_source": "vLLM_custom_graph", "allreduce_dtype": "bfloat16", "num_gpus": 2, "message_size": 128,
    "latency": 0.005, "backend": "vllm_graph",
}  # fmt: skip


def test_aiconfigurator_milliseconds_steps_and_elements(tmp_path: Path) -> None:
    gemm = read_op_table(parquet(tmp_path / "gemm.parquet", [GEMM, {**GEMM, "gemm_dtype": "fp8", "latency": 0.01}]))
    assert rows_of(gemm) == [
        {"op": "gemm", "n": 1024, "k": 4096, "m": 8, "time_us": 12.5},
        {"op": "gemm", "n": 1024, "k": 4096, "m": 8, "time_us": 10.0},
    ]
    assert [sample.key["gemm_dtype"] for sample in gemm.samples] == ["bfloat16", "fp8"]
    assert gemm.facts == {"hardware": "NVIDIA B200", "engine": "vllm"}
    (decode,) = read_op_table(parquet(tmp_path / "decode.parquet", [DECODE])).samples
    assert decode.load["context"].tolist() == [128]  # 127 before the new token
    assert (decode.key["head_dim"], dict(decode.constants)) == ("128", {"window_size": 128.0})
    (reduce,) = read_op_table(parquet(tmp_path / "reduce.parquet", [ALLREDUCE])).samples
    assert reduce.load["num_bytes"].tolist() == [256]  # 128 elements of 2 bytes


def test_older_aiconfigurator_tables_are_csv(tmp_path: Path) -> None:
    text = ",".join(GEMM) + "\n" + ",".join(str(value) for value in GEMM.values()) + "\n"
    as_csv, as_parquet = (
        read_op_table(path)
        for path in (write(tmp_path / "gemm_perf.txt", text), parquet(tmp_path / "g.parquet", [GEMM]))
    )
    assert rows_of(as_csv) == rows_of(as_parquet)
    assert [sample.key for sample in as_csv.samples] == [sample.key for sample in as_parquet.samples]


def test_a_kernel_splits_the_key_only_where_one_shape_ran_two(tmp_path: Path) -> None:
    chosen = [GEMM, {**GEMM, "m": 64, "kernel_source": "cutlass"}]
    assert len(read_op_table(parquet(tmp_path / "a.parquet", chosen)).samples) == 1
    both = [GEMM, {**GEMM, "kernel_source": "cutlass"}]
    keys = [sample.key["kernel_source"] for sample in read_op_table(parquet(tmp_path / "b.parquet", both)).samples]
    assert keys == ["cutlass", "torch"]


def test_llmservingsim_tables_and_the_sums_of_skew(tmp_path: Path) -> None:
    write(tmp_path / "bf16/meta.yaml", "vllm_version: 0.19.0\ngpu: X\nmodel: m\nmeasurement_iterations: 3\n")
    attention = read_op_table(write(tmp_path / "bf16/tp2/attention.csv.gz", ATTENTION, packed=True))
    assert rows_of(attention) == [
        {"op": "decode attention", "num_decode": 4, "context": 128, "time_us": 9.5},
        {"op": "prefill attention", "chunk": 64, "prefix": 0, "time_us": 12.25},
        {"op": "mixed attention", "chunk": 64, "prefix": 128, "num_decode": 4, "context": 128, "time_us": 20.5},
    ]
    assert attention.samples[0].key == {"tensor_parallel_size": "2"}
    assert attention.facts == {"hardware": "X", "model": "m", "engine": "vllm 0.19.0"}
    skew = read_op_table(write(tmp_path / "bf16/tp2/skew.csv", SKEW))
    pure = {"num_decode": 4, "long_share": 0.25, "context": 128, "skew": 1.5, "time_us": 16.0}
    assert rows_of(skew)[0] == {"op": "uneven decode attention", **pure}
    assert rows_of(skew)[1]["time_us"] == 20.0
    with pytest.raises(InputError, match=r"skew.csv sums several calls; put meta.yaml"):
        read_op_table(write(tmp_path / "elsewhere/skew.csv", SKEW))


def test_newer_llmservingsim_tables_tell_kernels_queries_and_degrees_apart(tmp_path: Path) -> None:
    samples = read_op_table(write(tmp_path / "tp1/attention.csv", NEWER_ATTENTION)).samples
    assert [(sample.op, sample.key["decode_q_len"]) for sample in samples] == [
        ("decode attention", "1"), ("decode attention", "4"), ("prefill attention", "1"), ("mixed attention", "1"),
    ]  # fmt: skip
    assert all("layer" not in sample.key for sample in samples)  # one kernel, called as ever
    assert {name: values.tolist() for name, values in samples[3].load.items()} == {
        "prefill_tokens": [64], "prefill_key": [16.5], "num_decode": [4], "context": [128],
    }  # fmt: skip
    experts = "ep,tokens,activated_experts,time_us\n1,1,8,47.8\n2,1,4,36.1\n"
    keys = [sample.key for sample in read_op_table(write(tmp_path / "tp1/moe.csv", experts)).samples]
    assert [key["expert_parallel_size"] for key in keys] == ["1", "2"]


def test_v0_nanoseconds_splitwise_milliseconds_and_its_suspects(tmp_path: Path) -> None:
    layers = read_op_table(write(tmp_path / "layers.csv", LAYERS))
    assert rows_of(layers)[1:] == [
        {"op": "rope", "num_tokens": 1, "time_us": 2.642},
        {"op": "rope", "num_tokens": 2, "time_us": 2.65},
    ]
    steps = read_op_table(write(tmp_path / "perf.csv", SPLITWISE))
    assert rows_of(steps)[0] == {"op": "prompt_time", "num_seqs": 2, "prompt_tokens": 512, "time_us": 196250.0}
    generated = {"num_decode": 2, "prompt_tokens": 512, "output_tokens": 128}
    assert rows_of(steps)[2] == {"op": "token_time", **generated, "time_us": 54500.0}
    assert steps.samples[0].suspect.tolist() == [False, True]


def test_vidur_takes_means_unless_they_scatter(tmp_path: Path) -> None:
    (emb,) = read_op_table(write(tmp_path / "mlp.csv", VIDUR)).samples
    assert emb.time_us.tolist() == [4.5, 5.0]  # the second row's repeats scatter by 111 %: its median
    assert emb.key == {"num_tensor_parallel_workers": "2"}
    assert emb.resolution_us == 1.0


def test_vidur_attention_by_medians_alone_and_told_by_its_chunk(tmp_path: Path) -> None:
    text = """time_stats.attn_prefill.median,time_stats.attn_decode.median,batch_size,prefill_chunk_size,kv_cache_size
0.0205,,1,64,32
,0.0085,4,0,128
"""
    assert rows_of(read_op_table(write(tmp_path / "attention.csv", text))) == [
        {"op": "attn_prefill", "num_seqs": 1, "chunk": 64, "prefix": 32, "time_us": 20.5},
        {"op": "attn_decode", "num_decode": 4, "total_context": 128, "time_us": 8.5},
    ]


def test_vidur_attention_rows_of_the_own_regime(tmp_path: Path) -> None:
    found = read_op_table(write(tmp_path / "attention.csv", FRONTIER))
    assert rows_of(found) == [
        {"op": "attn_prefill", "num_seqs": 1, "chunk": 64, "prefix": 32, "time_us": 20.5},
        {
            "op": "attn_prefill_uneven", "num_seqs": 2, "prompt_tokens": 130, "longest": 100, "squares": 10900,
            "prefix": 0, "time_us": 30.5,
        },
        {"op": "attn_decode", "num_decode": 4, "context": 128, "time_us": 8.5},
    ]  # fmt: skip
    assert found.samples[0].constants == {"num_heads": 16.0, "num_key_value_heads": 4.0}
    (reduce,) = read_op_table(write(tmp_path / "all_reduce.csv", COLLECTIVE)).samples
    assert (reduce.shape["num_gpus"].tolist(), reduce.load["num_bytes"].tolist()) == ([4], [2048])


def test_the_decodes_of_llmservingsim_v0_share_their_context(tmp_path: Path) -> None:
    (decode,) = read_op_table(write(tmp_path / "attention.csv", V0_ATTENTION)).samples
    assert {name: values.tolist() for name, values in decode.load.items()} == {
        "num_decode": [4],
        "total_context": [128],
    }


@pytest.mark.parametrize(
    ("text", "old", "new", "words"),
    [
        (ATTENTION, "9.5", "nan", "row 2, time_us: empty or nan: a positive, finite time expected"),
        (ATTENTION, "9.5", "0", "row 2, time_us: 0.0: a positive, finite time"),
        (ATTENTION, "9.5", "-9.5", "row 2, time_us: -9.5: a positive, finite time"),
        (ATTENTION, "9.5", "fast", "row 2, time_us: 'fast' is not a number"),
        (ATTENTION, "0,0,4,128,9.5", "0,0,0,128,9.5", "row 2, prefill_chunk: 0: and no decodes"),
        (ATTENTION, "64,0,0,0", "64.5,0,0,0", "row 3, prefill_chunk: 64.5: a count expected"),
        (ATTENTION, "64,0,0,0", "-64,0,0,0", "row 3, prefill_chunk: -64.0: a count expected"),
        (ATTENTION, "kv_decode", "kv", "kv_decode: column is missing"),
        (ATTENTION, "128,9.5", "128", "not CSV"),
        (LAYERS, "2650", "", "row 3, latency.ns.: empty or nan: a positive, finite time"),
        (LAYERS, "latency(ns)", "latency", "looks like a table of llmservingsim_v0, but has no column latency"),
        (SPLITWISE, "54.5", "inf", "row 2, token_time: inf: a positive, finite time"),
        (SPLITWISE, "e2e_time", "token_time", "token_time: column occurs twice"),
        (VIDUR, "0.005,0.0001", "0,0.0001", r"row 2, time_stats.emb.median: 0.0: a positive, finite time"),
        (FRONTIER, "[100, 30]", "[100, x]", "row 4, seq_lens: '.100, x.' is not a list of lengths"),
    ],
)
def test_a_bad_cell_is_named_with_its_row_and_column(tmp_path: Path, text: str, old: str, new: str, words: str) -> None:
    assert text.count(old) >= 1
    with pytest.raises(InputError, match=words):
        read_op_table(write(tmp_path / "table.csv", text.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latency": float("nan")}, "row 1, latency: empty or nan: a positive, finite time expected"),
        ({"latency": -1.0}, "row 1, latency: -1.0: a positive, finite time"),
        ({"m": -8}, "row 1, m: -8.0: a count expected"),
        ({"op_name": "gemm2"}, "op_name: holds 'gemm', 'gemm2': one per file expected"),
        ({"device": "NVIDIA H100"}, "device: holds 'NVIDIA B200', 'NVIDIA H100': one per file expected"),
    ],
)
def test_a_bad_parquet_row_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_op_table(parquet(tmp_path / "gemm.parquet", [GEMM, {**GEMM, **change}]))


def test_a_prefill_that_sees_no_key_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "attention.csv", NEWER_ATTENTION.replace("64,32,", "64,0,"))
    with pytest.raises(InputError, match=r"attention.csv, row 4, prefill_key: 0.0: the keys .* above 0"):
        read_op_table(path)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fitted coefficients cannot be calibrated"):
        read_op_table(write(tmp_path / "fit.json", '{"facebook/opt-13b": {}}'))
    with pytest.raises(InputError, match="no such file"):
        detect(tmp_path)
    with pytest.raises(InputError, match="holds no rows"):
        read_op_table(write(tmp_path / "layers.csv", LAYERS.splitlines()[0] + "\n"))
    whole = gzip.compress(ATTENTION.encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-12])
    with pytest.raises(InputError, match="not readable"):
        read_op_table(tmp_path / "cut.csv.gz")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="not readable as Parquet"):
        read_op_table(tmp_path / "cut.parquet")
    with pytest.raises(InputError, match="op_name 'conv' is unknown"):
        read_op_table(parquet(tmp_path / "conv.parquet", [{**GEMM, "op_name": "conv"}]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer;tokens;time_us\nqkv;1;2,5\n", "columns are separated by semicolons"),
        ("layer\ttokens\ttime_us\nqkv\t1\t2.5\n", "columns are separated by tabs"),
        ("", "the first line is empty"),
        ("\n\n", "the first line is empty"),
        ("layer,tokens\nqkv,1\n", "looks like a table of llmservingsim_tables, but has no column time_us"),
        ("a,b,c\n1,2,3\n", "not a table of times that kvtwin reads"),
        ("layer,tokens,time_us\nqkv,1,2.5\nqkv,2,2.5 us\n", "row 3, time_us: '2.5 us' is not a number"),
        ('layer,tokens,time_us\nqkv,1,2.5\nqkv,2,"1,234.5"\n', "row 3, time_us: '1,234.5' is not a number"),
        ("layer,tokens,time_us\nqkv,1,2.5\nqkv,2,\n", "row 3, time_us: empty or nan"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        read_op_table(path)


def test_filters_name_what_there_is(tmp_path: Path) -> None:
    table = read_op_table(parquet(tmp_path / "gemm.parquet", [GEMM, {**GEMM, "gemm_dtype": "fp8"}]))
    assert [sample.key["gemm_dtype"] for sample in table.only({"gemm_dtype": "fp8", "op": "gemm"}).samples] == ["fp8"]
    with pytest.raises(InputError, match="--filter gemm_dtype=fp4: found only bfloat16, fp8"):
        table.only({"gemm_dtype": "fp4"})
    with pytest.raises(InputError, match="--filter colour: no such key; known: gemm_dtype, op, version"):
        table.only({"colour": "red"})


def test_every_shared_table_is_read_or_refused_in_one_line(shared: Path) -> None:
    files = [*(shared / "data/profiles").rglob("*.csv.gz"), *(shared / "data/ops").rglob("*.parquet")]
    assert files
    refused = []
    for path in files:
        try:
            table = read_op_table(path)
        except InputError as error:
            refused.append(path.name)
            assert "\n" not in str(error)
            continue
        for sample in table.samples:
            assert np.all(sample.time_us > 0), path
    assert refused == ["attention_true_mixed.csv.gz"]
