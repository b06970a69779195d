"""`Mixture`: experts in place of MLPs, read from either format and written to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyloss.checks.numbers import real, shown
from pyloss.models.config.families import Experts, Family
from pyloss.models.config.values import Values, checked

#: expert_gating_func in GGUF where weights are sigmoids.
GGUF_SIGMOID = 2


@dataclass
class Mixture:
    """The experts of a model. Each token visits some of them.

    The weight of a visit is its share in the softmax over all experts, or the sigmoid of its logit,
    depending on the family.

    Attributes:
        count: experts of a layer.
        active: experts that a token visits.
        size: an expert's inner size.
        normalize: the weights of a token's visits are divided by their sum.
        dense_layers: the layers that have an MLP.
        bias: a number per expert is added where experts are chosen.
        scaling: weights are multiplied by it.
        shared_size: the inner size of a further expert, which every token visits; 0: there is none.

    Raises:
        ValueError: numbers that do not fit together.
    """

    count: int
    active: int
    size: int
    normalize: bool
    dense_layers: tuple[int, ...] = ()
    shared_size: int = 0
    bias: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1 or not 1 <= self.active <= self.count:
            raise ValueError(
                f"a token cannot visit {self.active} of {self.count} experts of size {self.size}"
            )
        real(self.scaling, "routed_scaling_factor", above=0)
        if self.shared_size < 0:
            raise ValueError(f"a shared expert cannot have the size {self.shared_size}")

    @property
    def width(self) -> int:
        """The inner size of all experts of a token together."""
        return self.active * self.size + self.shared_size

    def to_hf(self, family: Family) -> dict[str, Any]:
        """The keys of config.json: transformers' and mlx-lm's, old and new."""
        assert family.experts is not None
        content: dict[str, Any] = {
            "num_experts_per_tok": self.active,
            "num_local_experts": self.count,
        }
        if family.experts.normalize is None:
            content["norm_topk_prob"] = self.normalize
        if family.experts.own_size or family.experts.normalize is None:
            content["num_experts"] = self.count
        if family.experts.shared:
            content[family.experts.shared] = self.shared_size
        if family.experts.own_size:
            content["moe_intermediate_size"] = self.size
        if family.experts.sigmoid:
            content |= {
                "num_dense_layers": len(self.dense_layers),
                "use_expert_bias": self.bias,
                "routed_scaling_factor": self.scaling,
            }
        elif family.experts.own_size:
            content |= {
                "mlp_only_layers": list(self.dense_layers),
                "decoder_sparse_step": 1,
            }
        return content

    def to_gguf(self, family: Family) -> dict[str, Any]:
        """The metadata, without the architecture's name.

        Raises ValueError for dense layers or weights that GGUF cannot describe.
        """
        assert family.experts is not None
        if self.dense_layers and not family.experts.sigmoid:
            raise ValueError(
                f"GGUF has experts in all layers of {family.gguf}; "
                f"here layers {list(self.dense_layers)} have none"
            )
        if self.normalize != family.experts.gguf_normalize:
            word = "normalized" if family.experts.gguf_normalize else "not normalized"
            raise ValueError(
                f"GGUF's {family.gguf} has expert weights that are {word}; "
                f"norm_topk_prob is {self.normalize}"
            )
        own = {"expert_feed_forward_length": self.size} if family.experts.own_size else {}
        if self.shared_size:
            own["expert_shared_feed_forward_length"] = self.shared_size
        if family.experts.sigmoid:
            if not self.bias or self.scaling != 1:
                raise ValueError(
                    f"GGUF's {family.gguf} has use_expert_bias true and routed_scaling_factor 1; "
                    f"here they are {shown(self.bias)} and {self.scaling:g}"
                )
            own["leading_dense_block_count"] = len(self.dense_layers)
            own["expert_gating_func"] = GGUF_SIGMOID
        return {"expert_count": self.count, "expert_used_count": self.active, **own}


def read_hf_mixture(read: Values, family: Family) -> Mixture | None:
    """The mixture of a config.json; None for a family without experts.

    Raises ValueError for an option that would change results, FormatError for numbers that do not
    fit together.
    """
    experts = family.experts
    if experts is None:
        return None
    size, dense = read["intermediate_size"], []
    options: dict[str, Any] = {}
    if experts.sigmoid:
        size, dense = read["moe_intermediate_size"], list(range(read["num_dense_layers"]))
        options = {"bias": read["use_expert_bias"], "scaling": read["routed_scaling_factor"]}
    elif experts.own_size:
        size, step = read["moe_intermediate_size"], read["decoder_sparse_step"]
        if step < 1:
            raise ValueError(f"{read.path}: decoder_sparse_step must be at least 1, got {step}")
        only = set(read["mlp_only_layers"])
        dense = [i for i in range(read["num_hidden_layers"]) if i in only or (i + 1) % step]
    # transformers 5 writes num_local_experts in all families.
    counts = (read["num_experts"], read["num_local_experts"], family.defaults["num_experts"])
    count = next(count for count in counts if count is not None)
    if count == 0 and family.gguf_dense is not None:
        return None
    return checked(
        read.path,
        Mixture,
        count=count,
        active=read["num_experts_per_tok"],
        size=size,
        normalize=read["norm_topk_prob"] if experts.normalize is None else experts.normalize,
        dense_layers=tuple(dense),
        **options,
        shared_size=read[experts.shared] if experts.shared else 0,
    )


def read_gguf_mixture(read: Values, family: Family) -> Mixture | None:
    """The mixture of a GGUF file's metadata; None for a family without experts."""
    experts = family.experts
    if experts is None or not read["expert_count"]:
        return None
    own = read["expert_weights_norm"]
    options: dict[str, Any] = {}
    if experts.sigmoid:
        if read["expert_gating_func"] != GGUF_SIGMOID:
            name = f"{read.prefix}expert_gating_func {read['expert_gating_func']}"
            raise read.unsupported(name, f"{GGUF_SIGMOID}, the sigmoid")
        dense = range(read["leading_dense_block_count"])
        options = {"bias": True, "dense_layers": tuple(dense)}
    return checked(
        read.path,
        Mixture,
        count=read["expert_count"],
        active=read["expert_used_count"],
        size=read["expert_feed_forward_length" if experts.own_size else "feed_forward_length"],
        normalize=experts.gguf_normalize if own is None else own,
        **options,
        shared_size=_gguf_shared_size(read, experts) if experts.shared else 0,
    )


def _gguf_shared_size(read: Values, experts: Experts) -> int:
    """As in llama.cpp: without the key, Qwen2-MoE's has an MLP's size, and Granite has none."""
    size: int | None = read["expert_shared_feed_forward_length"]
    if size is not None:
        return size
    return 0 if experts.fused else int(read["feed_forward_length"])
