"""Helpers for the tests of the tape, of gradients and of checkpoints."""

import gc

import numpy as np

from pyloss import _core, nn


class Scale(nn.Module):
    """A module with one parameter, for the functions of a test."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def buffers():
    """Bytes in buffers of the core that are in use."""
    gc.collect()
    return _core.buffer_stats()["in_use"]


def numeric(f, x, step=1e-6):
    """Central differences of a scalar function of one float64 array."""
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        out[i] = (float(f(up)) - float(f(down))) / (2 * step)
    return out


class Trained(nn.Module):
    """A module of any attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def single(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)
