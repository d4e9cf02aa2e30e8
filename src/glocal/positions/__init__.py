"""Positions: how attention is told where its tokens are.

Attention by content alone does not know the order of its tokens. There are four ways to tell it, and every encoding
here goes with one of them, or with two:

Added at the input, x + e: any operator, any network.

    encode = glocal.positions.SinusoidalPositions2d(256)
    x = x + encode(x)

Added to queries and keys, never to values (DETR): any operator that takes `pos_embed`.

    y = attention(x, pos_embed=encode(x, valid=valid), valid=valid)
    y = attention(queries, memory, pos_embed=learned, source_pos_embed=encode(memory))

`SinusoidalPositions1d`, `SinusoidalPositions2d`, `LearnedPositions` and `RowColumnPositions` are modules with one call
for both: `encode(x, grid=None, valid=None)` gives what is to be added, in x's shape and dtype.

As a bias of scores, softmax(q k^T / sqrt(D) + b): operators that learn one, each in its own way, are
`WindowAttention`, `NeighborhoodAttention`, `RelativeAttention`, `RelativePositionAttention` and
`LearnedRelativeAttention`; `QuadraticAttention` has nothing else. For attention of one's own:

    bias = glocal.positions.RelativePositionBias((14, 14), num_heads=8)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias(grid))

As a rotation of queries and keys (RoFormer): `RotaryAttention`, or in attention of one's own

    angles = glocal.positions.rotary_angles((T,), head_dim, offset=tokens_before)
    q, k = glocal.positions.rotate(q, angles), glocal.positions.rotate(k, angles)

Every table of sines is computed in float32 at least, on the device of the tokens, at every call: nothing is kept that
would have to be moved, cast or saved.
"""

from glocal.positions.learned import LearnedPositions as LearnedPositions
from glocal.positions.learned import RowColumnPositions as RowColumnPositions
from glocal.positions.learned import resized_positions as resized_positions
from glocal.positions.quadratic import quadratic_encoding as quadratic_encoding
from glocal.positions.quadratic import quadratic_head as quadratic_head
from glocal.positions.relative import RelativePositionBias as RelativePositionBias
from glocal.positions.relative import grid_offsets as grid_offsets
from glocal.positions.relative import relative_bias as relative_bias
from glocal.positions.relative import relative_index as relative_index
from glocal.positions.relative import resized_bias as resized_bias
from glocal.positions.rotary import rotary_angles as rotary_angles
from glocal.positions.rotary import rotate as rotate
from glocal.positions.sinusoidal import SinusoidalPositions1d as SinusoidalPositions1d
from glocal.positions.sinusoidal import SinusoidalPositions2d as SinusoidalPositions2d
from glocal.positions.sinusoidal import sinusoids as sinusoids
