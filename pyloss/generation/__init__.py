"""Generation: of one sequence, and of many at a time."""

from pyloss.generation.batch import (
    BatchGenerator,
    BatchResponse,
    BatchStats,
    Completion,
    batch_generate,
)
from pyloss.generation.sampling import SamplingParams, make_sampler
from pyloss.generation.single import (
    GenerationStep,
    KeptTokens,
    generate,
    generate_tokens,
    stream_generate,
)

__all__ = [
    "BatchGenerator",
    "BatchResponse",
    "BatchStats",
    "Completion",
    "GenerationStep",
    "KeptTokens",
    "SamplingParams",
    "batch_generate",
    "generate",
    "generate_tokens",
    "make_sampler",
    "stream_generate",
]
