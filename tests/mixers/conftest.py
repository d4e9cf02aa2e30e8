"""How the operators' tests hold an operator against its oracle: values and every gradient, in float64."""

import weakref
from itertools import product

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import glocal

IMPLS = ("reference", "fast", "auto")


@pytest.fixture
def build():
    """glocal.build in float64, every parameter and statistic random: nothing hides behind a zero."""

    def build(spec, dim, **context):
        mixer = glocal.build(spec, dim, **context).double().eval()
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.normal_(std=0.5)
            for name, buffer in mixer.named_buffers():
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
                elif name.endswith("running_mean"):
                    buffer.normal_()
                elif name.endswith("num_batches_tracked"):
                    buffer.fill_(3)
        return mixer

    return build


@pytest.fixture
def tokens():
    """Random float64 tokens of a shape."""
    return lambda *shape: torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def check(record_property):
    """check(mixer, oracle, x, **call): mixer(x, **call) and oracle(x, **call) agree, forward and backward.

    The largest difference is recorded as the test's property, from which scripts/operators makes its table.

    The oracle reads the mixer's own parameters, so both sides have gradients for the same tensors.
    fast=False is for calls without a fast path: it must then say so instead of giving an answer.
    """

    def check(mixer, oracle, x, *, fast=True, **call):
        call = {k: leaf(v) for k, v in call.items()}
        x = leaf(x)
        leaves = {
            "x": x,
            **{k: v for k, v in call.items() if differentiable(v)},
            **dict(mixer.named_parameters()),
        }
        expected = oracle(x, **call)
        record_property("oracle", getattr(oracle, "__qualname__", ""))
        upstream = torch.randn_like(expected)
        expected_grads = grads(expected, leaves, upstream)
        buffers = {name: buffer.clone() for name, buffer in mixer.named_buffers()}
        for mixer.impl in IMPLS:
            for name, buffer in mixer.named_buffers():
                buffer.copy_(buffers[name])
            if mixer.impl == "fast" and not fast:
                with pytest.raises(glocal.Unsupported):
                    mixer(x, **call)
                continue
            got = mixer(x, **call)
            same(got, expected, f"{mixer.impl}: output")
            record_property("difference", difference(got, expected))
            for name, grad in grads(got, leaves, upstream).items():
                same(grad, expected_grads[name], f"{mixer.impl}: gradient of {name}")
                record_property("difference", difference(grad, expected_grads[name]))

    return check


@pytest.fixture
def check_padding():
    """check_padding(mixer, extents, dim): images of these extents give the same alone as padded in one batch.

    What lies in the padding is large and random; it must reach no real token and receive no gradient.
    """

    def check_padding(mixer, extents, dim):
        grid = [max(lengths) + 1 for lengths in zip(*extents, strict=True)]
        images = [leaf(torch.randn(1, *extent, dim, dtype=torch.float64)) for extent in extents]
        batch = 100 * torch.randn(len(images), *grid, dim, dtype=torch.float64)
        valid = torch.zeros(len(images), *grid, dtype=torch.bool)
        for b, (image, extent) in enumerate(zip(images, extents, strict=True)):
            batch[corner(b, extent)] = image.detach()
            valid[corner(b, extent)] = True
        batch = leaf(batch)

        mixer.impl = "reference"
        expected = [mixer(image) for image in images]
        upstream = [torch.randn_like(y) for y in expected]
        leaves = {**{str(b): image for b, image in enumerate(images)}, **dict(mixer.named_parameters())}
        expected_grads = grads(expected, leaves, upstream)
        leaves = {"batch": batch, **dict(mixer.named_parameters())}
        for mixer.impl in IMPLS:
            got = mixer(batch, valid=valid)
            assert got.isfinite().all()
            real = [got[corner(b, y.shape[1:-1])].unsqueeze(0) for b, y in enumerate(expected)]
            for b, (one, alone) in enumerate(zip(real, expected, strict=True)):
                same(one, alone, f"{mixer.impl}: image {b}")
            got_grads = grads(real, leaves, upstream)
            got_batch_grad = got_grads.pop("batch")
            assert (got_batch_grad[~valid] == 0).all(), f"{mixer.impl}: padding receives a gradient"
            for b, extent in enumerate(extents):
                same(
                    got_batch_grad[corner(b, extent)],
                    expected_grads[str(b)][0],
                    f"{mixer.impl}: grad of image {b}",
                )
            for name, grad in got_grads.items():
                same(grad, expected_grads[name], f"{mixer.impl}: gradient of {name} under padding")

    return check_padding


@pytest.fixture
def attend():
    """Multi-head attention, one query and one source at a time.

    q [B, N, heads, D], k and v [B, M, heads, D]; sources(b, i) lists the sources of query i in image b;
    bias(i, j) [heads] is added to a score. A query without sources gives 0. Returns [B, N, heads * D].
    """

    def attend(q, k, v, sources, bias=None):
        images = []
        for b in range(len(q)):
            rows = []
            for i in range(q.shape[1]):
                near = sources(b, i)
                if not near:
                    rows.append(torch.zeros_like(q[b, i]))
                    continue
                scores = []
                for j in near:
                    score = (q[b, i] * k[b, j]).sum(-1) / q.shape[-1] ** 0.5
                    scores.append(score if bias is None else score + bias(i, j))
                shares = torch.stack(scores).softmax(0)  # [sources, heads]
                rows.append((shares.unsqueeze(-1) * v[b, near]).sum(0))
            images.append(torch.stack(rows))
        return torch.stack(images).flatten(2)

    return attend


@pytest.fixture
def places():
    """Coordinates of a grid's tokens in raster order."""
    return lambda grid: list(product(*map(range, grid)))


@pytest.fixture
def largest():
    """`with largest() as found:` counts `found.entries` of the largest tensor that any operation gives, and
    `found.peak` bytes of all that live at once."""
    return Largest


class Largest(TorchDispatchMode):
    entries = alive = peak = 0

    def __enter__(self):
        self.known = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                self.entries = max(self.entries, tensor.numel())
                self.hold(tensor.untyped_storage())
        return out

    def hold(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.known.discard(key)
        self.alive -= size


def corner(b, extent):
    return (b, *(slice(n) for n in extent))


def differentiable(value):
    return torch.is_tensor(value) and value.is_floating_point()


def leaf(value):
    return value.detach().clone().requires_grad_() if differentiable(value) else value


def grads(outputs, leaves, upstream):
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def difference(got, expected):
    """The largest, relative to the largest entry."""
    if not expected.numel():
        return 0.0
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def same(got, expected, what):
    assert got.dtype == expected.dtype and got.shape == expected.shape, (
        f"{what} is {tuple(got.shape)} {got.dtype}, needs {tuple(expected.shape)} {expected.dtype}"
    )
    assert_close(got, expected, rtol=1e-9, atol=1e-10, msg=lambda text: f"{what}\n{text}")
