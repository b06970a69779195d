"""HRM and TRM: one step of refinement, and when each sequence halts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyloss import ops, random
from pyloss.autograd.scope import no_grad
from pyloss.autograd.tape import data
from pyloss.checks.arrays import as_array, as_integers
from pyloss.checks.numbers import shown
from pyloss.nn import Embedding, Linear, Module, init
from pyloss.recursive.blocks import Level, Places
from pyloss.recursive.carry import Carry, InnerCarry
from pyloss.recursive.config import RecursiveConfig
from pyloss.recursive.puzzles import PuzzleEmbedding

Q = tuple[Any, Any]


class Inner(Module):
    """Embeddings, levels and heads: one step from a state to the next, and its answer."""

    H_init: np.ndarray
    L_init: np.ndarray

    def __init__(self, config: RecursiveConfig, levels: Mapping[str, Level]):
        super().__init__()
        size = config.hidden_size
        self.config = config
        self._scale = math.sqrt(size)
        self.embed_tokens = Embedding.from_weight(
            init.trunc_normal((config.vocab_size, size), 1 / self._scale)
        )
        self.lm_head = Linear.from_weight(
            init.trunc_normal((config.vocab_size, size), 1 / self._scale)
        )
        # Almost 0, so that learning begins sooner.
        self.q_head = Linear.from_weight(
            np.zeros((2, size), np.float32), np.full(2, -5, np.float32)
        )
        if config.puzzle_emb_ndim:
            self.puzzle_emb = PuzzleEmbedding(
                config.num_puzzle_identifiers, config.puzzle_emb_ndim, config.batch_size
            )
        if config.pos_encodings == "learned":
            self.embed_pos = Embedding.from_weight(
                init.trunc_normal((config.tokens, size), 1 / self._scale)
            )
        for name, level in levels.items():
            setattr(self, name, level)
        for name in ("H_init", "L_init"):
            self.register_buffer(name, init.trunc_normal(size, 1.0))
        self._places: Places | None = None

    def places(self, batch: int) -> Places:
        """Those of a batch of so many sequences."""
        if self._places is None or self._places.shape[0] != batch:
            object.__setattr__(self, "_places", Places(batch, self.config))
        assert self._places is not None
        return self._places

    def input_embeddings(self, inputs: np.ndarray, puzzle_identifiers: Any) -> Any:
        """[B (P + T), D] of inputs [B, T]."""
        config, (batch, _) = self.config, inputs.shape
        size = config.hidden_size
        x = self.embed_tokens(inputs)
        if config.puzzle_emb_ndim:
            rows = self.puzzle_emb(puzzle_identifiers)
            missing = config.puzzle_tokens * size - config.puzzle_emb_ndim
            rows = np.pad(rows, ((0, 0), (0, missing))) if missing else rows
            x = np.concatenate([np.reshape(rows, (batch, -1, size)), x], 1)
        if config.pos_encodings == "learned":
            x = (x + self.embed_pos.weight) * np.float32(0.707106781)
        return ops.scale(np.reshape(x, (-1, size)), self._scale)

    def empty_carry(self, batch: int) -> InnerCarry:
        """States of `batch` sequences that no step has begun."""
        shape = batch, self.config.tokens, self.config.hidden_size
        return InnerCarry(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def reset_carry(self, halted: np.ndarray, carry: InnerCarry) -> InnerCarry:
        """The states, of halted sequences the first ones."""
        where = halted[:, None, None]
        return InnerCarry(
            np.where(where, self.H_init, carry.z_H), np.where(where, self.L_init, carry.z_L)
        )

    def __call__(self, carry: InnerCarry, batch: Mapping[str, Any]) -> tuple[InnerCarry, Any, Q]:
        """The next states, logits [B, T, V], and the logits [B] of halting and of going on."""
        config, (count, length, size) = self.config, carry.z_H.shape
        places = self.places(count)
        x = self.input_embeddings(batch["inputs"], batch.get("puzzle_identifiers"))
        z_h, z_l = (np.reshape(z, (-1, size)) for z in (carry.z_H, carry.z_L))
        z_h, z_l = self.recurse(z_h, z_l, x, places)
        states = InnerCarry(*(data(z).reshape(carry.z_H.shape) for z in (z_h, z_l)))
        whole = np.reshape(z_h, (count, length, size))
        answer = np.reshape(whole[:, config.puzzle_tokens :], (-1, size))
        logits = np.reshape(self.lm_head(answer), (count, config.seq_len, -1))
        q = self.q_head(whole[:, 0])
        return states, logits, (q[:, 0], q[:, 1])

    def recurse(self, z_h: Any, z_l: Any, x: Any, places: Places) -> tuple[Any, Any]:
        """Both states after a step, from the states before and the embedded input."""
        raise NotImplementedError


class HRMInner(Inner):
    """Two networks. Only the last run of each carries gradients."""

    H_level: Level
    L_level: Level

    def __init__(self, config: RecursiveConfig):
        levels = {name: Level(config, getattr(config, f"{name[0]}_layers")) for name in
                  ("H_level", "L_level")}  # fmt: skip
        super().__init__(config, levels)

    def recurse(self, z_h: Any, z_l: Any, x: Any, places: Places) -> tuple[Any, Any]:
        """See `Inner`."""
        config = self.config
        with no_grad():
            for high in range(config.H_cycles):
                last = high == config.H_cycles - 1
                for _ in range(config.L_cycles - last):
                    z_l = self.L_level(z_l, ops.add(z_h, data(x)), places)
                if not last:
                    z_h = self.H_level(z_h, z_l, places)
        z_l = self.L_level(z_l, ops.add(z_h, x), places)
        return self.H_level(z_h, z_l, places), z_l


class TRMInner(Inner):
    """One network for both levels. The whole last cycle carries gradients."""

    L_level: Level

    def __init__(self, config: RecursiveConfig):
        super().__init__(config, {"L_level": Level(config, config.L_layers, config.mlp_t)})

    def recurse(self, z_h: Any, z_l: Any, x: Any, places: Places) -> tuple[Any, Any]:
        """See `Inner`."""
        with no_grad():
            for _ in range(self.config.H_cycles - 1):
                z_h, z_l = self._cycle(z_h, z_l, data(x), places)
        return self._cycle(z_h, z_l, x, places)

    def _cycle(self, z_h: Any, z_l: Any, x: Any, places: Places) -> tuple[Any, Any]:
        for _ in range(self.config.L_cycles):
            z_l = self.L_level(z_l, ops.add(z_h, x), places)
        return self.L_level(z_h, z_l, places), z_l


class RecursiveModel(Module):
    """A step of adaptive computation: `model(carry=carry, batch=batch)` -> (new carry, outputs).

    `batch` has integers `inputs` [B, T] below V, `labels` [B, T] (-100 where nothing is predicted)
    and `puzzle_identifiers` [B] where the model has puzzle embeddings. `carry` begins as
    `initial_carry(batch)`; sequences that have halted are replaced by those of `batch`.

    `outputs` has `logits` [B, T, V], `q_halt_logits` and `q_continue_logits` [B], and while
    training, where going on is learned, `target_q_continue` [B]. In evaluation all sequences take
    `halt_max_steps` steps, so that a batch's sequences end together.
    """

    #: whether q_continue's loss is left out where no target is in the outputs, for `ACTLossHead`
    gives_own_targets = True
    inner: Inner

    def __init__(self, inner: Inner):
        super().__init__()
        self.config, self.inner = inner.config, inner

    @property
    def halt_max_steps(self) -> int:
        return self.config.halt_max_steps

    @property
    def puzzle_emb(self) -> PuzzleEmbedding:
        """AttributeError where the model has none."""
        return self.inner.puzzle_emb

    def initial_carry(self, batch: Mapping[str, Any]) -> Carry:
        """A carry whose sequences have halted, so that the first step takes those of `batch`."""
        taken = self._checked(batch)
        count = len(taken["inputs"])
        return Carry(
            self.inner.empty_carry(count),
            np.zeros(count, np.int32),
            np.ones(count, bool),
            {name: np.zeros_like(array) for name, array in taken.items()},
        )

    def _checked(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "a batch must be a mapping from names such as 'inputs' to arrays, got "
                f"{type(batch).__name__}"
            )
        if "inputs" not in batch:
            raise ValueError(f"a batch needs 'inputs', given: {', '.join(batch) or 'nothing'}")
        taken = {name: as_array(array, name) for name, array in batch.items()}
        inputs = taken["inputs"] = as_integers(taken["inputs"], "inputs")
        config = self.config
        if inputs.ndim != 2 or inputs.shape[1] != config.seq_len:
            raise ValueError(f"inputs must be [B, {config.seq_len}], got shape {inputs.shape}")
        if not len(inputs):
            raise ValueError("inputs has no rows; a batch needs at least one sequence")
        if not 0 <= inputs.min() <= inputs.max() < config.vocab_size:
            raise ValueError(
                f"inputs has tokens from {inputs.min()} to {inputs.max()}; the vocabulary has "
                f"{config.vocab_size}"
            )
        if config.puzzle_emb_ndim and "puzzle_identifiers" not in taken:
            raise ValueError("the model has puzzle embeddings: a batch needs 'puzzle_identifiers'")
        if wrong := [name for name, array in taken.items() if array.shape[:1] != inputs.shape[:1]]:
            shape = taken[wrong[0]].shape
            has = f"{shape[0]} rows" if shape else "no axis of rows"
            raise ValueError(f"{wrong[0]} has {has}, inputs {len(inputs)}")
        return taken

    def __call__(self, carry: Carry, batch: Mapping[str, Any]) -> tuple[Carry, dict[str, Any]]:
        if not isinstance(carry, Carry):
            raise TypeError(
                f"carry must be a Carry, as model.initial_carry(batch) gives, got {shown(carry)}"
            )
        taken, halted = self._checked(batch), carry.halted
        if set(taken) != set(carry.current_data) or len(halted) != len(taken["inputs"]):
            raise ValueError(
                f"the carry is of {len(halted)} sequences with {', '.join(carry.current_data)}; "
                f"the batch has {len(taken['inputs'])} with {', '.join(taken)}"
            )
        now = {
            name: np.where(halted.reshape(-1, *[1] * (old.ndim - 1)), taken[name], old)
            for name, old in carry.current_data.items()
        }
        before = self.inner.reset_carry(halted, carry.inner_carry)
        states, logits, (q_halt, q_continue) = self.inner(before, now)
        outputs = {"logits": logits, "q_halt_logits": q_halt, "q_continue_logits": q_continue}
        steps = np.where(halted, 0, carry.steps).astype(np.int32) + np.int32(1)
        last = steps >= self.config.halt_max_steps
        ends = last
        if self.training and self.config.halt_max_steps > 1:
            threshold = data(q_continue) if self.learns_to_continue else 0
            ends = (last | (data(q_halt) > threshold)) & (steps >= self._least_steps(len(steps)))
            if self.learns_to_continue:
                with no_grad():
                    *_, (halt, go_on) = self.inner(states, now)
                best = np.where(last, data(halt), np.maximum(data(halt), data(go_on)))
                outputs["target_q_continue"] = 1 / (1 + np.exp(-best))
        return Carry(states, steps, ends, now), outputs

    @property
    def learns_to_continue(self) -> bool:
        """Whether a sequence halts by comparing both q logits."""
        return True

    def _least_steps(self, count: int) -> np.ndarray:
        """The steps before which sequences must not halt: drawn for a share of them, else 0."""
        draws = random.generator()
        explores = draws.random(count) < self.config.halt_exploration_prob
        return np.where(explores, draws.integers(2, self.config.halt_max_steps + 1, count), 0)


class HRM(RecursiveModel):
    """The Hierarchical Reasoning Model (arXiv:2506.21734)."""

    def __init__(self, config: RecursiveConfig):
        if not config.H_layers:
            raise ValueError("HRM needs H_layers of at least 1")
        if config.mlp_t or config.pos_encodings == "none" or config.puzzle_emb_len:
            raise ValueError(
                "mlp_t, puzzle_emb_len and pos_encodings 'none' are settings of TRM, not of HRM"
            )
        super().__init__(HRMInner(config))


class TRM(RecursiveModel):
    """The Tiny Recursive Model (arXiv:2510.04871)."""

    def __init__(self, config: RecursiveConfig):
        super().__init__(TRMInner(config))

    @property
    def learns_to_continue(self) -> bool:
        """See `RecursiveModel`."""
        return not self.config.no_ACT_continue
