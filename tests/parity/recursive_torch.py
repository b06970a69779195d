"""HRM and TRM in PyTorch, from the papers and the authors' names of parameters, for comparisons."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Holder(nn.Module):
    """A module of parameters by dotted names, drawn at random."""

    def __init__(self, shapes, seed, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.names = {name.replace(".", "/"): name for name in shapes}
        for key, name in self.names.items():
            shape = shapes[name]
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(key, nn.Parameter((drawn * shape[-1] ** -0.5).to(dtype)))

    def __getitem__(self, name):
        return getattr(self, name.replace(".", "/"))

    def arrays(self):
        return {
            name: getattr(self, key).detach().numpy().copy() for key, name in self.names.items()
        }

    def gradients(self):
        return {
            name: p.grad.numpy()
            for key, name in self.names.items()
            if (p := getattr(self, key)).grad is not None
        }


def shapes_of(c, kind):
    """The authors' names and shapes for a configuration."""
    size, inner = c.hidden_size, c.inner_size(c.hidden_size)
    found = {"embed_tokens.embedding_weight": (c.vocab_size, size)}
    found |= {"lm_head.weight": (c.vocab_size, size), "H_init": (size,), "L_init": (size,)}
    found |= {"q_head.weight": (2, size), "q_head.bias": (2,)}
    if c.puzzle_emb_ndim:
        found["puzzle_emb.weights"] = (c.num_puzzle_identifiers, c.puzzle_emb_ndim)
    if c.pos_encodings == "learned":
        found["embed_pos.embedding_weight"] = (c.tokens, size)
    levels = {"L_level": c.L_layers} | ({"H_level": c.H_layers} if kind == "hrm" else {})
    for level, count in levels.items():
        for i in range(count):
            at = f"{level}.layers.{i}"
            mlps = {"mlp": (size, inner)}
            if c.mlp_t:
                mlps["mlp_t"] = c.tokens, c.inner_size(c.tokens)
            else:
                found[f"{at}.self_attn.qkv_proj.weight"] = (3 * size, size)
                found[f"{at}.self_attn.o_proj.weight"] = (size, size)
            for name, (dims, own) in mlps.items():
                found[f"{at}.{name}.gate_up_proj.weight"] = (2 * own, dims)
                found[f"{at}.{name}.down_proj.weight"] = (dims, own)
    return {f"model.inner.{name}": shape for name, shape in found.items()}


class Recursive:
    """A step of either model, and its loss, as in the authors' training code."""

    def __init__(self, config, kind, seed=0, dtype=torch.float32):
        self.c, self.kind, self.dtype = config, kind, dtype
        self.p = Holder(shapes_of(config, kind), seed, dtype)
        rates = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)  # fmt: skip
        angles = torch.outer(torch.arange(config.tokens, dtype=torch.float64), rates)
        self.cos, self.sin = (
            torch.cat([f(angles)] * 2, -1).to(dtype)[None, :, None] for f in (torch.cos, torch.sin)
        )

    def __getitem__(self, name):
        return self.p[f"model.inner.{name}"]

    def norm(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.c.rms_norm_eps)

    def mlp(self, x, at):
        gate, up = F.linear(x, self[f"{at}.gate_up_proj.weight"]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self[f"{at}.down_proj.weight"])

    def attention(self, x, at):
        c = self.c
        qkv = F.linear(x, self[f"{at}.qkv_proj.weight"]).view(*x.shape[:2], 3, c.num_heads, -1)
        q, k, v = qkv.unbind(2)
        if c.pos_encodings == "rope":
            q, k = (
                y * self.cos + torch.cat([-y[..., c.head_dim // 2 :], y[..., : c.head_dim // 2]], -1) * self.sin
                for y in (q, k)
            )  # fmt: skip
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return F.linear(y.transpose(1, 2).flatten(2), self[f"{at}.o_proj.weight"])

    def level(self, name, z, injection):
        z = z + injection
        for i in range(getattr(self.c, f"{name[0]}_layers")):
            at = f"{name}.layers.{i}"
            if self.c.mlp_t:
                turned = z.transpose(1, 2)
                z = self.norm(turned + self.mlp(turned, f"{at}.mlp_t")).transpose(1, 2)
            else:
                z = self.norm(z + self.attention(z, f"{at}.self_attn"))
            z = self.norm(z + self.mlp(z, f"{at}.mlp"))
        return z

    def inner(self, z_h, z_l, data):
        c = self.c
        x = F.embedding(data["inputs"], self["embed_tokens.embedding_weight"])
        if c.puzzle_emb_ndim:
            rows = self["puzzle_emb.weights"][data["puzzle_identifiers"]]
            rows = F.pad(rows, (0, c.puzzle_tokens * c.hidden_size - c.puzzle_emb_ndim))
            x = torch.cat([rows.view(len(rows), -1, c.hidden_size), x], 1)
        if c.pos_encodings == "learned":
            x = 0.707106781 * (x + self["embed_pos.embedding_weight"])
        x = math.sqrt(c.hidden_size) * x
        high = "H_level" if self.kind == "hrm" else "L_level"
        runs = [(step, run) for step in range(c.H_cycles) for run in (*range(c.L_cycles), "high")]
        for place, (step, run) in enumerate(runs):
            recorded = place >= len(runs) - 2 if self.kind == "hrm" else step == c.H_cycles - 1
            with torch.set_grad_enabled(recorded and torch.is_grad_enabled()):
                if run == "high":
                    z_h = self.level(high, z_h, z_l)
                else:
                    z_l = self.level("L_level", z_l, z_h + x)
        q = F.linear(z_h[:, 0], self["q_head.weight"], self["q_head.bias"])
        logits = F.linear(z_h, self["lm_head.weight"])[:, c.puzzle_tokens :]
        return z_h, z_l, logits, q[:, 0], q[:, 1]

    def begin(self, batch):
        count = len(batch["inputs"])
        state = torch.zeros(2, count, self.c.tokens, self.c.hidden_size, dtype=self.dtype)
        return {"z": state, "steps": torch.zeros(count, dtype=torch.long), "halted": torch.ones(count, dtype=torch.bool), "data": {k: torch.zeros_like(v) for k, v in batch.items()}}  # fmt: skip

    def step(self, carry, batch, least=0):
        """The next carry and the loss; no sequence halts before `least` steps (exploration)."""
        fresh, c = carry["halted"], self.c
        where = fresh[:, None, None]
        z_h, z_l = (
            torch.where(where, first.detach(), z)
            for first, z in zip((self["H_init"], self["L_init"]), carry["z"], strict=True)
        )
        data = {
            k: torch.where(fresh.view(-1, *[1] * (v.ndim - 1)), batch[k], v)
            for k, v in carry["data"].items()
        }
        z_h, z_l, logits, halt, go_on = self.inner(z_h, z_l, data)
        steps = torch.where(fresh, 0, carry["steps"]) + 1
        last = steps >= c.halt_max_steps
        compared = self.kind == "hrm" or not c.no_ACT_continue
        halted = (last | (halt > (go_on if compared else 0))) & (steps >= least)
        labels = data["labels"]
        mask = labels != -100
        counts = mask.sum(-1)
        right = (mask & (logits.argmax(-1) == labels)).sum(-1) == counts
        wide = logits.double()  # before 1 - logits: in bfloat16 it is often 0
        s = torch.where(wide < 0, 1 / (1 - wide + 1e-30), wide + 1)
        picked = torch.log(s / s.sum(-1, keepdim=True)).gather(-1, labels.clamp_min(0)[..., None])
        tokens = -torch.where(mask, picked[..., 0], 0)
        loss = (tokens / counts.clamp_min(1)[:, None]).sum()
        q_loss = F.binary_cross_entropy_with_logits(halt, right.to(halt.dtype), reduction="sum")
        if compared:
            with torch.no_grad():
                *_, next_halt, next_on = self.inner(z_h.detach(), z_l.detach(), data)
                target = torch.sigmoid(
                    torch.where(last, next_halt, torch.maximum(next_halt, next_on))
                )
            q_loss = q_loss + F.binary_cross_entropy_with_logits(go_on, target, reduction="sum")
        z = torch.stack([z_h.detach(), z_l.detach()])
        return {"z": z, "steps": steps, "halted": halted, "data": data}, loss + 0.5 * q_loss


def as_torch(batch):
    return {k: torch.from_numpy(np.asarray(v)).long() for k, v in batch.items()}
