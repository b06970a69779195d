"""Gradients of a model's parameters against slopes along random directions, in float64."""

import numpy as np

from pyloss import nn
from pyloss.autograd.scope import no_grad
from pyloss.autograd.tape import Tape
from pyloss.autograd.tensor import stripped

STEP = 1e-6


def gradient_error(net, tokens, offsets, directions=2):
    """The largest |gradient along a direction - central difference| / (1 + |difference|), of the
    mean square of the logits.

    Each array is moved by itself, along directions with a standard normal number for each entry, so
    that a wrong entry shows whatever the others are. `pyloss.gradcheck` moves each entry by itself,
    which takes thousands of steps.
    """
    wide = {name: np.array(x, np.float64) for name, x in net.trainable_parameters().items()}
    by_array = {id(x): wide[name] for name, x in net.trainable_parameters().items()}

    def loss():
        return (net.head(net.hidden(tokens, offsets)) ** 2).mean()

    rng, worst = np.random.default_rng(0), 0.0
    with nn.shown(net.trained_attributes(), by_array):
        tape = Tape()
        with tape:
            watched = {name: tape.watch(x) for name, x in wide.items()}
            tape.backward(loss(), np.ones((), np.float64))
        for name, array in wide.items():
            gradient, before = watched[name].grad, array.copy()
            for _ in range(directions):
                direction, values = rng.standard_normal(array.shape), []
                for step in (STEP, -STEP):
                    array[...] = before + step * direction
                    with no_grad():
                        values.append(float(np.asarray(stripped(loss()))))
                array[...] = before
                slope = 0.0 if gradient is None else float(np.sum(gradient * direction))
                difference = (values[0] - values[1]) / (2 * STEP)
                worst = max(worst, abs(slope - difference) / (1 + abs(difference)))
    return worst
