"""An importance matrix whose channels weigh by Fisher information.

llama-quantize minimizes squared errors weighted by channel, and takes the mean square of what enters a channel for its
weight: every token counts alike. The Fisher information's column sums count a token by how much it moves the output, so
what is minimized is what the plan predicts. On Gemma 3 270M, gradients of other labels see 1 to 2% less error in most
linears, 11% in ffn_down, 15% in keys and values; measured divergence at four sizes changed by -6, -2, -2 and +3%, each
known to 3%.
"""

from dataclasses import replace

import numpy as np

from gguf_mixed.fisher import Fisher
from gguf_mixed.imatrix import Imatrix, ImatrixEntry

# Part of the imatrix's own weights that stays: no channel that text has used counts for nothing.
_KEPT = 0.05


def weigh_imatrix(imatrix: Imatrix, fisher: Fisher) -> tuple[Imatrix, tuple[str, ...]]:
    """The imatrix with its weights redistributed among the channels of each matrix; means, counts and names stay.

    Returns:
        The new imatrix, and the entries left as they were: those that `fisher` does not cover, or in another shape.
        Experts that either never saw are left alone too, one by one.
    """
    entries: dict[str, ImatrixEntry] = {}
    unchanged = []
    for name, entry in imatrix.entries.items():
        found = fisher.marginals.get(name)
        if found is None or found.columns.shape != entry.sums.shape:
            entries[name] = entry
            unchanged.append(name)
        else:
            entries[name] = _weighed(entry, found.columns.astype(np.float64))
    return replace(imatrix, entries=entries), tuple(unchanged)


def _weighed(entry: ImatrixEntry, columns: np.ndarray) -> ImatrixEntry:
    sums = entry.sums.astype(np.float64)
    mean, total = sums.mean(axis=1, keepdims=True), columns.mean(axis=1, keepdims=True)
    usable = (mean > 0) & (total > 0)
    share = columns / np.where(usable, total, 1)
    mixed = (1 - _KEPT) * share * mean + _KEPT * sums
    return replace(entry, sums=np.where(usable, mixed, sums).astype(np.float32))
