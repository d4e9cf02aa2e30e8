"""Long short-term memory as an operator."""

from torch import Tensor, nn

from glocal.mixer import Cache
from glocal.mixers._recurrent import Recurrent


class LSTM(Recurrent):
    """Long short-term memory: a state and a cell, moved by one token after the other; an ordinary module.

    i, f, o = sigmoid, g = tanh of W x_t + U h_(t-1) + b; c_t = f c_(t-1) + i g; h_t = o tanh(c_t). No weighted sum:
    what a token passes on depends on all that came before it.

    Args:
        dim: channels C.
        hidden_dim: channels H of the state of each direction; those of the output, shared by the directions, by
            default. Another width is brought to the output's by a linear map `proj`.
        num_layers: layers; each reads the states, of both directions, of the one before.
        bidirectional: a second chain runs from the last token to the first. Without it the operator is causal.
        out_dim: channels of the output; dim by default.
        bias: whether the gates have biases.

    Shape:
        x [B, T, C] -> [B, T, out_dim]. `valid` must be True up to a length: each sequence gets what it would get
        alone, in both directions. With `cache` (one direction) x follows the tokens that are remembered. `rnn` is
        torch's nn.LSTM with its parameter names: `rnn.weight_ih_l0` [4*H, C], `rnn.weight_hh_l0` [4*H, H], ...

    Cost: 4*H*(C + H) multiply-adds a token and direction in the first layer.

    Raises:
        ValueError: an odd out_dim for two directions and no hidden_dim; padding before a real token; a cache with
            two directions.

    Limits: the chain breaks the graph of torch.compile, and torch.export fixes its length. On a GPU, cuDNN has no
    second derivative; torch says so, and how to run without it.

    Source: Hochreiter, Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997; both directions: Schuster,
    Paliwal, Bidirectional Recurrent Neural Networks, IEEE Transactions on Signal Processing 45(11), 1997.
    Differs from the paper: a forget gate (Gers, Schmidhuber, Cummins, 2000), no peepholes, two biases: torch's form.
    """

    kind = nn.LSTM
    gates = 4
    states = ("h", "c")
    examples = (
        "LSTM()",
        "LSTM(bidirectional=True)",
        "LSTM(hidden_dim=12, num_layers=2, bidirectional=True, out_dim=20, bias=False)",
        "LSTM(hidden_dim=24, num_layers=2)",
    )

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        num_layers: int = 1,
        bidirectional: bool = False,
        out_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(
            dim, hidden_dim=hidden_dim, num_layers=num_layers, bidirectional=bidirectional, out_dim=out_dim, bias=bias
        )

    def mix(self, x: Tensor, *, valid: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.recur(x, valid, cache)
