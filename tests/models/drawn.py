"""Random weights for tiny models without files."""

import numpy as np

from pyloss.models.synthetic import RandomSource
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight


class Drawn(RandomSource):
    """Every matrix, and every bias, has its own numbers: equal experts would hide wrong routing."""

    def __init__(self):
        super().__init__("f32")
        self._rng = np.random.default_rng(2)

    def array(self, name, *shape, rotary=False):
        return self._rng.standard_normal(shape).astype(np.float32) / 3

    def matrix(self, name, rows, cols, rotary=False):
        values = self._rng.standard_normal((rows, cols)) / np.sqrt(cols)
        return Weight.quantize(values.astype(np.float32), "f32")

    def experts(self, name, count, rows, cols):
        return WeightStack([self.matrix(name, rows, cols) for _ in range(count)])
