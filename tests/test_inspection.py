"""Looking into models: what is recorded, what is computed from it, and what is refused."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import glocal

X = torch.randn(2, 6, 5, 32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = glocal.build("DepthwiseConv(kernel_size=3)", 32)
        self.attention = glocal.build("SelfAttention(num_heads=4)", 32)

    def forward(self, x):
        return self.attention(self.conv(x), source=x, pos_embed=x, source_pos_embed=0.5 * x)


def test_calls_have_names_inputs_and_weights():
    net = Net()
    with glocal.inspect(net) as seen:
        out = net(X)
    assert [call.name for call in seen] == ["conv", "attention"]
    (call,) = seen["attention"]
    torch.testing.assert_close(
        call.weights().weights, net.attention.weights(net.conv(X), X, pos_embed=X, source_pos_embed=0.5 * X).weights
    )
    assert call.output is out
    assert call.rebuild_error() < 1e-5
    assert call.weights(torch.tensor([4, 2])).weights.shape == (2, 4, 2, 30)
    with pytest.raises(KeyError, match=r"recorded: conv, attention"):
        seen["attn"]


def test_nothing_is_recorded_outside_the_block():
    net = Net()
    with glocal.inspect(net) as seen:
        net(X)
    net(X)
    assert len(seen) == 2
    assert not net.conv._forward_hooks and not net.conv._forward_pre_hooks


def test_shared_and_checkpointed_modules_are_calls_in_a_list():
    shared = glocal.build("AveragePooling()", 32)
    x = X.clone().requires_grad_()
    with glocal.inspect(nn.Sequential(shared, shared)) as seen:
        nn.Sequential(shared, shared)(X)
    assert len(seen.calls) == 2
    with glocal.inspect(shared) as seen:
        checkpoint(shared, x, use_reentrant=False).sum().backward()
    assert len(seen["AveragePooling"]) >= 1


def test_an_input_changed_in_place_is_refused():
    net, x = Net(), X.clone()
    with glocal.inspect(net) as seen:
        net(x)
    x.add_(1)
    with pytest.raises(ValueError, match=r"attention: its input source was changed in place"):
        seen["attention"][0].weights()


def test_an_optimizer_step_is_noticed():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with glocal.inspect(net) as seen:
        net(X).sum().backward()
    seen["conv"][0].weights()
    optimizer.step()
    with pytest.raises(ValueError, match=r"conv: its parameter (weight|bias) was changed"):
        seen["conv"][0].weights()


def test_what_does_not_rebuild_the_output_is_refused():
    net = Net()
    with glocal.inspect(net) as seen:
        net(X)
    net.conv.dilation = 2
    with pytest.raises(ValueError, match=r"conv: its weights rebuild the recorded output with a relative error"):
        seen["conv"][0].weights()


def test_a_compiled_part_is_refused_by_name():
    net = Net()
    net.conv = torch.compile(net.conv, backend="eager")
    with pytest.raises(ValueError, match="conv: is compiled"), glocal.inspect(net):
        pass


def test_decoding_can_be_looked_at_afterwards():
    mixer, cache = glocal.build("SelfAttention(num_heads=4, causal=True)", 32), glocal.Cache()
    with glocal.inspect(mixer) as seen:
        for _ in range(3):
            mixer(torch.randn(1, 1, 32), cache=cache)
    assert [call.weights().num_sources for call in seen] == [1, 2, 3]
    assert len(cache) == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    net = Net()
    with mode(), glocal.inspect(net) as seen:
        net(X)
    assert seen["conv"][0].rebuild_error() < 1e-5


def test_an_empty_batch_can_be_looked_at():
    net = Net()
    with glocal.inspect(net) as seen:
        net(X[:0])
    assert seen["conv"][0].rebuild_error() == 0
    assert seen["attention"][0].weights().weights.shape == (0, 4, 30, 30)


def test_autocast_is_remembered():
    mixer = glocal.build("InhomogeneousDepthwiseConv(kernel_size=3)", 32).eval()
    with torch.autocast("cpu", torch.bfloat16), glocal.inspect(mixer) as seen:
        mixer(X)
    assert seen.calls[0].rebuild_error() < 0.05
    seen.calls[0].weights()


def test_a_model_that_runs_compiled_is_noticed():
    net = Net()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    compiled(X)
    with pytest.raises(ValueError, match=r"no token mixer was called|compiled region"), glocal.inspect(net):
        compiled(X)
    torch._dynamo.reset()


def test_a_shared_module_is_found_under_each_of_its_names():
    shared = glocal.build("AveragePooling()", 32)
    with glocal.inspect(nn.Sequential(shared, shared)) as seen:
        nn.Sequential(shared, shared)(X)
    assert len(seen["0"]) == len(seen["1"]) == 2


def test_a_moved_buffer_is_named():
    mixer = glocal.build("InhomogeneousDepthwiseConv(kernel_size=3)", 32).eval()
    with glocal.inspect(mixer) as seen:
        mixer(X)
    mixer.bn.running_mean.add_(1)
    with pytest.raises(ValueError, match=r"its buffer bn.running_mean was changed in place"):
        seen.calls[0].weights()
