"""A model with random weights, for measurements without a model's file."""

from __future__ import annotations

import numpy as np

from pyloss.models.building import build_model
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.files.sources import Source
from pyloss.models.transformer import Model
from pyloss.weights.stack import WeightStack
from pyloss.weights.weight import Weight

#: SmolLM2-135M's shape
SMALL = ModelConfig(
    "llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)


class RandomSource(Source):
    """Any tensor: random matrices that keep the size of their input, zero biases, norms of 1."""

    def __init__(self, format: str) -> None:
        self._format = format
        self._drawn: dict[tuple[int, int], Weight] = {}

    def has(self, name: str) -> bool:
        """See `Source`: no tensor is optional here."""
        return False

    def array(self, name: str, *shape: int, rotary: bool = False) -> np.ndarray:
        """See `Source`: zeros, as only biases are read this way."""
        return np.zeros(shape, np.float32)

    def norm(self, name: str, dims: int) -> np.ndarray:
        """See `Source`."""
        return np.ones(dims, np.float32)

    def matrix(self, name: str, rows: int, cols: int, rotary: bool = False) -> Weight:
        """See `Source`. Layers do not share bytes: a shared matrix would stay in the cache."""
        if (rows, cols) not in self._drawn:
            values = np.random.default_rng(0).standard_normal(
                (rows, cols), dtype=np.float32
            ) / np.float32(np.sqrt(cols))
            self._drawn[rows, cols] = Weight.quantize(values, self._format)
        drawn = self._drawn[rows, cols]
        return Weight(drawn.raw.copy(), drawn.format, drawn.shape, groups=drawn.groups)

    def experts(self, name: str, count: int, rows: int, cols: int) -> WeightStack:
        """See `Source`."""
        return WeightStack([self.matrix(name, rows, cols) for _ in range(count)])

    def refuse_missing_layers(self, layers: int) -> None:
        """None are missing."""

    def refuse_leftovers(self) -> None:
        """There are no leftovers."""


def random_model(config: ModelConfig = SMALL, format: str = "f32") -> Model:
    """A model of this shape with its matrices in `format` and frozen parameters; always the same.

    Raises ValueError for a format that cannot be written, or whose groups do not divide the sizes.
    """
    return build_model(config, RandomSource(format))
