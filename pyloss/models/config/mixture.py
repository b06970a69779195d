"""`Mixture`: the part of a configuration that says where experts stand in the place of MLPs, read from either format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyloss.checks.numbers import shown
from pyloss.errors import FormatError
from pyloss.models.config.families import Family

if TYPE_CHECKING:
    from pyloss.models.config.values import Values


@dataclass
class Mixture:
    """Experts in the layers that are not `dense_layers`: each token visits `active` of `count`, of this inner `size`.

    The weight of a visit is its share in the softmax over all experts, divided with `normalise` by the sum over the token's.

    Raises ValueError for numbers that don't fit together.
    """

    count: int
    active: int
    size: int
    normalise: bool
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1 or not 1 <= self.active <= self.count:
            raise ValueError(
                f"a token cannot visit {self.active} of {self.count} experts of size {self.size}"
            )

    def to_hf(self, family: Family) -> dict[str, Any]:
        """The keys of config.json: transformers' and mlx-lm's, old and new."""
        assert family.experts is not None
        content: dict[str, Any] = {
            "num_experts_per_tok": self.active,
            "num_local_experts": self.count,
        }
        if family.experts.normalise is None:
            content |= {"num_experts": self.count, "norm_topk_prob": self.normalise}
        if family.experts.own_size:
            content |= {
                "moe_intermediate_size": self.size,
                "mlp_only_layers": list(self.dense_layers),
                "decoder_sparse_step": 1,
            }
        return content

    def to_gguf(self, family: Family) -> dict[str, Any]:
        """The metadata, without the architecture's name. Raises ValueError for dense layers, which GGUF has no place for."""
        assert family.experts is not None
        if self.dense_layers:
            raise ValueError(
                f"GGUF has experts in all layers of {family.gguf}; here layers {list(self.dense_layers)} have none"
            )
        if self.normalise != family.experts.gguf_normalise:
            word = "normalised" if family.experts.gguf_normalise else "not normalised"
            raise ValueError(
                f"GGUF's {family.gguf} has expert weights that are {word}; norm_topk_prob is {self.normalise}"
            )
        own = {"expert_feed_forward_length": self.size} if family.experts.own_size else {}
        return {"expert_count": self.count, "expert_used_count": self.active, **own}


def read_hf_mixture(
    path: str | os.PathLike[str], read: Values, family: Family, inner: int, layers: int
) -> Mixture | None:
    """The mixture of a config.json; None for a family without experts. `inner` is its intermediate_size.

    Raises ValueError for an option that would change results, FormatError for what is missing or of a wrong type.
    """
    experts = family.experts
    if experts is None:
        return None
    defaults = family.defaults
    # transformers 5 writes num_local_experts for all of them.
    count = read.get(
        "num_experts", int, read.get("num_local_experts", int, defaults["num_experts"])
    )
    normalise = (
        experts.normalise
        if experts.normalise is not None
        else read.get("norm_topk_prob", bool, False)
    )
    dense: list[int] = []
    if experts.own_size:
        inner = read.get("moe_intermediate_size", int, defaults["moe_intermediate_size"])
        step, only = read.get("decoder_sparse_step", int, 1), read.get("mlp_only_layers", list, [])
        if step < 1:
            raise ValueError(f"{path}: decoder_sparse_step must be at least 1, got {step}")
        if not all(type(i) is int for i in only):
            raise FormatError(
                path, "mlp_only_layers", f"expected a list of layers, got {shown(only)}"
            )
        only = set(only)
        dense = [i for i in range(layers) if i in only or (i + 1) % step]
    active = read.get("num_experts_per_tok", int, defaults["num_experts_per_tok"])
    return _checked(path, count, active, inner, normalise, tuple(dense))


def read_gguf_mixture(
    path: str | os.PathLike[str], arch: str, read: Values, family: Family, inner: int
) -> Mixture | None:
    """The same of a GGUF file's metadata."""
    experts = family.experts
    if experts is None:
        return None
    normalise = read.get(f"{arch}.expert_weights_norm", bool, experts.gguf_normalise)
    if experts.own_size:
        inner = read.get(f"{arch}.expert_feed_forward_length", int)
    return _checked(
        path,
        read.get(f"{arch}.expert_count", int),
        read.get(f"{arch}.expert_used_count", int),
        inner,
        normalise,
    )


def _checked(path: str | os.PathLike[str], *values: Any) -> Mixture:
    try:
        return Mixture(*values)
    except ValueError as error:
        raise FormatError(path, None, str(error)) from None
