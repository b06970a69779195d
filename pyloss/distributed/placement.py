"""The processors and instructions that a rank uses beside the other ranks of its machine."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pyloss import _core
from pyloss.distributed.group import Group

log = logging.getLogger("pyloss")

_SET_BY_USER = ("PYLOSS_NUM_THREADS", "OMP_NUM_THREADS")


def processors() -> frozenset[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def threads_of(sets: Sequence[frozenset[int]], index: int) -> int:
    """The threads of process `index`, where process i may run on the processors `sets[i]`.

    A processor that n processes may use counts as 1 / n for each of them.
    """
    users = Counter(processor for one in sets for processor in one)
    return max(int(sum(1 / users[processor] for processor in sets[index]) + 1e-9), 1)


def share(group: Group) -> None:
    """Set this rank's number of threads and instruction set; rank 0 warns of a bad placement."""
    own: dict[str, Any] = {
        "host": group.name().rpartition(" ")[2],
        "processors": processors(),
        "all": os.cpu_count() or 1,
        "isas": _core.isas(),
        "isa": _core.isa(),
    }
    ranks = group.all_gather(own)
    here = [index for index, rank in enumerate(ranks) if rank["host"] == own["host"]]
    sets = [ranks[index]["processors"] for index in here]
    if not any(os.environ.get(name) for name in _SET_BY_USER):
        _core.set_num_threads(threads_of(sets, here.index(group.rank())))
    _share_instructions(group, ranks)
    threads = group.all_gather(_core.num_threads())
    if group.rank() == 0:
        for line in warnings_of(ranks, threads):
            log.warning("%s", line)


def warnings_of(ranks: Sequence[dict[str, Any]], threads: Sequence[int]) -> list[str]:
    """What is wrong with the placement of ranks, a line for each machine that has a problem."""
    hosts: dict[str, list[int]] = {}
    for index, rank in enumerate(ranks):
        hosts.setdefault(rank["host"], []).append(index)
    lines = []
    for host, members in hosts.items():
        union = frozenset().union(*(ranks[i]["processors"] for i in members))
        total, there = sum(threads[i] for i in members), ranks[members[0]]["all"]
        if total > len(union):
            lines.append(
                f"{host}: its {len(members)} ranks have {total} threads on {len(union)} "
                "processors, so that they wait for each other: start fewer ranks there"
                + (", or give fewer threads (PYLOSS_NUM_THREADS)" if total > len(members) else "")
            )
        elif len(union) * 2 <= there:
            lines.append(
                f"{host}: its {len(members)} ranks may use {len(union)} of {there} processors: "
                "mpirun binds them so by default; --bind-to none, or --map-by "
                "ppr:1:socket:pe=CORES gives them all"
            )
    return lines


def _share_instructions(group: Group, ranks: Sequence[dict[str, Any]]) -> None:
    """Choose an instruction set that all machines have: an update must have the same bits on all.

    Another one rounds sums of products in another way, and the ranks' parameters would drift apart.
    """
    if len({rank["isa"] for rank in ranks}) == 1:
        return
    common = [isa for isa in ranks[0]["isas"] if all(isa in rank["isas"] for rank in ranks)]
    # `isas` is in the order of speed, the slowest first; a set that a user chose stays the limit.
    chosen = min((rank["isa"] for rank in ranks), key=lambda isa: _place(common, isa))
    if chosen not in common:
        chosen = common[-1]
    _core.use_isa(chosen)
    if group.rank() == 0:
        log.warning("the machines have different processors: all use the instructions %s", chosen)


def _place(common: Sequence[str], isa: str) -> int:
    return common.index(isa) if isa in common else len(common)
