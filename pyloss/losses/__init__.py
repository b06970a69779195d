"""The losses: `public` functions over `rows`, `head` for those under an output head, `act`."""

from pyloss.losses.public import (
    binary_cross_entropy_with_logits,
    compute_accuracy,
    focal_loss,
    js_div_loss,
    kl_div_loss,
    linear_cross_entropy,
    linear_js_div,
    linear_kl_div,
    log_stablemax,
    softmax_cross_entropy,
    stablemax,
    stablemax_cross_entropy,
)

__all__ = [
    "binary_cross_entropy_with_logits",
    "compute_accuracy",
    "focal_loss",
    "js_div_loss",
    "kl_div_loss",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "log_stablemax",
    "softmax_cross_entropy",
    "stablemax",
    "stablemax_cross_entropy",
]
