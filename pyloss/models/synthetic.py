"""Models with random weights, for measurements without the weights of a model.

`shape_of` reads a configuration, `random_model` makes the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pyloss.errors import size_text
from pyloss.io.files import read_json
from pyloss.models.building import build_model
from pyloss.models.config.model_config import ModelConfig
from pyloss.models.conversion import QUANTIZATIONS
from pyloss.models.files.quantized import Quantization
from pyloss.models.files.sources import Source
from pyloss.models.reading import config_file_of, read_model
from pyloss.models.saving import DTYPES
from pyloss.models.transformer import Model
from pyloss.runtime.memory import free_memory
from pyloss.weights.formats import FLOATS, FORMATS, SINGLE, row_bytes
from pyloss.weights.groups import Groups
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

#: formats of weights, by the names that users give them
STORED_TYPES = {name: name for name in SINGLE} | QUANTIZATIONS

# About so many values of a matrix are drawn; its other rows repeat them.
_DRAWN = 1 << 20
# In a block of a format without an encoder: where the float16 scales lie, and a size of them that
# makes values of about 1. MXFP4 has an exponent in their place.
_SCALES = {
    "q2_k": ((80, 82), 0.06),
    "q3_k": ((108,), 0.025),
    "q4_k": ((0, 2), 0.003),
    "q5_k": ((0, 2), 0.0015),
    "q6_k": ((208,), 0.0008),
    "iq4_nl": ((0,), 0.015),
    "iq4_xs": ((0,), 0.0008),
    "mxfp4": ((), 0.2),
}


class RandomSource(Source):
    """Any tensor: random matrices that keep the size of their input, zero biases, norms of 1.

    The bytes of matrices are allocated first, which takes no memory yet, and written by `fill`.
    """

    def __init__(self, format: str) -> None:
        self._format = format
        self._rows: dict[tuple[str, int, int], Weight] = {}
        self._unwritten: list[tuple[Weight, Weight]] = []

    def has(self, name: str) -> bool:
        """See `Source`: no tensor is optional here."""
        return False

    def array(self, name: str, *shape: int, rotary: bool = False) -> np.ndarray:
        """See `Source`: zeros for biases, 1 for factors of layers and routers."""
        return np.full(
            shape, name.endswith(("layer_scalar", ".router.scale", "_expert_scale")), np.float32
        )

    def taps(self, name: str, columns: int, taps: int) -> np.ndarray:
        """See `Source`."""
        return np.full((columns, 1, taps), 1 / taps, np.float32)

    def norm(self, name: str, dims: int) -> np.ndarray:
        """See `Source`."""
        return np.ones(dims, np.float32)

    def plain_norm(self, name: str, dims: int) -> np.ndarray:
        """See `Source`."""
        return np.ones(dims, np.float32)

    def matrix(self, name: str, rows: int, cols: int, rotary: bool = False) -> Weight:
        """See `Source`. Layers do not share bytes: a shared matrix would stay in the cache."""
        table = name in ("model.embed_tokens", "lm_head")
        return self._allocated(rows, cols, "bf16" if table and self._format == "nf4" else None)

    def experts(self, name: str, count: int, rows: int, cols: int) -> WeightStack:
        """See `Source`."""
        format = "bf16" if self._format == "nf4" else None
        return WeightStack([self._allocated(rows, cols, format) for _ in range(count)])

    def ignore(self, names: Iterable[str]) -> None:
        """There is nothing to ignore."""

    def refuse_missing_layers(self, layers: int) -> None:
        """None are missing."""

    def refuse_leftovers(self) -> None:
        """There are no leftovers."""

    @property
    def nbytes(self) -> int:
        """The bytes that `fill` writes."""
        return sum(weight.nbytes for weight, _ in self._unwritten)

    def fill(self) -> None:
        """Writes the matrices."""
        for weight, drawn in self._unwritten:
            _repeat(drawn.raw, weight.raw)
        self._unwritten = []

    def _allocated(self, rows: int, cols: int, format: str | None) -> Weight:
        """A matrix whose bytes are not written yet; as nf4, bitsandbytes' choice of layers."""
        drawn = self._drawn(rows, cols, format or self._format)
        raw = np.empty(rows * row_bytes(drawn.format, cols), np.uint8)
        weight = Weight(raw, drawn.format, (rows, cols), groups=_repeated(drawn, rows))
        self._unwritten.append((weight, drawn))
        return weight

    def _drawn(self, rows: int, cols: int, format: str) -> Weight:
        """Some rows of a matrix, enough for its values to differ; drawn once for each size."""
        rows = min(rows, max(_DRAWN // cols, 1))
        key = format, rows, cols
        if key not in self._rows:
            self._rows[key] = _random_rows(rows, cols, format)
        return self._rows[key]


def _random_rows(rows: int, cols: int, format: str) -> Weight:
    rng, size = np.random.default_rng(0), np.float32(np.sqrt(cols))
    if format not in _SCALES:
        return Weight.quantize(rng.standard_normal((rows, cols), dtype=np.float32) / size, format)
    raw = rng.integers(0, 256, rows * row_bytes(format, cols), np.uint8)
    blocks = raw.reshape(-1, FORMATS[format].bytes)
    places, scale = _SCALES[format]
    for at in places:
        blocks[:, at : at + 2] = np.array([scale / size], "<f2").view(np.uint8)
    if format == "mxfp4":
        blocks[:, 0] = 128 + round(math.log2(scale / size))
    return Weight(raw, format, (rows, cols))


def _repeat(values: np.ndarray, to: np.ndarray) -> None:
    """Writes `values` to `to` as often as they fit, without a temporary of its size."""
    for begin in range(0, len(to), len(values)):
        part = to[begin : begin + len(values)]
        part[:] = values[: len(part)]


def _repeated(drawn: Weight, rows: int) -> Groups | None:
    """The groups of a matrix of so many rows that repeats the rows of `drawn`."""
    if drawn.groups is None:
        return None
    times = -(-rows // drawn.shape[0])

    def repeated(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.tile(array, times)

    g = drawn.groups
    scales = np.tile(g.scales, times)
    return g._replace(scales=scales, offsets=repeated(g.offsets), nested=repeated(g.nested))


def random_model(config: ModelConfig = SMALL, format: str = "f32") -> Model:
    """A model of this shape with its matrices in `format` and frozen parameters; always the same.

    Each matrix is made in `format`, so no float32 model is needed first. As in bitsandbytes, nf4
    is for linear layers: embeddings, heads and experts are bf16.

    Raises ValueError for an unknown format, for one whose groups do not divide the sizes, and for
    weights that do not fit into the free memory.
    """
    source = RandomSource(format)
    model = build_model(config, source)
    needed, free = source.nbytes, free_memory()
    if free is not None and needed > free:
        smaller = "" if format not in FLOATS else "; 4 bits (q4_1) need less"
        raise ValueError(
            f"random weights of this shape need {size_text(needed)} as {type_name(format)}, and "
            f"{size_text(free)} of memory are free{smaller}"
        )
    source.fill()
    return model


def shape_of(place: Path) -> tuple[ModelConfig, str]:
    """The shape of a model without its weights, and the format that most of them have.

    `place` is a config.json, a Hugging Face folder that may lack weights, or a GGUF file. The
    format is f32, f16 or bf16 as in the configuration (bf16 where it does not say), or that of its
    quantization.

    Raises FileNotFoundError, FormatError for a malformed file, ValueError for unsupported options.
    """
    if place.suffix != ".json" and not place.is_dir():
        model = read_model(place)[0]
        sizes: dict[str, int] = {}
        for weight in model.stored().values():
            sizes[weight.format] = sizes.get(weight.format, 0) + weight.nbytes
        return model.config, max(sizes, key=sizes.__getitem__)
    file = config_file_of(place) if place.is_dir() else place
    config, content = ModelConfig.from_hf(file), read_json(file)
    quantization = Quantization.read(file)
    if quantization.bits():
        return config, f"affine{quantization.bits()}"
    if quantization.method == "bitsandbytes":
        return config, "nf4"
    dtype = content.get("dtype", content.get("torch_dtype"))
    return config, DTYPES.get(dtype, "bf16") if isinstance(dtype, str) else "bf16"


def type_name(format: str) -> str:
    """The name of a format in `STORED_TYPES`."""
    return next(name for name, stored in STORED_TYPES.items() if stored == format)


def lacks_weights(place: Path) -> bool:
    """Whether this is a config.json, or a folder that has one but no weights."""
    if place.is_dir():
        return (place / "config.json").exists() and not any(place.glob("*.safetensors"))
    return place.suffix == ".json"
