"""How much passes through an operator: the ranks of one image's Jacobian over positions, channels, and both.

Shape letters: N outputs, M inputs (positions of the grids), C channels in, E channels out.
"""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps  # times the matrix's length, relative to the largest: what is no singular value
PIVOT = 1e-12  # relative to the largest: larger than what rounding leaves of one that is zero
SQUARED = 1e-12  # of eigenvalues of a matrix times its transpose


def position_rank(found: Tensor) -> int:
    """How many positions' worth of numbers pass: the rank of [N, E, M, C] for each channel that passes, rounded up.

    A weighted sum over positions is one matrix [N, M] for each channel, and the number is their mean rank; 16 of 64
    where keys and values are pooled to 16, as in a pyramid vision transformer.
    """
    return -(-_rank(found.flatten(2).flatten(0, 1)) // channel_rank(found))


def channel_rank(found: Tensor) -> int:
    """How many channels pass: the rank over C of [N, E, M, C], or over E if that is less.

    Less than both in a bottleneck.
    """
    read, written = found.flatten(0, 2), found.transpose(1, 3).flatten(0, 2)
    return min(_rank_of_many(read), _rank_of_many(written))


def num_matrices(found: Tensor) -> int:
    """How many channel matrices all blocks [E, C] of [N, E, M, C] are combinations of.

    K*K for a dense convolution, at most the number of heads for attention, C*E for a linear layer over the image.
    """
    return _rank_of_many(found.transpose(1, 2).flatten(2).flatten(0, 1))


def _rank(matrix: Tensor) -> int:
    """Structural zeros only: the singular values of a softmax fall off steeply, but they do not vanish."""
    if matrix.shape[0] == matrix.shape[1]:  # a look that costs a tenth settles it where nothing is lost
        pivots = torch.linalg.lu_factor_ex(matrix)[0].diagonal().abs()
        if pivots.min() > PIVOT * pivots.max():
            return len(matrix)
    values = torch.linalg.svdvals(matrix)
    return int((values > max(matrix.shape) * EPS * values.max()).sum())


def _rank_of_many(rows: Tensor) -> int:
    """The rank of a matrix of many more rows than columns."""
    values = torch.linalg.eigvalsh(rows.mT @ rows)
    return int((values > SQUARED * values.max()).sum())
