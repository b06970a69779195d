"""Recursive reasoning models: HRM and TRM, which refine an answer step by step and learn to halt.

HRM: Wang et al., "Hierarchical Reasoning Model", arXiv:2506.21734. TRM: Jolicoeur-Martineau, "Less
is More: Recursive Reasoning with Tiny Networks", arXiv:2510.04871. Names and arithmetic are those
of the authors' code, in float32. `pyloss.ACTLossHead` is their loss.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyloss.recursive.carry import Carry, InnerCarry
from pyloss.recursive.checkpoints import load_checkpoint, state_dict
from pyloss.recursive.config import RecursiveConfig
from pyloss.recursive.models import HRM, TRM
from pyloss.recursive.puzzles import PuzzleEmbedding

if TYPE_CHECKING:
    from pyloss.recursive.evaluation import evaluate_recursive, steps_of
    from pyloss.recursive.pictures import steps_svg, steps_text
    from pyloss.recursive.run_files import load_recursive
    from pyloss.recursive.settings import RecursiveArgs
    from pyloss.recursive.training import train_recursive

__all__ = [
    "HRM",
    "TRM",
    "Carry",
    "InnerCarry",
    "PuzzleEmbedding",
    "RecursiveArgs",
    "RecursiveConfig",
    "evaluate_recursive",
    "load_checkpoint",
    "load_recursive",
    "state_dict",
    "steps_of",
    "steps_svg",
    "steps_text",
    "train_recursive",
]

#: Names of training runs, which are imported at first use, with their modules.
_LAZY = {
    "RecursiveArgs": "settings",
    "evaluate_recursive": "evaluation",
    "load_recursive": "run_files",
    "steps_of": "evaluation",
    "steps_svg": "pictures",
    "steps_text": "pictures",
    "train_recursive": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
