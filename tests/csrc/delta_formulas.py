"""The gated delta rule and the scan in float64, step by step, with their gradients."""

import numpy as np


def delta_rule(q, k, v, g, beta, offsets, state, scale, eps, delta=1):
    """The results of all rows and the last states; also what `slopes` reads."""
    share, sequences = v.shape[1] // k.shape[1], len(offsets) - 1
    keys, queries = (np.repeat(x / _lengths(x, eps), share, 1) for x in (k, q))
    shape = sequences, v.shape[1], k.shape[2], v.shape[2]
    last = np.zeros(shape) if state is None else state.astype(np.float64)
    out, steps = np.zeros(v.shape), []
    for s in range(sequences):
        for t in range(offsets[s], offsets[s + 1]):
            decayed = np.exp(g[t])[:, None, None] * last[s]
            error = v[t] - delta * np.einsum("hd,hde->he", keys[t], decayed)
            update = beta[t][:, None] * error
            last[s] = decayed + keys[t][:, :, None] * update[:, None, :]
            out[t] = scale * np.einsum("hd,hde->he", queries[t], last[s])
            steps.append((decayed, error, update, last[s].copy()))
    return out, last, (keys, queries, steps)


def slopes(d_out, d_last, q, k, v, g, beta, offsets, state, scale, eps, delta=1):
    """Gradients by q, k, v, g, beta and the first states."""
    *_, seen = delta_rule(q, k, v, g, beta, offsets, state, scale, eps, delta)
    keys, queries, steps = seen
    dk, dq, dv, dg, dbeta = (np.zeros(x.shape) for x in (keys, queries, v, g, beta))
    shape = len(offsets) - 1, v.shape[1], k.shape[2], v.shape[2]
    first = np.zeros(shape) if d_last is None else d_last.astype(np.float64)
    for s in range(len(offsets) - 1):
        slope = first[s]
        for t in range(offsets[s + 1] - 1, offsets[s] - 1, -1):
            decayed, error, update, after = steps[t]
            dq[t] = scale * np.einsum("he,hde->hd", d_out[t], after)
            slope = slope + scale * queries[t][:, :, None] * d_out[t][:, None, :]
            d_update = np.einsum("hd,hde->he", keys[t], slope)
            dbeta[t] = (d_update * error).sum(-1)
            dv[t] = beta[t][:, None] * d_update
            dk[t] = np.einsum("he,hde->hd", update, slope)
            dk[t] -= delta * np.einsum("he,hde->hd", dv[t], decayed)
            slope = slope - delta * keys[t][:, :, None] * dv[t][:, None, :]
            dg[t] = (slope * decayed).sum((1, 2))
            slope = np.exp(g[t])[:, None, None] * slope
        first[s] = slope

    def of_given(x, slope):
        slope = slope.reshape(*x.shape[:2], slope.shape[1] // x.shape[1], x.shape[2]).sum(2)
        unit = x / _lengths(x, eps)
        along = 0 if eps < 0 else (unit * slope).sum(-1, keepdims=True)
        return (slope - unit * along) / _lengths(x, eps)

    return of_given(q, dq), of_given(k, dk), dv, dg, dbeta, first


def _lengths(x, eps):
    return 1.0 if eps < 0 else np.sqrt((x * x).sum(-1, keepdims=True) + eps)
