"""How far a head looks: the mean distance from a query to what it reads."""

import torch
from torch import Tensor

from glocal.aggregation import Aggregation


def mean_distance(aggregation: Aggregation) -> Tensor:
    """Mean distance from each query to its sources, in tokens of the query grid: [B|1, G|1, N].

    Sources count by the size of their weight, slots of the same source together. What has no place (class tokens,
    tokens of another sequence) is left out; a query without a place, or with no weight on anything that has one, is
    NaN. Any weights, of either sign.

    Cost: N*M distances where the weights are dense, one for each slot where they are not.
    """
    a = aggregation.coalesce()
    places, sources = a.query_positions, a.source_positions
    if a.index is None:
        size = a.weights.abs().expand(-1, -1, a.num_queries, -1)
        away = (places[:, None] - sources[None]).norm(dim=-1)  # [N, M]
    else:
        size, index = torch.broadcast_tensors(a.weights.abs(), a.index)  # 0 in slots outside: `coalesce` sees to it
        away = (places[:, None] - sources[index.clamp(min=0)]).norm(dim=-1)
    away = away.to(size.dtype)
    placed = ~away.isnan()
    size = size * placed
    return (size * away.nan_to_num()).sum(-1) / size.sum(-1)  # 0 / 0 is NaN, as it should be
