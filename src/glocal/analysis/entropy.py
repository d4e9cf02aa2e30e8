"""How many sources share a head's weight: the entropy of a row."""

import torch
from torch import Tensor

from glocal.aggregation import Aggregation


def entropy(aggregation: Aggregation) -> Tensor:
    """Entropy of each query's weights in bits, 0 (one source) to log2(M) (all alike): [B|1, G|1, N].

    Of |w| / sum |w|, slots of the same source together; NaN where a query has no weight at all.
    """
    a = aggregation.coalesce()
    size = a.weights.abs().expand(-1, -1, a.num_queries, -1)
    share = size / size.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1) / torch.log(torch.tensor(2.0, dtype=share.dtype))
