"""The gated recurrent unit as an operator."""

from torch import Tensor, nn

from glocal.mixer import Cache
from glocal.mixers._recurrent import Recurrent


class GRU(Recurrent):
    """Gated recurrent unit: a state, moved by one token after the other; an ordinary module.

    r, z = sigmoid of W x_t + U h_(t-1) + b; n = tanh(W x_t + b + r (U h_(t-1) + b')); h_t = (1 - z) n + z h_(t-1).
    No weighted sum: what a token passes on depends on all that came before it.

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
        torch's nn.GRU with its parameter names: `rnn.weight_ih_l0` [3*H, C], `rnn.weight_hh_l0` [3*H, H], ...

    Cost: 3*H*(C + H) multiply-adds a token and direction in the first layer.

    Raises:
        ValueError: an odd out_dim for two directions and no hidden_dim; padding before a real token; a cache with
            two directions.

    Limits: the chain breaks the graph of torch.compile, and torch.export fixes its length. On a GPU, cuDNN has no
    second derivative; torch says so, and how to run without it.

    Source: Cho, van Merrienboer, Gulcehre, Bahdanau, Bougares, Schwenk, Bengio, Learning Phrase Representations using
    RNN Encoder-Decoder for Statistical Machine Translation, EMNLP 2014, arXiv 1406.1078.
    Differs from the paper: the reset gate is applied after the product with U, and z keeps the old state: torch's form.
    """

    kind = nn.GRU
    gates = 3
    states = ("h",)
    examples = (
        "GRU()",
        "GRU(bidirectional=True)",
        "GRU(hidden_dim=12, num_layers=2, bidirectional=True, out_dim=20, bias=False)",
        "GRU(hidden_dim=24, num_layers=2)",
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
