"""mlx_lm.tuner.losses."""

from __future__ import annotations

from typing import Any

from pyloss.losses import js_div_loss as js, kl_div_loss as kl
from pyloss.mlx_lm.names import absent

__all__ = ["js_div_loss", "kl_div_loss"]

__getattr__ = absent(__name__)


def kl_div_loss(logits_q: Any, logits_p: Any) -> Any:
    """KL(P || Q) of each row, for logits [..., V]; the gradient goes to both."""
    return kl(logits_q, logits_p)


def js_div_loss(logits_q: Any, logits_p: Any) -> Any:
    """The Jensen-Shannon divergence of each row; the gradient goes to both."""
    return js(logits_q, logits_p)
