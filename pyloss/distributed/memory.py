"""The memory of all ranks. Those of a machine share the pages of mapped files, such as weights."""

from __future__ import annotations

from collections.abc import Sequence

from pyloss.distributed.group import Group
from pyloss.runtime.memory import mapped_memory, peak_memory


def peak_memory_of(group: Group) -> int:
    """The peak resident memory of all ranks, in bytes; pages of files count once for a machine."""
    peak = peak_memory()
    if group.size() == 1:
        return peak
    shared = min(mapped_memory(), peak)
    return total_memory(group.all_gather((group.name().rpartition(" ")[2], peak - shared, shared)))


def total_memory(ranks: Sequence[tuple[str, int, int]]) -> int:
    """The sum over ranks, each of which has a host, and bytes of its own and of mapped files."""
    shared: dict[str, int] = {}
    for host, _, mapped in ranks:
        shared[host] = max(shared.get(host, 0), mapped)
    return sum(own for _, own, _ in ranks) + sum(shared.values())
