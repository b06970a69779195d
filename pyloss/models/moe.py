"""Mixtures of experts: the block in place of the MLP, under mlx-lm's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyloss import ops
from pyloss.nn import Linear, Module, SwitchLinear


def renamed(name: str) -> Any:
    """A property that is the attribute `name`: a family's own name of a module."""

    def get(self: Any) -> Any:
        return getattr(self, name)

    def put(self: Any, value: Any) -> None:
        setattr(self, name, value)

    return property(get, put)


class SwitchGLU(Module):
    """down(silu(gate(x)) * up(x)) of the experts that each token visits.

    `gated` is another function of gate(x) and up(x) in place of silu(gate(x)) * up(x).
    """

    recordable = True

    def __init__(
        self,
        gate_proj: SwitchLinear,
        up_proj: SwitchLinear,
        down_proj: SwitchLinear,
        gated: Callable[..., Any] = ops.swiglu,
    ):
        super().__init__()
        if down_proj.bias is not None:
            raise ValueError(
                "down_proj of experts must have no bias: the weights of visits would not scale it"
            )
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self._gated = gated

    def __call__(self, x: Any, routing: ops.Routing, weights: Any) -> Any:
        """x [N, hidden] -> for each row, the sum of its experts' results times `weights`.

        `routing` and `weights` [M] are those of `ops.route`.
        """
        rows = ops.dispatch(x, routing)
        inner = self._gated(
            self.gate_proj(rows, routing.offsets), self.up_proj(rows, routing.offsets)
        )
        # The last product is linear, so weights may be applied before it. Their gradient then needs
        # the narrow `inner`, not the product's wide results.
        return ops.combine(self.down_proj(ops.scale_rows(inner, weights), routing.offsets), routing)


class SparseMoe(Module):
    """A router, `gate`, and experts: each token visits the `k` experts of its largest logits.

    A visit's weight is its share in the softmax over all experts, or with `normalize` over these k.
    """

    recordable = True

    def __init__(self, gate: Linear | Router, switch_mlp: SwitchGLU, k: int, normalize: bool):
        super().__init__()
        self.gate, self.switch_mlp = gate, switch_mlp
        self._k, self._normalize = k, normalize

    def __call__(self, x: Any) -> Any:
        return self.switch_mlp(x, *self.route(self.gate(x)))

    def route(self, logits: Any) -> tuple[ops.Routing, Any]:
        """The visits of tokens by the router's logits [N, E], and the weights of the visits."""
        return ops.route(logits, self._k, self._normalize)


class Router(Module):
    """A router whose matrix is `layer`, as Granite's."""

    recordable = True

    def __init__(self, layer: Linear):
        super().__init__()
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        return self.layer(x)


class GraniteMoe(SparseMoe):
    """A `SparseMoe` under Granite's names."""

    recordable = True

    gate = renamed("router")


class SigmoidMoe(SparseMoe):
    """A `SparseMoe` whose shares are `factor` times the sigmoids of the router's logits, as LFM2's.

    `expert_bias` is added where experts are chosen, and only there. It is not trained.
    """

    recordable = True

    def __init__(
        self,
        gate: Linear,
        switch_mlp: SwitchGLU,
        k: int,
        normalize: bool,
        expert_bias: Any = None,
        factor: float = 1.0,
    ):
        super().__init__(gate, switch_mlp, k, normalize)
        self._factor = factor
        if expert_bias is not None:
            self.register_buffer("expert_bias", expert_bias)

    def route(self, logits: Any) -> tuple[ops.Routing, Any]:
        """See `SparseMoe`."""
        bias = getattr(self, "expert_bias", None)
        return ops.route_sigmoid(logits, self._k, self._normalize, bias, self._factor)


class SharedMoe(SparseMoe):
    """A `SparseMoe` and an MLP that every token visits, `shared_expert`.

    Its result is multiplied by the sigmoid of one number per token, `shared_expert_gate`.
    """

    recordable = True

    def __init__(
        self,
        gate: Linear,
        switch_mlp: SwitchGLU,
        k: int,
        normalize: bool,
        shared_expert: Module,
        shared_expert_gate: Linear,
    ):
        super().__init__(gate, switch_mlp, k, normalize)
        self.shared_expert, self.shared_expert_gate = shared_expert, shared_expert_gate

    def __call__(self, x: Any) -> Any:
        factors = ops.sigmoid(self.shared_expert_gate(x)).reshape(-1)
        shared = ops.scale_rows(self.shared_expert(x), factors)
        return ops.add(super().__call__(x), shared)
