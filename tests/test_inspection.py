"""Looking into models: what is recorded, what is computed from it, and what is refused."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import glocal
from glocal.aggregation import Aggregation, grid_positions

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


@pytest.mark.parametrize("given", [5, None, "resnet18"])
def test_what_is_no_module_is_refused(given):
    with pytest.raises(ValueError, match=f"^inspect: a {type(given).__name__}, must be a torch.nn.Module$"):
        glocal.inspect(given)


def test_an_output_changed_in_place_is_refused():
    mixer = glocal.build("AveragePooling()", 8)
    with glocal.inspect(mixer) as seen:
        mixer(torch.randn(2, 4, 3, 8)).mul_(2)
    with pytest.raises(ValueError, match="AveragePooling: its output was changed in place"):
        seen["AveragePooling"][0].weights()


@pytest.mark.parametrize("then", [False, True])
def test_a_call_is_looked_at_in_its_own_mode_and_the_mixer_stays_in_its(then):
    """Batch norm makes the modes differ."""
    mixer = glocal.build("DynamicDepthwiseConv(kernel_size=3)", 8).train(not then)
    x = torch.randn(3, 4, 5, 8)
    expected = mixer.weights(x).weights
    with glocal.inspect(mixer) as seen:
        mixer(x)
    mixer.train(then)
    (call,) = seen
    if then:  # statistics have not moved since
        assert not torch.allclose(mixer.weights(x).weights, expected)
    torch.testing.assert_close(call.weights().weights, expected)
    assert all(module.training == then for module in mixer.modules())


@pytest.mark.parametrize("then", [False, True])
def test_a_call_is_looked_at_in_its_own_precision(then):
    """Bit for bit the weights of that precision, whether the look is under autocast or not."""
    mixer, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=not then):
        expected = mixer.weights(x).weights
        with glocal.inspect(mixer) as seen:
            mixer(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=then):
        assert not torch.equal(mixer.weights(x).weights, expected)
        found = seen["SelfAttention"][0].weights().weights
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", ["SelfAttention(num_heads=2)", "InhomogeneousDepthwiseConv(num_groups=2)"])
@pytest.mark.parametrize("then", [False, True])
def test_a_call_in_inference_mode_is_looked_at_in_inference_mode(spec, then):
    """Its tensors can be part of no graph; those of any other call can, whatever the mode of the look."""
    mixer, x = glocal.build(spec, 8).eval(), torch.randn(2, 4, 4, 8)
    expected = mixer.weights(x).weights
    with torch.inference_mode(not then), glocal.inspect(mixer) as seen:
        mixer(x.clone())
    with torch.inference_mode(then):
        found = seen.calls[0].weights().weights
    torch.testing.assert_close(found, expected)
    assert found.is_inference() != then
    assert found.requires_grad == then


def test_a_later_call_in_training_does_not_hide_an_earlier_one():
    """It moves the batch norm's statistics, on which weights in training do not depend."""
    mixer = glocal.build("InhomogeneousDepthwiseConv(kernel_size=3, num_groups=2)", 8).train()
    first, second = torch.randn(2, 2, 4, 4, 8)
    expected = mixer.weights(first).weights
    with glocal.inspect(mixer) as seen:
        mixer(first)
        mixer(second)
    torch.testing.assert_close(seen.calls[0].weights().weights, expected)


def test_queries_of_a_call_for_some_queries():
    mixer, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 9, 8)
    with glocal.inspect(mixer) as seen:
        mixer(x, queries=torch.tensor([7, 3, 5]))
    found = seen["SelfAttention"][0].weights(torch.tensor([2, 0]))
    torch.testing.assert_close(found.weights, mixer.weights(x).weights[:, :, [5, 7]])
    assert found.query_positions.tolist() == [[5], [7]]


class Halves(glocal.TokenMixer):
    """What it is a mixture of, and its scores, hear of no queries."""

    def values(self, source):
        return source.flatten(1, -2).unsqueeze(2)

    def terms(self, x):
        return torch.einsum("bnc,bmc->bnm", x, x)[:, None]

    def scores(self, x):
        return {"content": self.terms(x)}

    def parts(self, x):
        parts = (self.terms(x).softmax(-1), (-self.terms(x)).softmax(-1))
        return dict(zip(("content", "position"), ((torch.tensor([0.5]), part) for part in parts), strict=True))

    def weights(self, x):
        one, other = (share * part for share, part in Halves.parts(self, x).values())
        places = grid_positions(x.shape[1:-1])
        return Aggregation(one + other, None, x.shape[1], places, places, x.shape[1:-1], x.shape[1:-1])


@pytest.mark.parametrize("own", [None, [7, 3, 5]])
@pytest.mark.parametrize("asked", [None, [2, 0]])
def test_parts_and_scores_are_those_of_the_queries_whoever_selects_them(own, asked):
    mixer, x = Halves(8, rank=1), torch.randn(2, 9, 8)
    with glocal.inspect(mixer) as seen:
        mixer(x, **({} if own is None else {"queries": torch.tensor(own)}))
    (call,), rows = seen, own or list(range(9))
    rows = rows if asked is None else [rows[i] for i in asked]
    queries = None if asked is None else torch.tensor(asked)
    parts = call.parts(queries)
    torch.testing.assert_close(sum(s * part for s, part in parts.values()), call.weights(queries).weights)
    torch.testing.assert_close(call.scores(queries)["content"], mixer.scores(x)["content"][:, :, rows])


@pytest.mark.parametrize(
    "spec",
    ["DynamicConv(rank=1)", "MultiScaleAttention(rank=1)", "WindowAttention(rank=1)", "MaxPooling(stride=2, rank=1)"],
)
def test_a_padded_call_can_be_looked_at(spec):
    """What an operator gives for padding differs between its paths, and is not what is asked for."""
    mixer, x = glocal.build(spec, 32).eval(), torch.randn(2, 9, 32)
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    with glocal.inspect(mixer) as seen:
        mixer(x, valid=valid)
        mixer(x, valid=valid, queries=torch.tensor([3, 0]))
    for call in seen:
        assert call.rebuild_error() < 1e-5
        call.weights(torch.tensor([1]))
    whole = mixer.weights(x, valid=valid).dense()
    torch.testing.assert_close(seen.calls[0].weights().dense(), whole)


def test_padding_behind_a_cache_can_be_looked_at():
    mixer, x = glocal.build("DynamicConv(kernel_size=3, causal=True, rank=1)", 32).eval(), torch.randn(2, 9, 32)
    valid, cache = torch.arange(9) < torch.tensor([[9], [5]]), glocal.Cache()
    with glocal.inspect(mixer) as seen:
        for start, end in ((0, 4), (4, 9)):
            mixer(x[:, start:end], valid=valid[:, :end], cache=cache)
    assert all(call.rebuild_error() < 1e-5 for call in seen)


def test_a_real_token_of_a_padded_call_that_is_not_rebuilt_is_refused():
    class Loose(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    mixer = glocal.build("SelfAttention(num_heads=4)", 32)
    mixer.proj = Loose()
    with glocal.inspect(mixer) as seen:
        mixer(torch.randn(2, 9, 32), valid=torch.arange(9) < torch.tensor([[9], [5]]))
    with pytest.raises(ValueError, match="does it draw random numbers"):
        seen.calls[0].weights()


# planted by scripts/mutate
FAULTS = (
    ("padding has to be rebuilt too", "rows.masked_fill(~real[..., None], 0)", "rows"),
    ("real tokens need not be rebuilt", "rows.masked_fill(~real[..., None], 0)", "0 * rows"),
    (
        "padding of a subset of the queries is that of all",
        'real[:, bound["queries"]] if "queries" in bound else real',
        "real",
    ),
    ("what a cache keeps counts as the tokens of a call", "[:, -math.prod(tokens) :]", "[:, : math.prod(tokens)]"),
    (
        "a tensor that was changed in place is not noticed",
        "if now.get(name) != version and name in now}",
        "if now.get(name, 0) < version}",
    ),
    ("an output that was changed in place is not noticed", '    tensors["its output"] = output\n', ""),
    (
        "a parameter that was changed is not noticed",
        'tensors |= {f"its parameter {name}": value for name, value in mixer.named_parameters()}',
        "tensors |= {}",
    ),
    ("weights that do not rebuild the output are shown", "if not error <= tolerance:", "if error < 0:"),
    (
        "a call in training is looked at in whatever mode the mixer is now",
        "            for part, training in self._modes:\n                part.training = training\n",
        "",
    ),
    ("looking leaves the mixer in the mode of the call", "            modes_kept(self.mixer),\n", ""),
    (
        "a call under autocast is looked at without",
        "            torch.autocast(self.output.device.type, dtype, enabled),\n",
        "",
    ),
    (
        "a call under autocast has to be rebuilt as well as one without",
        "TOLERANCE.get(dtype if enabled else self.output.dtype, 1e-4)",
        "TOLERANCE.get(self.output.dtype, 1e-4)",
    ),
    (
        "a call in inference mode is looked at outside",
        "            torch.inference_mode(self.output.is_inference()),\n",
        "",
    ),
    ("a shared module is found under its first name only", "self._canonical.get(name, name)", "name"),
    ("a shared module is recorded once for each of its names", "if self._canonical[name] == name:", "if True:"),
    ("a statistic that was changed is not noticed", "if not part.training:", "if False:"),
    ("the statistics that a call in training moves are taken for a change", "if not part.training:", "if True:"),
    (
        "a model that ran compiled gives an empty recording",
        "if error is None and self._canonical and not called:",
        "if False:",
    ),
    ("a call without images cannot be looked at", "if output.numel() == 0:", "if False:"),
    (
        "the cache is recorded itself, not what it held before the call",
        "value.copy() if isinstance(value, Cache) else value",
        "value",
    ),
    ("the recording goes on after the block", "            hook.remove()", "            pass"),
    ("a compiled part is passed over", "isinstance(module, torch._dynamo.OptimizedModule)", "False"),
    ("rows are those of all queries", 'given = "queries" not in call or', "given = True or"),
    ("queries of queries are taken for queries of all", "queries if asked is None else asked[queries]", "queries"),
)
