"""A schedule comparison for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from kvtwin.validate.result import Divergence, ScheduleFinding

_MAX_MEMBERS: Final = 12  # of a batch, in one line
_WIDTH: Final = 14


def describe(finding: ScheduleFinding) -> Iterator[str]:
    """The finding, line by line; its checks are printed elsewhere."""
    share = finding.num_identical / finding.num_steps if finding.num_steps else 1.0
    yield f"{finding.num_identical} of {finding.num_steps} steps identical ({share:.2%})"
    if finding.num_episodes:
        yield f"{finding.num_episodes} episodes of divergence, the longest {finding.longest_episode} steps"
    for title, found in (("first divergence", finding.first), ("free blocks first differ", finding.first_free_blocks)):
        if found is not None:
            yield from _side_by_side(title, found)
    for reason in finding.not_judged:
        yield f"not judged or assumed: {reason}"


def _side_by_side(title: str, found: Divergence) -> Iterator[str]:
    meets = "they never agree again" if found.resync_step is None else f"they agree again from step {found.resync_step}"
    yield f"{title}: step {found.step}, {found.what}; {meets}"
    for who, step in (("measured", found.measured), ("simulated", found.simulated)):
        if not step:
            yield f"  {who:{_WIDTH}} no such step"
            continue
        other = found.simulated if who == "measured" else found.measured
        yield f"  {who:{_WIDTH}} {_members(step, other)}"
        yield f"  {'':{_WIDTH}} {_queues(step)}"


def _members(step: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The batch: the members that the other step does not have alike, or else the first ones, as id(cache+input)."""
    batch = step["batch"]
    own = [member for member in batch if member not in other.get("batch", [])] or batch
    shown = ", ".join(f"{name}({cache_len}+{input_len})" for name, cache_len, input_len in own[:_MAX_MEMBERS])
    left = len(batch) - len(own[:_MAX_MEMBERS])
    return f"step {step['step']}: {shown}{f', and {left} more' if left else ''}"


def _queues(step: Mapping[str, Any]) -> str:
    counts = (f"{name.removeprefix('num_')} {_or_unknown(step[name])}" for name in step if name.startswith("num_"))
    lists = (
        f"{name} {', '.join(step[name]) or 'none'}" for name in ("preempted", "finished") if step[name] is not None
    )
    return "; ".join((*counts, *lists))


def _or_unknown(value: Any) -> str:
    return "unknown" if value is None else str(value)
