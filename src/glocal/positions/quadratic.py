"""The quadratic encoding of offsets: attention to a place as a product of two short vectors."""

import torch
from torch import Tensor


def quadratic_encoding(offsets: Tensor) -> Tensor:
    """The encoding r = (|d|^2, d) of offsets d = source - query: [..., rank] -> [..., 1 + rank].

    Times the vector of a head, `quadratic_head`, it is the score -alpha * (|d|^2 - 2 <d, c>), which differs by a
    constant from -alpha * |d - c|^2, so its softmax looks at the place c away from the query, the sharper the larger
    alpha: `offsets = grid_offsets((H, W))`, then `scores = quadratic_encoding(offsets) @ quadratic_head(c, alpha)`.
    `QuadraticAttention` is the operator that learns c and alpha.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584, the quadratic encoding of theorem 1.
    Differs from the paper: nothing; any rank.
    """
    return torch.cat([offsets.square().sum(-1, keepdim=True), offsets], -1)


def quadratic_head(centre: Tensor, alpha: Tensor | float) -> Tensor:
    """The vector v = -alpha * (1, -2 c) of a head that looks at c: [..., rank], [...] -> [..., 1 + rank].

    Args:
        centre: c, in tokens, row before column; source minus query.
        alpha: how sharply; the released code's spread^2 / 2. In float32, 20 is exact to rounding.
    """
    alpha = torch.as_tensor(alpha, dtype=centre.dtype, device=centre.device)[..., None]
    return torch.cat([-alpha.expand(*centre.shape[:-1], 1), 2 * alpha * centre], -1)
