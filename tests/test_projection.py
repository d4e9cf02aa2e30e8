"""The projection of attention may be adapted: it is called as a module, with its hooks."""

import pytest
import torch
from torch import nn

import glocal


def test_an_adapted_projection_is_called():
    """As LoRA, quantisation and hooks on `qkv` need it."""

    class Adapted(nn.Linear):
        def forward(self, tokens):
            return super().forward(tokens) + 1

    m, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 5, 4, 8)
    plain, adapted = m(x), Adapted(8, 24)
    adapted.load_state_dict(m.qkv.state_dict())
    m.qkv = adapted
    shifted = glocal.build("SelfAttention(num_heads=2)", 8)
    shifted.load_state_dict(m.state_dict())
    with torch.no_grad():
        shifted.qkv.bias += 1
    torch.testing.assert_close(m(x), shifted(x))
    assert not torch.allclose(m(x), plain)
    seen = []
    shifted.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(shifted(x), m(x))
    assert seen


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_hook_may_change_what_goes_into_the_projection(impl):
    mixer, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 5, 8)
    mixer.impl = impl
    expected = mixer(2 * x)
    mixer.qkv.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.testing.assert_close(mixer(x), expected)
