"""What all ranks must have in common is compared at the start, by short texts such as hashes."""

from __future__ import annotations

from collections.abc import Mapping

from pyloss.checks.numbers import shown
from pyloss.distributed.group import Group


def check_same(group: Group, parts: Mapping[str, str | None]) -> None:
    """Raise ValueError on all ranks unless the `parts` of every rank are those of rank 0.

    The message names the first rank that differs, its machine, and the part.
    """
    if group.size() == 1:
        return
    ranks = group.all_gather(dict(parts))
    for rank, found in enumerate(ranks):
        for name, value in ranks[0].items():
            if found.get(name) != value:
                raise ValueError(
                    f"{name} differs: {group.name(rank)} has {shown(found.get(name))}, "
                    f"{group.name(0)} has {shown(value)}; all ranks need the same model, data, "
                    "settings and version of pyloss"
                )
