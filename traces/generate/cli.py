"""`kvtwin trace generate`: synthetic workloads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvtwin.traces.errors import InputError

if TYPE_CHECKING:  # the command imports what it needs, so that `kvtwin --help` starts at once
    from kvtwin.traces.generate.conversations import Conversations

# As `distribution.FORMS`, which would import numpy.
_FORMS = "N, uniform:LOW:HIGH, exponential:MEAN, geometric:MEAN or lognormal:MEAN:CV"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate` to the sub-commands of `kvtwin trace`."""
    generate = commands.add_parser(
        "generate",
        help="a synthetic workload: random requests or multi-turn conversations",
        description=f"The same options give the same workload. A DIST is {_FORMS} (CV: standard deviation / mean).",
    )
    kinds = generate.add_subparsers(dest="workload", required=True, metavar="WORKLOAD")
    random = kinds.add_parser("random", help="independent requests", description=f"A DIST is {_FORMS}.")
    # A conversation of one turn each, under the names that `vllm bench serve` has for them.
    random.set_defaults(num_turns="1", turn_interval="0", prefix_len="0")
    _add_number(random, "--num-prompts", 1000, "requests", dest="num_conversations")
    _add_rate(random, "--request-rate", "requests")
    _add_number(random, "--prefix-len", 0, "tokens that all prompts begin with", dest="common_prefix_len")
    _add_lengths(random, input_len="1024", output_len="128", what="a prompt behind its prefix")
    turns = kinds.add_parser(
        "multi-turn",
        help="conversations whose context grows from turn to turn",
        description="Each prompt is the conversation so far, answers included, and a new question. "
        f"A DIST is {_FORMS}.",
    )
    _add_number(turns, "--num-conversations", 100, "how many")
    _add_rate(turns, "--conversation-rate", "new conversations")
    _add_dist(turns, "--num-turns", "geometric:5", "questions each")
    _add_dist(
        turns,
        "--turn-interval",
        "lognormal:60:1",
        "seconds from one question to the next: the answer, and time to read and think",
    )
    _add_number(turns, "--common-prefix-len", 512, "tokens of the system prompt that all share")
    _add_dist(turns, "--prefix-len", "0", "tokens that a conversation of its own begins with, such as a document")
    _add_lengths(turns, input_len="lognormal:200:1", output_len="lognormal:200:1", what="a question")


def _add_number(parser: argparse.ArgumentParser, flag: str, default: int, what: str, dest: str | None = None) -> None:
    name = dest or flag.strip("-").replace("-", "_")
    parser.add_argument(flag, type=int, default=default, dest=name, metavar="N", help=f"{what} (default: {default})")


def _add_dist(parser: argparse.ArgumentParser, flag: str, default: str, what: str) -> None:
    parser.add_argument(flag, default=default, metavar="DIST", help=f"{what} (default: {default})")


def _add_rate(parser: argparse.ArgumentParser, flag: str, what: str) -> None:
    """How often something arrives, and how evenly."""
    rate = f"{what} per second, inf for all at once (default: 1)"
    parser.add_argument(flag, type=float, default=1.0, dest="rate", metavar="R", help=rate)
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="shape of the gamma distributed gaps: 1 Poisson, below 1 bursts, inf a constant rate (default: 1)",
    )


def _add_lengths(parser: argparse.ArgumentParser, input_len: str, output_len: str, what: str) -> None:
    """What both kinds end with."""
    _add_dist(parser, "--input-len", input_len, f"tokens of {what}")
    _add_dist(parser, "--output-len", output_len, "tokens of an answer")
    _add_number(parser, "--max-model-len", 0, "leave out turns with more tokens; 0 for none")
    _add_number(parser, "--block-tokens", 64, "prompt tokens per block hash")
    _add_number(parser, "--seed", 0, "of all random streams")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="RUN",
        help="new run folder, or Mooncake trace (*.jsonl[.gz])",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=_generate)


def _spec(args: argparse.Namespace) -> Conversations:
    from kvtwin.traces.generate.conversations import Conversations
    from kvtwin.traces.generate.distribution import Distribution

    return Conversations(
        num_conversations=args.num_conversations,
        rate_per_s=args.rate,
        burstiness=args.burstiness,
        num_turns=Distribution.parse(args.num_turns),
        turn_interval_s=Distribution.parse(args.turn_interval),
        common_prefix_tokens=args.common_prefix_len,
        prefix_tokens=Distribution.parse(args.prefix_len),
        input_tokens=Distribution.parse(args.input_len),
        output_tokens=Distribution.parse(args.output_len),
        max_model_len=args.max_model_len,
        block_tokens=args.block_tokens,
        seed=args.seed,
    )


def _generate(args: argparse.Namespace) -> int:
    from kvtwin.traces.files import refuse_existing
    from kvtwin.traces.generate.conversations import generate
    from kvtwin.traces.readers.mooncake import HASH_BLOCK_TOKENS
    from kvtwin.traces.time import to_seconds
    from kvtwin.traces.writers.mooncake import write_mooncake

    refuse_existing(args.output)
    as_mooncake = args.output.name.endswith((".jsonl", ".jsonl.gz"))
    if as_mooncake and HASH_BLOCK_TOKENS % args.block_tokens:
        problem = f"--block-tokens {args.block_tokens}: a Mooncake trace needs a divisor of {HASH_BLOCK_TOKENS}"
        raise InputError(problem, path=args.output)
    run = generate(_spec(args))
    if as_mooncake:
        write_mooncake(run, args.output)
    else:
        run.write(args.output)
    requests = run.requests
    summary = {
        "output": str(args.output),
        "num_requests": requests.num_rows,
        "num_input_tokens": int(requests.column("input_tokens").to_numpy().sum()),
        "num_output_tokens": int(requests.column("output_tokens").to_numpy().sum()),
        "arrivals_span_s": to_seconds(int(requests.column("arrival_ns").to_numpy()[-1])),
    }
    counts = "{num_requests:,} requests, {num_input_tokens:,} input and {num_output_tokens:,} output tokens"
    line = "{output}: " + counts + " in {arrivals_span_s:,.1f} s"
    print(json.dumps(summary) if args.json else line.format(**summary))
    return 0
