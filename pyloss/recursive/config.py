"""The settings of a recursive model, under the names of the authors' YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pyloss.checks.numbers import real, shown, whole

#: more steps than a sequence ever takes: in evaluation all take `halt_max_steps`
MOST_STEPS = 10_000
POSITIONS = ("rope", "learned", "none")
#: Keys of the authors' files that change nothing here.
IGNORED = ("name", "loss", "forward_dtype", "causal")


@dataclass(frozen=True)
class RecursiveConfig:
    """The settings of `HRM` or `TRM`. Defaults are those of the authors' `trm.yaml`.

    Attributes:
        seq_len: tokens of a puzzle, T.
        vocab_size: V.
        batch_size: rows of a training batch; with puzzle embeddings a batch has just as many.
        num_puzzle_identifiers: rows of the table of puzzle embeddings.
        puzzle_emb_ndim: numbers of a puzzle's embedding; 0: there are none.
        puzzle_emb_len: tokens that it takes before the puzzle's, P; 0: as many as it fills. HRM
            always takes these.
        H_cycles, L_cycles: how often the high level runs in a step, and the low level before each.
        H_layers, L_layers: of the levels. TRM has one network of `L_layers` for both.
        hidden_size, num_heads: D, and the attention heads, which divide it.
        expansion: the MLP's inner size is 2/3 of expansion * D, rounded up to a multiple of 256.
        pos_encodings: "rope", "learned" or "none".
        mlp_t: TRM mixes tokens by an MLP over the T + P tokens in place of attention.
        no_ACT_continue: TRM halts where its logit to halt is above 0, and has no target for going
            on; otherwise, and in HRM, where it is above that of going on.
        halt_max_steps: a sequence halts after so many steps at the latest.
        halt_exploration_prob: the share of sequences that, while training, must go on for a drawn
            number of steps.

    Raises:
        ValueError: numbers out of range or that do not fit together; names the setting.
    """

    seq_len: int
    vocab_size: int
    batch_size: int = 1
    num_puzzle_identifiers: int = 1
    puzzle_emb_ndim: int = 0
    puzzle_emb_len: int = 0
    H_cycles: int = 3
    L_cycles: int = 6
    H_layers: int = 0
    L_layers: int = 2
    hidden_size: int = 512
    num_heads: int = 8
    expansion: float = 4.0
    pos_encodings: str = "rope"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    mlp_t: bool = False
    no_ACT_continue: bool = True
    halt_max_steps: int = 16
    halt_exploration_prob: float = 0.1

    def __post_init__(self) -> None:
        for name in ("seq_len", "vocab_size", "batch_size", "num_puzzle_identifiers"):
            whole(getattr(self, name), name, 1)
        for name in ("H_cycles", "L_cycles", "L_layers", "hidden_size", "num_heads"):
            whole(getattr(self, name), name, 1)
        for name in ("puzzle_emb_ndim", "puzzle_emb_len", "H_layers"):
            whole(getattr(self, name), name, 0)
        whole(self.halt_max_steps, "halt_max_steps", 1, MOST_STEPS)
        real(self.halt_exploration_prob, "halt_exploration_prob", 0, 1)
        for name in ("expansion", "rms_norm_eps", "rope_theta"):
            real(getattr(self, name), name, above=0)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}"
            )
        if self.pos_encodings not in POSITIONS:
            raise ValueError(
                f"pos_encodings must be one of {', '.join(POSITIONS)}, "
                f"not {shown(self.pos_encodings)}"
            )
        if self.pos_encodings == "rope" and self.head_dim % 2:
            raise ValueError(
                f"heads of {self.head_dim} have no rotary positions: "
                "hidden_size / num_heads must be even"
            )
        if self.puzzle_emb_ndim > self.puzzle_tokens * self.hidden_size:
            raise ValueError(
                f"puzzle_emb_ndim {self.puzzle_emb_ndim} does not fit into puzzle_emb_len "
                f"{self.puzzle_emb_len} tokens of {self.hidden_size}"
            )
        if self.puzzle_emb_len and not self.puzzle_emb_ndim:
            raise ValueError(f"puzzle_emb_len is {self.puzzle_emb_len}, and puzzle_emb_ndim 0")

    @classmethod
    def of(cls, settings: Mapping[str, Any], **more: Any) -> RecursiveConfig:
        """From a mapping such as the authors' YAML has; `more` replaces its keys.

        A puzzle_emb_ndim of "${.hidden_size}" is hidden_size. ValueError for unknown keys.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(
                f"settings must be a mapping from their names to values, got {shown(settings)}"
            )
        given = {k: v for k, v in {**settings, **more}.items() if k not in IGNORED}
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(
                f"unknown settings: {', '.join(map(str, unknown))}; known: {', '.join(known)}"
            )
        if given.get("puzzle_emb_ndim") == "${.hidden_size}":
            given["puzzle_emb_ndim"] = given.get("hidden_size", cls.hidden_size)
        if missing := [name for name in ("seq_len", "vocab_size") if name not in given]:
            raise ValueError(f"the settings lack {' and '.join(missing)}")
        return cls(**given)

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def puzzle_tokens(self) -> int:
        """P, the tokens before those of the puzzle."""
        return self.puzzle_emb_len or -(self.puzzle_emb_ndim // -self.hidden_size)

    @property
    def tokens(self) -> int:
        """T + P."""
        return self.seq_len + self.puzzle_tokens

    def inner_size(self, size: int) -> int:
        """The inner size of an MLP over `size` numbers."""
        return -(round(self.expansion * size * 2 / 3) // -256) * 256
