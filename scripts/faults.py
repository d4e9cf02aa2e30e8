"""The faults that scripts/mutate plants: each breaks one promise, and a test has to notice.

Those of an operator, and others, stand at the end of their test.
"""

import ast
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ACROSS = tuple(
    f"tests/test_{what}.py" for what in ("geometry", "arguments", "operator", "mixer", "norm", "projection")
)  # what holds for many operators: tried where an operator's own tests and its contract notice nothing


@dataclass(frozen=True)
class Fault:
    """One change of the code for the worse."""

    file: str
    old: str  # occurs exactly once in the file
    new: str
    breaks: str
    tests: tuple[str, ...]  # arguments of pytest, tried in this order until one fails

    def __str__(self) -> str:
        return f"{self.file.removeprefix('src/glocal/')}: {self.breaks}"


def _core(file: str, *tests: str) -> "_Of":
    return _Of(file, tuple(f"tests/{test}" for test in tests))


def _shared(file: str, *tests: str) -> "_Of":
    """Faults in a file that operators share, which the tests of some operators should find."""
    return _Of(f"mixers/{file}", (*(f"tests/mixers/{test}" for test in tests), "tests/test_contract.py"))


@dataclass(frozen=True)
class _Of:
    file: str
    tests: tuple[str, ...]

    def __call__(self, breaks: str, old: str, new: str) -> Fault:
        return Fault(f"src/glocal/{self.file}", old, new, breaks, self.tests)


_AGGREGATION = _core("aggregation.py", "test_aggregation.py")
_PLACES = _core("aggregation.py", "test_geometry.py")
_MIXER = _core("mixer.py", "test_mixer.py")
_OPERATOR = _core("operator.py", "test_operator.py", "test_arguments.py", "test_spec.py")
_ARGUMENTS = _core("arguments.py", "test_arguments.py", "test_spec.py")
_BY_PADDING = "test_contract.py -k=padding_changes_nothing"
_BY_VALID = _core("mixer.py", "mixers/test_convolution.py")
_BY_CACHE = _core("mixer.py", "test_mixer.py", "mixers/test_self_attention.py")
_BY_CONTRACT = _core("mixer.py", "test_contract.py -k='declared_cost or shapes_are_refused or query_subset'")
_BY_COUNTING = _core("operator.py", "test_contract.py -k='declared_cost or shapes_are_refused or query_subset'")
_BY_STATISTICS = _core("operator.py", "mixers/test_dynamic_depthwise_conv.py")
_SPEC = _core("spec.py", "test_spec.py")
_INSPECTION = _core("inspection.py", "test_inspection.py")
_GATHERED = _core("kernels/gathered.py", "test_kernels.py")
_CONTRACT = _core("contract.py", "test_checks.py")
_EVIDENCE = _core("evidence.py", "test_checks.py")
_LOCAL_SUM = _core("kernels/local_sum.py", "test_kernels.py")

_CORE = (
    _AGGREGATION(
        "dense() counts slots outside the grid for the first source",
        "index = torch.where(index < 0, outside, index)",
        "index = torch.where(index < 0, 0, index)",
    ),
    _AGGREGATION(
        "dense() gives sources by queries",
        "scatter_add(-1, index, weights)[..., :outside]",
        "scatter_add(-1, index, weights)[..., :outside].mT",
    ),
    _AGGREGATION(
        "a slot outside multiplies its weight with zero, which an infinite weight turns to NaN",
        "    weights = torch.where(a.index < 0, 0, weights)\n    index",
        "    index",
    ),
    _AGGREGATION(
        "a slot outside multiplies the first source with zero, which an infinite value turns to NaN",
        "torch.where(a.index < 0, a.num_sources, a.index)",
        "a.index.clamp(min=0)",
    ),
    _AGGREGATION(
        "coalesce() keeps one of the weights that a source has, not their sum",
        "torch.zeros_like(weights).scatter_add(-1, slot, weights)",
        "torch.zeros_like(weights).scatter(-1, slot, weights)",
    ),
    _AGGREGATION(
        "coalesce() sorts the sources and leaves their weights where they were",
        "        weights = weights.gather(-1, order)\n",
        "",
    ),
    _AGGREGATION(
        "cat() joins the parts from last to first",
        "weights=torch.cat(weights, 1), index=torch.cat(index, 1)",
        "weights=torch.cat(weights[::-1], 1), index=torch.cat(index[::-1], 1)",
    ),
    _AGGREGATION(
        "cat() fills short rows with the first source, and weights of one",
        "slots, 0.0).expand(batch, -1, -1, -1) for w, _ in written]\n    index = [_pad_slots(i, slots, -1)",
        "slots, 1.0).expand(batch, -1, -1, -1) for w, _ in written]\n    index = [_pad_slots(i, slots, 0)",
    ),
    _AGGREGATION(
        "select() takes the sources of the query before",
        "index = index[:, :, queries]",
        "index = index[:, :, queries - 1]",
    ),
    _AGGREGATION(
        "select() says the positions of the first queries",
        "query_positions=self.query_positions[queries]",
        "query_positions=self.query_positions[: len(queries)]",
    ),
    _AGGREGATION(
        "the output has channels before groups",
        "return mixed.expand(batch, queries, groups, dim).reshape(",
        "return mixed.expand(batch, queries, groups, dim).transpose(2, 3).reshape(",
    ),
    _PLACES(
        "positions count the columns first",
        'indexing="ij"',
        'indexing="xy"',
    ),
    _PLACES(
        "positions are moved by the offset the wrong way",
        "dtype=torch.float32) - o) / s",
        "dtype=torch.float32) + o) / s",
    ),
    _PLACES(
        "positions are multiplied by the stride",
        "dtype=torch.float32) - o) / s",
        "dtype=torch.float32) - o) * s",
    ),
    _BY_VALID(
        "values of padding are not zeroed",
        'values.masked_fill(~call["valid"].reshape(*values.shape[:2], 1, 1), 0)',
        "values",
    ),
    _BY_CACHE(
        "a cache puts new tokens before old ones",
        "torch.cat([past, new], dim=1)",
        "torch.cat([new, past], dim=1)",
    ),
    _BY_CACHE(
        "asking for weights moves the cache on",
        "        return self._joined[name]",
        "        self._past[name] = self._joined[name]\n        return self._joined[name]",
    ),
    _core("mixer.py", "test_mixer.py")(
        "looks join the caller's cache, so that its next commit takes what was only looked at",
        'return call | {"cache": call["cache"].copy()} if "cache" in call else call',
        "return call",
    ),
    _BY_CACHE(
        "two layers may share a cache",
        "elif self._owner != id(mixer):",
        "elif False:",
    ),
    _core("mixer.py", "test_mixer.py")(
        "another layer may look into a cache",
        "dict(self._past), self._owner",
        "dict(self._past), None",
    ),
    _MIXER(
        "transforms of torch.func go through the fast path",
        "torch._C._are_functorch_transforms_active():",
        "False:",
    ),
    _OPERATOR(
        "afterwards a frozen batch norm is in the mode of its mixer",
        "        for part, training in modes:\n            part.training = training",
        "        module.train(modes[0][1])",
    ),
    _OPERATOR(
        "an operator can be derived from a final one",
        "if final is not None:",
        "if False:",
    ),
    _OPERATOR(
        "all operators share the code object by which torch.compile counts",
        "        cls.forward = forward\n",
        "",
    ),
    _BY_CACHE(
        "the fast path forgets to move the cache on",
        "            cache.commit()",
        "            pass",
    ),
    _BY_CACHE(
        "the definition forgets to move the cache on",
        'call["cache"].commit()',
        "pass",
    ),
    _MIXER(
        "a forced fast path falls back in silence",
        'if self.impl == "fast":',
        'if self.impl == "never":',
    ),
    _BY_COUNTING(
        "the counted cost is in operations, twice the multiply-adds",
        "counter.get_total_flops() // 2",
        "counter.get_total_flops()",
    ),
    _ARGUMENTS(
        "a transposed `valid` is taken",
        "or tuple(valid.shape) not in (tokens, flat):",
        "or valid.numel() != math.prod(tokens):",
    ),
    _core("arguments.py", "test_arguments.py")(
        "a flat `valid` is refused where x is none",
        "or tuple(valid.shape) not in (tokens, flat):",
        "or tuple(valid.shape) != tokens:",
    ),
    _ARGUMENTS(
        "a `valid` of numbers is taken",
        "if valid.dtype != torch.bool or tuple(",
        "if tuple(",
    ),
    _core("arguments.py", _BY_PADDING)(
        "what is infinite or NaN in the padding reaches real tokens",
        "tokens.masked_fill(~valid[..., None] & ~tokens.isfinite(), 0)",
        "tokens",
    ),
    _core("arguments.py", "test_arguments.py", _BY_PADDING)(
        "a NaN of a real token is hidden",
        "tokens.masked_fill(~valid[..., None] & ~tokens.isfinite(), 0)",
        "tokens.masked_fill(~tokens.isfinite(), 0)",
    ),
    _core("operator.py", "test_operator.py", "mixers/test_self_attention.py", _BY_PADDING)(
        "what is infinite or NaN in the padding of a source reaches real tokens",
        'call["source"] = finite_outside(source, valid)',
        'call["source"] = source',
    ),
    _core("operator.py", "test_operator.py", "mixers/test_self_attention.py")(
        "with a cache, the padding of new tokens is taken for that of the first",
        "return finite_outside(x, valid[:, past:]), call",
        "return finite_outside(x, valid[:, : valid.shape[1] - past]), call",
    ),
    _ARGUMENTS(
        "positions of any shape are added",
        "if tuple(positions.shape) not in (tuple(tokens.shape), (1, *tokens.shape[1:])):",
        "if False:",
    ),
    _OPERATOR(
        "positions of the source are measured by x",
        '("source_pos_embed", x if source is None else source)',
        '("source_pos_embed", x)',
    ),
    _OPERATOR(
        "flat positions stay flat on the grid",
        'call.keys() & {"valid", "pos_embed"}',
        'call.keys() & {"valid"}',
    ),
    _ARGUMENTS(
        "a mask is taken for queries",
        "if queries.dim() != 1 or queries.dtype != torch.int64:",
        "if queries.dim() != 1:",
    ),
    _ARGUMENTS(
        "an image without tokens is taken",
        "if any(n == 0 for n in tokens.shape[1:-1]):",
        "if False:",
    ),
    _ARGUMENTS(
        "the text 'False' counts as true",
        "    if not isinstance(value, bool):",
        "    if False:",
    ),
    _core("arguments.py", "test_arguments.py")(
        "num_heads and head_dim may contradict each other",
        "head_dim is not None and num_heads * head_dim != dim:",
        "head_dim is not None and num_heads * head_dim < 0:",
    ),
    _BY_CONTRACT(
        "a subset of the queries gives all rows of the weights",
        'if queries is not None and "queries" not in self._takes["_weights"] else found',
        "if False else found",
    ),
    _BY_STATISTICS(
        "looking moves the batch norm's statistics",
        'taken["update_statistics"] = update and self.training',
        'taken["update_statistics"] = self.training',
    ),
    _BY_STATISTICS(
        "a forward pass does not move the batch norm's statistics",
        'taken["update_statistics"] = update and self.training',
        'taken["update_statistics"] = False',
    ),
    _OPERATOR(
        "repr leaves out what is not the default for a flag",
        "if value != parameter.default and not (",
        "if value != parameter.default and not isinstance(value, bool) and not (",
    ),
    _OPERATOR(
        "repr leaves out out_dim",
        '(name == "out_dim" and value == self.dim)',
        '(name == "out_dim")',
    ),
    _ARGUMENTS(
        "head_dim is taken for the number of heads",
        "        return dim // size",
        "        return size",
    ),
    _ARGUMENTS(
        "even kernels are taken",
        "if any(size % 2 == 0 for size in sizes):",
        "if any(size < 1 for size in sizes):",
    ),
    _OPERATOR(
        "class tokens in front are dropped in silence by operators that have no place for them",
        "                if prefix:\n                    raise ValueError(",
        "                x = x[:, prefix:]\n                if prefix < 0:\n                    raise ValueError(",
    ),
    _MIXER(
        "a call with an argument that only the definition takes is answered by the fast path",
        'if name not in self._takes["fast"] and',
        'if name not in self._takes["fast"] and name not in ARGUMENTS and',
    ),
    _SPEC(
        "the context overrides what the spec gives",
        "arguments[key] = _value(value, text, dim, operators, context)",
        "arguments.setdefault(key, _value(value, text, dim, operators, context))",
    ),
    _SPEC(
        "a head_dim of the context meets num_heads of the spec",
        'if {"num_heads", "head_dim"} & keywords.keys():',
        "if False:",
    ),
    _SPEC(
        "arguments without a name are dropped",
        "if node.args or any(",
        "if any(",
    ),
    _SPEC(
        "of an argument given twice the last one counts",
        "if twice is not None:",
        "if False:",
    ),
    _SPEC(
        "a name without quotes is an unknown operator, whatever the argument",
        "if isinstance(value, ast.Name) and value.id not in operators:",
        "if False:",
    ),
    _SPEC(
        "a user's file is read once, however often it changes",
        "file.stat().st_mtime_ns, path)",
        "0, path)",
    ),
    _SPEC(
        "what a user's file imports are operators of it",
        " and v.__module__ == name}",
        "}",
    ),
    _SPEC(
        "repr of a user's operator does not name its file",
        'operator.defined_in = f"{path}:"',
        'operator.defined_in = ""',
    ),
    _SPEC(
        "nested specs do not know the operators of the user's file",
        "        return _build(node, text, dim, operators, context)\n    try:",
        "        ours = {name: getattr(mixers, name) for name in available()}\n"
        "        return _build(node, text, dim, ours, context)\n    try:",
    ),
    _SPEC(
        "the nearest name is the first one",
        "lower[close[0]]",
        "valid[0]",
    ),
    _INSPECTION(
        "a tensor that was changed in place is not noticed",
        "if now.get(name) != version and name in now}",
        "if now.get(name, 0) < version}",
    ),
    _INSPECTION(
        "an output that was changed in place is not noticed",
        '    tensors["its output"] = output\n',
        "",
    ),
    _INSPECTION(
        "a parameter that was changed is not noticed",
        'tensors |= {f"its parameter {name}": value for name, value in mixer.named_parameters()}',
        "tensors |= {}",
    ),
    _INSPECTION(
        "weights that do not rebuild the output are shown",
        "if not error <= tolerance:",
        "if error < 0:",
    ),
    _INSPECTION(
        "a call in training is looked at in whatever mode the mixer is now",
        "            for part, training in self._modes:\n                part.training = training\n",
        "",
    ),
    _core("inspection.py", "test_operator.py -k=frozen")(
        "a frozen batch norm is looked at in the mode of its mixer",
        "            for part, training in self._modes:\n                part.training = training\n",
        "            self.mixer.train(self._modes[0][1])\n",
    ),
    _INSPECTION(
        "looking leaves the mixer in the mode of the call",
        "            modes_kept(self.mixer),\n",
        "",
    ),
    _INSPECTION(
        "a call under autocast is looked at without",
        "            torch.autocast(self.output.device.type, dtype, enabled),\n",
        "",
    ),
    _INSPECTION(
        "a call under autocast has to be rebuilt as well as one without",
        "TOLERANCE.get(dtype if enabled else self.output.dtype, 1e-4)",
        "TOLERANCE.get(self.output.dtype, 1e-4)",
    ),
    _INSPECTION(
        "a call in inference mode is looked at outside",
        "            torch.inference_mode(self.output.is_inference()),\n",
        "",
    ),
    _INSPECTION(
        "a shared module is found under its first name only",
        "self._canonical.get(name, name)",
        "name",
    ),
    _INSPECTION(
        "a shared module is recorded once for each of its names",
        "if self._canonical[name] == name:",
        "if True:",
    ),
    _INSPECTION(
        "a statistic that was changed is not noticed",
        "if not part.training:",
        "if False:",
    ),
    _INSPECTION(
        "the statistics that a call in training moves are taken for a change",
        "if not part.training:",
        "if True:",
    ),
    _INSPECTION(
        "a model that ran compiled gives an empty recording",
        "if error is None and self._canonical and not self.calls:",
        "if False:",
    ),
    _INSPECTION(
        "a call without images cannot be looked at",
        "if output.numel() == 0:",
        "if False:",
    ),
    _INSPECTION(
        "the cache is recorded itself, not what it held before the call",
        "value.copy() if isinstance(value, Cache) else value",
        "value",
    ),
    _INSPECTION(
        "the recording goes on after the block",
        "            hook.remove()",
        "            pass",
    ),
    _INSPECTION(
        "a compiled part is passed over",
        "isinstance(module, torch._dynamo.OptimizedModule)",
        "False",
    ),
    _INSPECTION(
        "queries of queries are taken for queries of all",
        "queries if asked is None else asked[queries]",
        "queries",
    ),
    _GATHERED(
        "the score of an infinite query with an empty slot is NaN",
        "torch.where(inside, (q.to(wide) * picked.to(wide)).sum(-1), 0)",
        "(q.to(wide) * picked.to(wide)).sum(-1)",
    ),
    _GATHERED(
        "an infinite weight of an empty slot makes the sum NaN",
        "torch.where(inside, w[..., slot].to(wide), 0)[..., None])",
        "w[..., slot].to(wide)[..., None])",
    ),
    _GATHERED(
        "empty slots read the first source, whose NaN the sum takes",
        "sources.new_zeros(1, *sources.shape[2:])",
        "sources[0, :1]",
    ),
    _GATHERED(
        "empty slots are full of the first source",
        "inside = index >= 0",
        "inside, index = index >= -1, index.clamp(min=0)",
    ),
    _GATHERED(
        "the gradient of the weights has the wrong sign",
        "gathered_scores(grad, v, index) if need_w",
        "-gathered_scores(grad, v, index) if need_w",
    ),
    _GATHERED(
        "the gradient of the keys counts empty slots for the first source",
        "out.index_add_(0, rows, ",
        "out.index_add_(0, rows % total, ",
    ),
    _GATHERED(
        "a second derivative, that of the scatter by its vectors, is missing",
        "gathered_sum(w, grad, index) if need_y",
        "torch.zeros_like(y) if need_y",
    ),
    _GATHERED(
        "images after the first read another image's sources",
        "(total // max(batch, 1))",
        "index.shape[1]",
    ),
    _GATHERED(
        "the kernel's cost is half of what it does",
        "    return 2 * q.numel() * index[-1]",
        "    return q.numel() * index[-1]",
    ),
    _LOCAL_SUM(
        "taps are next to each other whatever the dilation",
        "narrow(axis + 1, o * dilation, ",
        "narrow(axis + 1, o, ",
    ),
    _LOCAL_SUM(
        "taps come column by column",
        "enumerate(offset):",
        "enumerate(reversed(offset)):",
    ),
    _LOCAL_SUM(
        "channels of a group lie apart",
        ".unflatten(-1, (w.shape[-2], -1))",
        ".unflatten(-1, (-1, w.shape[-2])).transpose(-1, -2)",
    ),
    _LOCAL_SUM(
        "sums are taken in bfloat16",
        "wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)",
        "wide = torch.promote_types(x.dtype, w.dtype)",
    ),
    _GATHERED(
        "sums are taken in bfloat16",
        "    return torch.promote_types(tensor.dtype, torch.float32)",
        "    return tensor.dtype",
    ),
    _CONTRACT(
        "a broken promise counts as refused",
        'return Outcome(*about, "broken", str(error))',
        'return Outcome(*about, "refused", str(error))',
    ),
    _CONTRACT(
        "the definition may be called by a forced fast path",
        "setattr(mixer, name, forbidden)",
        "setattr(mixer, name, getattr(mixer, name))",
    ),
    _CONTRACT(
        "what stands in the padding is finite in every check",
        "    rubbish[..., 0], rubbish[..., 1] = torch.nan, torch.inf\n",
        "",
    ),
    _CONTRACT(
        "the places of the sources are not looked at",
        'close("source_positions", places, expected, 1e-5)',
        "pass",
    ),
    _CONTRACT(
        "sources may run backwards",
        "true(bool((steps >= 0).all()),",
        "true(True,",
    ),
    _CONTRACT(
        "gradients under autocast may be NaN",
        "true(bool(value.isfinite().all()),",
        "true(True,",
    ),
    _CONTRACT(
        "no operator's scores have to make its weights",
        "if not torch.allclose(found.weights.sum(-1), torch.ones((), dtype=torch.float64)):",
        "if True:",
    ),
    _CONTRACT(
        "weights above the diagonal and later tokens are not looked at",
        'if not getattr(mixer, "causal", False):',
        'if getattr(mixer, "causal", False):',
    ),
    _CONTRACT(
        "one of the checks runs on no grid",
        "yield from ((check, grid) for grid in grids if fits(spec, grid))",
        "yield from ((check, grid) for grid in grids if fits(spec, grid) and check is not exports)",
    ),
    _EVIDENCE(
        "values may differ by anything",
        "if not error <= relative * max(largest, 1e-3):",
        "if error < 0:",
    ),
    _EVIDENCE(
        "a failed numerical derivative passes",
        "    except GradcheckError as error:\n",
        "    except GradcheckError as error:\n        return\n",
    ),
    _EVIDENCE(
        "bfloat16 may be off by the largest entry",
        "torch.finfo(dtype).eps * largest)",
        "largest)",
    ),
)

_TAPS = _shared("_grid.py", "test_convolution.py", "test_depthwise_conv.py")
_LIBRARY = _shared("_library.py", "test_convolution.py")
_NORM = _shared("_norm.py", "test_dynamic_depthwise_conv.py", "test_inhomogeneous_depthwise_conv.py")
_WINDOWS = _shared("_grid.py", "test_window_attention.py", "test_local_mlp.py")
_ATTENTION = _shared("_attention.py", "test_self_attention.py")
_FOCAL = _shared("_focal.py", "test_focal_attention.py", "test_released_focal_attention.py")
_ADAPTED = _core("mixers/_attention.py", "test_projection.py")
_SHARED = (
    _TAPS(
        "a stride starts at its last position",
        "torch.arange(0, n, stride, device=device) - left",
        "torch.arange(0, n, stride, device=device) + stride - 1 - left",
    ),
    _TAPS(
        "a tap left of the grid reads from its right end",
        "torch.where((position >= 0) & (position < n), position, -1)",
        "torch.where(position < n, position % n, -1)",
    ),
    _LIBRARY(
        "a 1-D convolution is not dilated",
        "(1, stride), (0, *padding), (1, dilation), groups",
        "(1, stride), (0, *padding), 1, groups",
    ),
    _LIBRARY(
        "output lengths are rounded down",
        "(n + stride - 1) // stride for n",
        "n // stride for n",
    ),
    _TAPS(
        "rows are as long as the grid is high",
        "row * size + column, -1)",
        "row * sizes[0] + column, -1)",
    ),
    _NORM(
        "running variances are biased",
        "unbiased = variance.detach() * (count / (count - 1))",
        "unbiased = variance.detach()",
    ),
    _NORM(
        "training normalises by the unbiased variance",
        "return self._normalise(x, mean, variance)",
        "return self._normalise(x, mean, variance * x[..., 0].numel() / (x[..., 0].numel() - 1))",
    ),
    _NORM(
        "without momentum, statistics are the last batch's",
        "share = 1 / self.num_batches_tracked if",
        "share = torch.ones(()) if",
    ),
    _NORM(
        "one value per channel is taken for a batch",
        "if count == 1:",
        "if count == 0:",
    ),
    _core("mixers/_norm.py", "test_norm.py")(
        "a batch of padding alone divides by nothing",
        "total = count.clamp(min=1)",
        "total = count",
    ),
    _core("mixers/_norm.py", "test_norm.py")(
        "a batch of padding alone moves the statistics",
        "None if valid is None else count > 1)",
        "None)",
    ),
    _core("mixers/_norm.py", "test_norm.py")(
        "one real value moves the statistics",
        "None if valid is None else count > 1)",
        "None if valid is None else count > 0)",
    ),
    _core("mixers/_norm.py", "test_norm.py")(
        "a synchronised batch norm counts padding, and moves when looked at",
        "if norm.training and (valid is not None or not update):",
        "if False:",
    ),
    _NORM(
        "an empty batch makes the statistics NaN",
        "if x.numel() == 0:",
        "if False:",
    ),
    _NORM(
        "running variances of padded batches are biased",
        "unbiased = variance.detach() * total / (total - 1).clamp(min=1)",
        "unbiased = variance.detach()",
    ),
    _WINDOWS(
        "empty places hold the last token",
        "torch.where(index < 0, tokens.shape[1], index))",
        "torch.where(index < 0, tokens.shape[1] - 1, index))",
    ),
    _core("mixers/_grid.py", "test_geometry.py", "mixers/test_local_mlp.py", "mixers/test_window_attention.py")(
        "empty places take the NaN of another token, by multiplying it with zero",
        "return pick(torch.cat([tokens, zero], 1), torch.where(index < 0, tokens.shape[1], index))",
        "return pick(tokens, index.clamp(min=0)) * (index >= 0).view(*index.shape, *[1] * (tokens.dim() - 2))",
    ),
    _WINDOWS(
        "windows are shifted the other way",
        "shifted = (window - shift) % window",
        "shifted = shift % window",
    ),
    _WINDOWS(
        "an axis as long as the window is shifted",
        "(0 if n <= window else shifted)",
        "(0 if n < window else shifted)",
    ),
    _WINDOWS(
        "the bias table is flipped: source minus query",
        "each.append(place[:, None] - place + size - 1)",
        "each.append(place - place[:, None] + size - 1)",
    ),
    _WINDOWS(
        "wrapping windows are shifted the other way",
        "torch.where(place < n, (place + shift) % n, place)",
        "torch.where(place < n, (place - shift) % n, place)",
    ),
    _WINDOWS(
        "tokens that wrap around are seen by those they are wrapped to",
        "(place >= count * window - shift).long()",
        "0",
    ),
    _core("mixers/_grid.py", "test_geometry.py")(
        "real tokens with a hole between them are taken for a rectangle",
        "if not torch.compiler.is_compiling() and not valid.is_meta and not torch.equal(inside, valid):",
        "if False:",
    ),
    _WINDOWS(
        "a padded image that is no longer than the window is shifted",
        "torch.where(extent > window, shifted, 0)",
        "torch.where(extent > 0, shifted, 0)",
    ),
    _ATTENTION(
        "scores are not scaled",
        "return out * self.scale if part == 0 else out",
        "return out",
    ),
    _ATTENTION(
        "the fast path scales twice",
        "is_causal=causal, scale=1.0)",
        "is_causal=causal)",
    ),
    _ATTENTION(
        "a row that sees nothing is NaN",
        "scores.masked_fill(~seen, torch.finfo(scores.dtype).min)",
        'scores.masked_fill(~seen, -float("inf"))',
    ),
    _ATTENTION(
        "a row that sees nothing is the mean of what it may not see",
        "return masked(scores, seen).softmax(-1) * seen",
        "return masked(scores, seen).softmax(-1)",
    ),
    _ATTENTION(
        "channels of a head lie apart",
        "out.unflatten(-1, (self.num_heads, -1))",
        "out.unflatten(-1, (-1, self.num_heads)).transpose(-1, -2)",
    ),
    _ATTENTION(
        "keys are taken for values",
        "return self.heads(source, 2)",
        "return self.heads(source, 1)",
    ),
    _ADAPTED(
        "an adapted projection is not called",
        "if type(self.qkv) is nn.Linear and not ",
        "if not ",
    ),
    _ADAPTED(
        "a projection's hooks are not called",
        " and not self.qkv._forward_hooks",
        "",
    ),
    _ADAPTED(
        "a projection's hooks on what goes in are not called",
        " and not self.qkv._forward_pre_hooks",
        "",
    ),
    _ATTENTION(
        "a second derivative of the fused kernel fails without saying what to do",
        "        out.register_hook(_no_second_derivative)",
        "        pass",
    ),
    _FOCAL(
        "the ring is moved to the start of every axis first",
        "product((expand, -expand), repeat=len(window))",
        "product((-expand, expand), repeat=len(window))",
    ),
    _FOCAL(
        "biases of the ring are those of the first slots",
        "self.relative_position_bias_table_to_neighbors[0, :, :, self._ring_kept]",
        "self.relative_position_bias_table_to_neighbors[0, :, :, : len(self._ring_kept)]",
    ),
    _FOCAL(
        "biases of pooled windows are mirrored",
        "place[:, None] - coarse + focal_window // 2",
        "place[:, None] + coarse + focal_window // 2",
    ),
    _FOCAL(
        "pooled windows stand where their first token does",
        "centres = [(1 - w) / (2 * w) for w in self._window]",
        "centres = [0 for w in self._window]",
    ),
    _FOCAL(
        "a window of padding alone is seen",
        "torch.cat([in_window.any(-1), tokens], 1)",
        "torch.cat([torch.ones_like(in_window[..., 0]), tokens], 1)",
    ),
    _FOCAL(
        "padding is pooled",
        "x = x.masked_fill(~valid[..., None], 0)",
        "pass",
    ),
    _FOCAL(
        "sources of tokens are counted from the pooled ones' first",
        "torch.where(fine < 0, fine, fine + math.prod(counts))",
        "fine",
    ),
    _FOCAL(
        "the last column of a grid is outside",
        "inside & (at >= 0) & (at < size)",
        "inside & (at >= 0) & (at < size - (size > 1))",
    ),
    _FOCAL(
        "windows at the end that are filled in part are left out of the pooled ones",
        "tuple((n + w - 1) // w for n, w in zip(grid, self._window, strict=True))",
        "tuple(max(n // w, 1) for n, w in zip(grid, self._window, strict=True))",
    ),
    _FOCAL(
        "no gradient reaches the pooling",
        "pooled = self.pool_layers[0](in_window.transpose(-1, -2)).squeeze(-1)",
        "pooled = self.pool_layers[0](in_window.transpose(-1, -2)).squeeze(-1).detach()",
    ),
    _FOCAL(
        "queries of a subset have the places of the first ones",
        "window, place = window[queries], place[queries]",
        "window = window[queries]; place = place[: len(window)]",
    ),
)

_SPLITS = _core("data/splits.py", "test_data_splits.py")
_DECODING = _core("data/decoding.py", "test_data_folder.py")

_DATA = (
    _SPLITS(
        "a smaller share of the training images is not among those of a larger one",
        "in _shuffled(data.train_labels, seed)]",
        "in _shuffled(data.train_labels, seed + int(100 * share))]",
    ),
    _SPLITS(
        "the first folds get the remainders of all classes",
        "(torch.arange(len(indices)) + dealt) % folds",
        "torch.arange(len(indices)) % folds",
    ),
    _SPLITS("a class may lose all its training images", ", len(indices) - 1)]", ", len(indices))]"),
    _SPLITS("images are made smaller without antialiasing", "antialias=True", "antialias=False"),
    _DECODING("mirrored images that are turned keep their size in the header", "in (5, 6, 7, 8)", "in (6, 8)"),
    _DECODING("transparent places become black", 'drawn.size, "white")', 'drawn.size, "black")'),
    _core("data/contents.py", "test_data_check.py")(
        "images of other sizes with the same pixels count as the same",
        "hashlib.blake2b(repr(image.size).encode(), digest_size=16)",
        "hashlib.blake2b(digest_size=16)",
    ),
    _core("data/check.py", "test_data_check.py")(
        "an image in two splits is passed over", "if len(same.splits) > 1]", "if len(same.splits) > 2]"
    ),
    _core("data/memory.py", "test_data_folder.py")(
        "images that do not fit in memory are decoded", "needed <= free", "needed <= 8 * free"
    ),
)

_RECALL = _core("data/recall.py", "test_probes.py")
_TEXTURE = _core("data/texture.py", "test_probes.py")

_PROBES = (
    _RECALL(
        "one value may stand beside several keys",
        "rng.random((count, VALUES)).argsort(1)[:, :PAIRS]",
        "rng.integers(0, VALUES, (count, PAIRS))",
    ),
    _RECALL("test images may have fewer pairs", "(seed, 1), PAIRS)", "(seed, 1), 1)"),
    _RECALL("the answer is the first value, whichever key is framed", "values[item, asked]", "values[item, 0]"),
    _TEXTURE("the histogram is not the same in every image", "* 256 // (size * size)", "* 255 // (size * size)"),
    _TEXTURE("classes are named after mirrored offsets", "rows + down", "rows - down"),
    _TEXTURE("an offset is shorter than the others", "(3, -4))", "(2, -4))"),
    _TEXTURE("pixels agree less than is said", "_NOISE = 0.3", "_NOISE = 1.0"),
)

_BLOCKS = _core("blocks.py", "test_blocks.py")
_BACKBONE = _core("backbone.py", "test_backbone.py")
_COST = _core("analysis/cost.py", "test_cost.py")
_BUDGET = _core("budget.py", "test_budget.py")

_NETWORKS = (
    _BLOCKS("stochastic depth does not scale what it keeps", "return x * (kept / (1 - self.rate))", "return x * kept"),
    _BLOCKS(
        "stochastic depth draws for every token",
        "x.new_empty(x.shape[0], *[1] * (x.ndim - 1))",
        "x.new_empty(*x.shape[:-1], 1)",
    ),
    _BLOCKS(
        "without skip paths the MLP keeps its own",
        "_joined(None if skip is None else x, self.drop_path2",
        "_joined(x, self.drop_path2",
    ),
    _BLOCKS("without a skip path samples are dropped whole", "drop if skip and rate > 0 else", "drop if rate > 0 else"),
    _BLOCKS(
        "layer scale is applied to the skip path too",
        "x = _joined(skip, self.drop_path1(self.ls1(mixed)))",
        "x = self.ls1(_joined(skip, self.drop_path1(mixed)))",
    ),
    _BLOCKS("squeeze-excite takes the maximum", "gate = x.mean((2, 3), keepdim=True)", "gate = x.amax((2, 3), True)"),
    _BACKBONE("the MLP ratio passes convolution blocks by", '{"expand_ratio": mlp_ratio, "rank"', '{"rank"'),
    _BACKBONE("every block drops at the full rate", '"drop_path": next(rates)}', '"drop_path": drop_path}'),
    _BACKBONE("operators keep their positions", 'context["position_bias"] = False', "pass"),
    _BACKBONE(
        "an ablation of positions is said to change convolutions",
        'any(getattr(part, "position_bias", False) for part in self.stages.modules())',
        "bool(blocks)",
    ),
    _BACKBONE("the stem of signals is padded in height", "((1, 3), (0, 1))", "((1, 3), (1, 1))"),
    _COST(
        "what a fused encoder layer multiplies is missing",
        "mha.set_fastpath_enabled(False)",
        "mha.set_fastpath_enabled(enabled)",
    ),
    _COST("operators are counted by the path that runs", 'module.impl = "reference"', 'module.impl = "auto"'),
    _COST("the model is left in evaluation", "_counted(copy.deepcopy(model), [", "_counted(model, ["),
    _COST("the whole batch counts", "[x[:1] if isinstance(x, Tensor)", "[x if isinstance(x, Tensor)"),
    _COST("random numbers are drawn", "with torch.random.fork_rng(sorted(devices)):", "if True:"),
    _BUDGET(
        "the first width that is taken stays",
        "guess = min(near[0] + (math.sqrt(target) - roots[0]) / slope, 4 * near[0])",
        "break",
    ),
    _BUDGET("the MLP ratio stays", "end = WIDEST if standard < target else NARROWEST", "return STANDARD"),
    _BUDGET(
        "networks off the budget are given out",
        "if abs(cost_at(step, ratio) / target - 1) <= TOLERANCE:",
        "if abs(cost_at(step, ratio) / target - 1) <= 4 * TOLERANCE:",
    ),
    _BUDGET("a width that an operator refuses ends the search", "refusals.append(error)", "raise"),
)

_VERDICTS = _core("statistics.py", "test_statistics.py")

_STATISTICS = (
    _VERDICTS(
        "the smaller of the two p-values counts",
        "_holm([max(both) for",
        "_holm([min(both) for",
    ),
    _VERDICTS(
        "every p is corrected by the number of all pairs",
        "(len(p_values) - rank) * p_values[i]",
        "len(p_values) * p_values[i]",
    ),
    _VERDICTS(
        "corrected p-values may fall again",
        "largest = max(largest, min(",
        "largest = max(0.0, min(",
    ),
    _VERDICTS(
        "a tie on resampled images counts for the best",
        "(counts @ ahead <= 0)",
        "(counts @ ahead < 0)",
    ),
    _VERDICTS(
        "one image is enough for a winner",
        "np.maximum(p, coins)",
        "p",
    ),
    _VERDICTS(
        "the pooled variance has one degree of freedom for every run",
        "freedom = sum(len(v) - 1 for v in values)",
        "freedom = sum(len(v) for v in values) - 1",
    ),
)

_CHARTS = ("test_report_charts.py", "test_report.py")
_PAGE = ("test_report.py", "test_report_charts.py")

_REPORT = (
    _core("report/drawing.py", *_CHARTS)(
        "values of a logarithmic axis are placed linearly",
        "share = math.log(value / self.low) / math.log(self.high / self.low)",
        "share = (value - self.low) / (self.high - self.low)",
    ),
    _core("report/drawing.py", *_CHARTS)(
        "an axis of accuracies goes on beyond 100 %",
        "low, high = max(low - room, limits[0]), min(high + room, limits[1])",
        "low, high = low - room, high + room",
    ),
    _core("report/drawing.py", *_PAGE)(
        "an infinite value is drawn",
        "value is not None and math.isfinite(value) and abs(value) < 1e15",
        "value is not None",
    ),
    _core("report/accuracy.py", *_CHARTS)(
        "the band of an interval begins at the mean",
        "start, end = x(row.low), x(row.high)",
        "start, end = x(row.mean), x(row.high)",
    ),
    _core("report/scatter.py", *_CHARTS)(
        "the front prefers slow candidates",
        "sign = 1 if more_is_better else -1",
        "sign = -1 if more_is_better else 1",
    ),
    _core("report/confusion.py", *_CHARTS)(
        "rows and columns of a confusion matrix are exchanged",
        "x, share = gutter + j * cell, count / total",
        "x, y, share = gutter + i * cell, 8 + j * cell, count / total",
    ),
    _core("report/insights.py", *_PAGE)(
        "a picture may be an address",
        'r"data:image/png;base64,[A-Za-z0-9+/]+=*"',
        'r".*"',
    ),
    _core("report/answers.py", *_PAGE)(
        "the highest mean is bold without a verdict",
        'winner = at(study.verdict(condition), "winner")\n    reached',
        'winner = at(study.verdict(condition), "best")\n    reached',
    ),
    _core("report/study.py", *_PAGE)(
        "ablations stand among the candidates",
        'if candidate.get("without") is None:',
        "if True:",
    ),
    _core("report/export.py", "test_report_export.py")(
        "a name's special characters reach LaTeX as they are",
        'escaped(candidate["name"]) + mark',
        'candidate["name"] + mark',
    ),
    _core("report/export.py", "test_report_export.py")(
        "every run is given the first seed's values",
        "*(values[i] if i < len(values) else None for values in runs)",
        "*(values[0] if values else None for values in runs)",
    ),
)

_CONFIG = _core("config.py", "test_config.py")
_CHECKPOINT = _core("checkpoint.py", "test_checkpoint.py")
_INFERENCE = _core("inference.py", "test_inference.py")
_CLASSIFICATION = _core("tasks/classification.py", "test_classification.py")

_RUNS = (
    _CONFIG(
        "1e-3 in a file is text",
        "if hint is float and isinstance(value, str) and _NUMBER.fullmatch(value):",
        "if False:",
    ),
    _CONFIG("precision: no in a file is false", 'if value is False and "no" in inner:', "if False:"),
    _CONFIG("true counts as the number 1", "type(value) in (int, float)", "isinstance(value, (int, float))"),
    _CONFIG("a learning rate that is no number is taken", "lambda value: 0 < value < math.inf", "lambda value: True"),
    _CHECKPOINT(
        "a file is written in place", "    temporary = _temporary(path)\n    try:", "    temporary = path\n    try:"
    ),
    _CHECKPOINT(
        "a full disk leaves half a file",
        "    except OSError as error:\n        temporary.unlink(missing_ok=True)",
        "    except OSError as error:",
    ),
    _CHECKPOINT(
        "a step that is there is removed before its new state is in place",
        "            final.replace(aside)",
        "            shutil.rmtree(final)",
    ),
    _CHECKPOINT("files are unpickled", "weights_only=True", "weights_only=False"),
    _CHECKPOINT("what a killed process left stays", "and not _lives(int(number))", "and False"),
    _CHECKPOINT("what a living process writes is removed", "and not _lives(int(number))", ""),
    _CHECKPOINT("a damaged state hides the one before", "            continue", "            return None"),
    _INFERENCE("hidden files are taken for images", "in _SUFFIXES and not hidden", "in _SUFFIXES"),
    _INFERENCE(
        "counts are [predicted][true]",
        "data.test_labels * n + found.predicted",
        "found.predicted * n + data.test_labels",
    ),
    _CLASSIFICATION(
        "smoothed labels are weighted by their classes",
        'labels, label_smoothing=self._smoothing, reduction="none")',
        'labels, self._weight, label_smoothing=self._smoothing, reduction="none") / self._weight[labels]',
    ),
    _CLASSIFICATION(
        "a mixed image counts as much as one of its parts",
        "labels @ self._weight if",
        "self._weight[labels.argmax(1)] if",
    ),
    _CLASSIFICATION("with mixup and cutmix there is only mixup", "torch.randint(len(self._mixers), ())", "0"),
    _CLASSIFICATION("trying a network leaves it in evaluation mode", "module.training = before", "pass"),
    _CLASSIFICATION(
        "trying a network draws random numbers", "with torch.random.fork_rng(), torch.no_grad()", "with torch.no_grad()"
    ),
)


def _of_tests() -> Iterator[Fault]:
    """The literal `FAULTS` of a test, for the file of the same name, or for each file that it names."""
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        found = next((ast.literal_eval(n.value) for n in _assignments(test) if "FAULTS" in _names(n)), {})
        relative = test.relative_to(ROOT / "tests")
        own = str(relative.with_name(relative.name.removeprefix("test_")))
        for file, faults in (found if isinstance(found, dict) else {own: found}).items():
            source, tests = _place(file), (f"tests/{relative}",)
            if file.startswith("mixers/"):
                tests += (*_contract(source), *_ACROSS)
            yield from (Fault(source, old, new, breaks, tests) for breaks, old, new in faults)


def _place(file: str) -> str:
    """Where a file of the package is; its folder may be left out, or joined to its name as in report_page.py."""
    package = ROOT / "src" / "glocal"
    places = [package / file, package / file.replace("_", "/", 1), *package.rglob(Path(file).name)]
    return str(next(place for place in places if place.is_file()).relative_to(ROOT))


def _contract(source: str) -> tuple[str, ...]:
    """The contract of the operators that a file defines."""
    classes = [n.name for n in ast.parse((ROOT / source).read_text("utf-8")).body if isinstance(n, ast.ClassDef)]
    return (f"tests/test_contract.py -k={shlex.quote(' or '.join(f'-{c}' for c in classes))}",)


def _assignments(file: Path) -> Iterator[ast.Assign]:
    return (node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.Assign))


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


FAULTS: tuple[Fault, ...] = (
    *_CORE,
    *_REPORT,
    *_STATISTICS,
    *_NETWORKS,
    *_DATA,
    *_RUNS,
    *_PROBES,
    *_SHARED,
    *_of_tests(),
)
