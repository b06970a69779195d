"""The losses: `public`, `pairs` and `sparse` over `rows`; `act`.

`head` computes their forms under output heads.
"""

from pyloss.losses.pairs import (
    cosine_loss,
    js_div_loss,
    kl_div_loss,
    linear_cosine,
    linear_js_div,
    linear_kl_div,
    linear_skew_kl_div,
    linear_tvd,
    skew_kl_div_loss,
    tvd_loss,
)
from pyloss.losses.public import (
    binary_cross_entropy_with_logits,
    compute_accuracy,
    focal_loss,
    linear_cross_entropy,
    log_stablemax,
    softmax_cross_entropy,
    stablemax,
    stablemax_cross_entropy,
)
from pyloss.losses.sparse import linear_sparse_distillation, sparse_distillation_loss

__all__ = [
    "binary_cross_entropy_with_logits",
    "compute_accuracy",
    "cosine_loss",
    "focal_loss",
    "js_div_loss",
    "kl_div_loss",
    "linear_cosine",
    "linear_cross_entropy",
    "linear_js_div",
    "linear_kl_div",
    "linear_skew_kl_div",
    "linear_sparse_distillation",
    "linear_tvd",
    "log_stablemax",
    "skew_kl_div_loss",
    "softmax_cross_entropy",
    "sparse_distillation_loss",
    "stablemax",
    "stablemax_cross_entropy",
    "tvd_loss",
]
