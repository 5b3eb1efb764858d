"""Log-probabilities of labels without a float32 copy of the logits. Imports torch."""

from __future__ import annotations

import numpy as np
import torch

# Elements of logits that are widened at a time: 256 MB in float32.
_CHUNK = 1 << 26


def _chunks(rows: int, vocabulary: int):
    step = max(1, _CHUNK // max(1, vocabulary))
    return ((a, min(a + step, rows)) for a in range(0, rows, step))


class LabelLogProbs(torch.autograd.Function):
    """log softmax(logits[positions])[ids]; positions may repeat and do not decrease.

    ``host_positions`` are the positions in numpy: which labels a chunk of logits has is then known
    without a synchronisation.
    """

    @staticmethod
    def forward(ctx, logits, positions, ids, host_positions):
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        lse = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
        for a, b in _chunks(*logits.shape):
            lse[a:b] = logits[a:b].to(wide).logsumexp(-1)
        ctx.save_for_backward(logits, positions, ids, lse)
        ctx.host_positions = host_positions
        return logits[positions, ids].to(wide) - lse[positions]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        logits, positions, ids, lse = ctx.saved_tensors
        sums = torch.zeros_like(lse).index_put_((positions,), dout, accumulate=True)
        dlogits = torch.empty_like(logits)
        for a, b in _chunks(*logits.shape):  # differences have the type of lse
            first, last = np.searchsorted(ctx.host_positions, (a, b)).tolist()
            part = (logits[a:b] - lse[a:b, None]).exp_().mul_(-sums[a:b, None])
            # Added before rounding to logits' type: for a likely label the two terms cancel.
            at = positions[first:last] - a, ids[first:last]
            dlogits[a:b] = part.index_put_(at, dout[first:last], accumulate=True)
        return dlogits, None, None, None
