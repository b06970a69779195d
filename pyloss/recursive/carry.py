"""What a recursive model carries from one step to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class InnerCarry:
    """The states of both levels, float32 [B, P + T, D], without gradients."""

    z_H: np.ndarray
    z_L: np.ndarray


@dataclass
class Carry:
    """The sequences that a batch works on.

    Attributes:
        inner_carry: the states.
        steps: int32 [B], the steps that each sequence has taken.
        halted: bool [B]: the next step begins with the next batch's sequence there.
        current_data: the arrays of the batch that each sequence came with.
    """

    inner_carry: InnerCarry
    steps: np.ndarray
    halted: np.ndarray
    current_data: dict[str, Any]
