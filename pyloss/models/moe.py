"""Mixtures of experts: the block that stands in the place of the MLP, under mlx-lm's names."""

from __future__ import annotations

from typing import Any

from pyloss import ops
from pyloss.nn import Linear, Module, SwitchLinear


class SwitchGLU(Module):
    """down(silu(gate(x)) * up(x)) of the experts that each token visits."""

    def __init__(self, gate_proj: SwitchLinear, up_proj: SwitchLinear, down_proj: SwitchLinear):
        super().__init__()
        if down_proj.bias is not None:
            raise ValueError(
                "down_proj of experts must be without a bias, which the weights of visits would pass over"
            )
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def __call__(self, x: Any, routing: ops.Routing, weights: Any) -> Any:
        """x [N, hidden] -> the sum of its visits' results, each times its weight ([M], as `ops.route` gives them)."""
        rows = ops.dispatch(x, routing)
        inner = ops.swiglu(
            self.gate_proj(rows, routing.offsets), self.up_proj(rows, routing.offsets)
        )
        # Weighted before the last product, which is linear: its wide results need not be kept for the weights' gradient.
        return ops.combine(self.down_proj(ops.scale_rows(inner, weights), routing.offsets), routing)


class SparseMoe(Module):
    """A router, `gate`, and the experts: each token visits the `k` of its largest logits.

    A visit's weight is its share in the softmax over all experts, or with `normalize` over the token's k.
    """

    def __init__(self, gate: Linear, switch_mlp: SwitchGLU, k: int, normalize: bool):
        super().__init__()
        self.gate, self.switch_mlp = gate, switch_mlp
        self._k, self._normalize = k, normalize

    def __call__(self, x: Any) -> Any:
        routing, weights = ops.route(self.gate(x), self._k, self._normalize)
        return self.switch_mlp(x, routing, weights)
