"""Recursive reasoning models: HRM and TRM, which refine an answer step by step and learn to halt.

HRM: Wang et al., "Hierarchical Reasoning Model", arXiv:2506.21734. TRM: Jolicoeur-Martineau, "Less
is More: Recursive Reasoning with Tiny Networks", arXiv:2510.04871. Names and arithmetic are those
of the authors' code, in float32. `pyloss.ACTLossHead` is their loss.
"""

from pyloss.recursive.carry import Carry, InnerCarry
from pyloss.recursive.checkpoints import load_checkpoint, state_dict
from pyloss.recursive.config import RecursiveConfig
from pyloss.recursive.models import HRM, TRM
from pyloss.recursive.puzzles import PuzzleEmbedding

__all__ = [
    "HRM",
    "TRM",
    "Carry",
    "InnerCarry",
    "PuzzleEmbedding",
    "RecursiveConfig",
    "load_checkpoint",
    "state_dict",
]
