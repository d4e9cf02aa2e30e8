"""VOLO in training: scores of tokens of mixed images against timm's, skipped branches, checkpoints."""

import pytest
import torch
from torch.testing import assert_close

import glocal
from glocal.models.keys.volo import to_timm
from glocal.models.volo import drawn_box, mixed

SMALL = {"dims": (16, 24), "num_heads": (2, 3), "depths": (1, 1, 2, 1), "stem_dim": 8, "num_classes": 5}

FAULTS = {
    "models/volo.py": (
        ("boxes of coarse tokens mix fine ones", "(x, (2 * top, 2 * left, 2 * bottom, 2 * right))", "(x, box)"),
        ("tokens are not mixed", "x = mixed(x, (2 * top", "x = mixed(x, (2 * bottom"),
        ("scores stay with the other image", "mixed(tokens, box).flatten(1, 2)", "tokens.flatten(1, 2)"),
        ("evaluation mixes too", "drawn_box(h, w) if self.training else (0, 0, 0, 0)", "drawn_box(h, w)"),
        ("a box of three is a traceback", "if len(box) != 4 or not all", "if not all"),
        ("halves of tokens are mixed", "or not all(isinstance(n, int) for n in box):", "or False:"),
        ("a box may lie outside", "if not (0 <= top <= bottom <= h and 0 <= left <= right <= w):", "if False:"),
        ("images are not those of the batch in reverse", "x.flip(0)[:, top:bottom", "x.roll(1, 0)[:, top:bottom"),
        ("the batch itself changes", "out = x.clone()", "out = x"),
        ("the share is the box' own", "(1 - share).sqrt()", "share.sqrt()"),
        ("the share is a side's", "(1 - share).sqrt()", "(1 - share)"),
        ("odd boxes are one smaller", "row + (height + 1) // 2", "row + height // 2"),
        ("boxes hang over the upper border", "max(row - height // 2, 0)", "row - height // 2"),
        ("boxes hang over the right border", "min(column + (width + 1) // 2, w)", "column + (width + 1) // 2"),
        ("groups of blocks are of one rate", "rates[sum(depths[:i]) + j]", "rates[sum(depths[:i])]"),
        ("rates begin behind the outlookers", "rates[sum(depths[:i]) + j]", "rates[sum(depths[1:i]) + j]"),
        (
            "class attention is not checkpointed",
            "return super().forward(tokens, grid=tuple(x.shape[1:3]))",
            "return self[1](self[0](tokens, grid=tuple(x.shape[1:3])), grid=tuple(x.shape[1:3]))",
        ),
        ("an odd grid has one token less", "((n + 1) // 2 for n in x.shape[1:3])", "(n // 2 for n in x.shape[1:3])"),
    ),
}  # fmt: skip


def small(**arguments):
    return glocal.create_model("volo_d1", **{**SMALL, "img_size": (64, 96), **arguments}).double()


def timms(ours):
    volo = pytest.importorskip("timm.models.volo")
    model = volo.VOLO(
        layers=SMALL["depths"], img_size=(64, 96), num_classes=5, stem_hidden_dim=8, embed_dims=(16, 24, 24, 24),
        num_heads=(2, 3, 3, 3), use_mix_token=True,
    )  # fmt: skip
    model.load_state_dict(to_timm(ours.state_dict()))
    return model.double()


def test_is_what_timm_trains_on():
    """With the same draws. timm gives the class token where the release, as here, gives its scores."""
    ours = small()
    theirs = timms(ours)
    image, boxes = torch.randn(3, 3, 64, 96, dtype=torch.float64), set()
    for seed in range(12):
        found = []
        for model in (ours, theirs):
            model.zero_grad()
            model.train()
            torch.manual_seed(seed)
            x = image.clone().requires_grad_()
            of_class, of_tokens, box = model.forward_train(x)
            of_class = of_class if model is ours else model.head(of_class)
            (of_class.square().sum() + of_tokens.square().sum()).backward()
            found.append((of_class.detach(), of_tokens.detach(), x.grad, box))
        assert found[0][3] == found[1][3]
        assert_close(found[0][:3], found[1][:3], rtol=1e-9, atol=1e-9)
        boxes.add(found[0][3])
    assert len(boxes) > 6 and found[0][0].shape == (3, 5) and found[0][1].shape == (3, 24, 5)


def test_mixed_tokens_of_one_batch_are_those_of_a_mixed_image():
    """Where the box is the whole image, every image is another one, and its scores come back to it."""
    model = small().eval()
    image = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    of_class, of_tokens, box = model.forward_train(image, box=(0, 0, 4, 6))
    plain = model.forward_train(image)
    assert box == (0, 0, 4, 6) and plain[2] == (0, 0, 0, 0)
    assert_close(of_class, plain[0].flip(0))
    assert_close(of_tokens, plain[1])
    assert_close(model(image), plain[0] + 0.5 * plain[1].amax(1))


def test_a_box_reaches_fine_tokens_of_its_rows_and_columns():
    """Of an odd grid, too: tokens that are all alike inside an image say which image they are of."""
    model = small().eval()
    given = []
    model.network[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    image = torch.randn(2, 3, 72, 40, dtype=torch.float64)
    x = model.stem(image)
    scores = model.forward_train(image, box=(1, 0, 5, 1))[1]
    inside = torch.zeros(9, 5, dtype=torch.bool)
    inside[2:10, 0:2] = True
    expected = torch.where(inside[:, :, None], x.flip(0), x)
    assert_close(given[-1], expected)
    assert scores.shape == (2, 5 * 3, 5) and torch.equal(x, model.stem(image))


def test_mixing_twice_gives_the_batch_back():
    x = torch.randn(3, 4, 5, 2)
    kept = x.clone()
    once = mixed(x, (1, 0, 3, 2))
    assert not torch.equal(once, x) and torch.equal(x, kept)
    assert torch.equal(mixed(once, (1, 0, 3, 2)), x)


def test_boxes():
    """Drawn boxes lie on the tokens and cover, where nothing is cut, half of them on average."""
    torch.manual_seed(0)
    boxes = torch.tensor([drawn_box(40, 60) for _ in range(2000)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 40).all() and (boxes[:, 3] <= 60).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    height, width = (boxes[:, 2:] - boxes[:, :2]).T
    whole = (boxes[:, 0] > 0) & (boxes[:, 1] > 0) & (boxes[:, 2] < 40) & (boxes[:, 3] < 60)
    assert whole.sum() > 200
    assert ((height / 40 - width / 60).abs()[whole] < 0.05).all()
    sides = torch.rand(200_000).sqrt()
    kept = sides - sides**2 / 4  # what is left of a side, on average, where its middle may be anywhere
    assert (height / 40).mean().item() == pytest.approx(kept.mean().item(), rel=0.05)


@pytest.mark.parametrize("box", [(0, 0, 5, 6), (-1, 0, 2, 2), (2, 0, 1, 2), (0, 3, 2, 7), (0, 3, 2, 2)])
def test_boxes_that_are_refused(box):
    with pytest.raises(ValueError, match=r"^box: \(.*\), must be \(first row, first column, end, end\) on 4 x 6 tok"):
        small().forward_train(torch.zeros(2, 3, 64, 96).double(), box=box)
    for none in (box[:3], (*box[:3], 0.5)):
        with pytest.raises(ValueError, match=r"^box: .*, must be four whole numbers"):
            small().forward_train(torch.zeros(2, 3, 64, 96).double(), box=none)
    with pytest.raises(ValueError, match=r"this network takes images"):
        small().forward_train(torch.zeros(2, 1, 64, 96).double())


def test_branches_may_be_skipped():
    """Rates grow from the first outlooker, but only transformer blocks have one, as in timm."""
    ours = small(drop_path_rate=0.4)
    rates = [
        [(b.drop_path1.rate, b.drop_path2.rate) for b in group] for group in (ours.network[1].blocks, *ours.network[2:])
    ]
    assert [r for group in rates for r in group] == [(pytest.approx(r),) * 2 for r in (0.1, 0.2, 0.3, 0.4)]
    others = [*ours.network[0], *ours.post_network]
    assert all(block.drop_path1.rate == block.drop_path2.rate == 0 for block in others)
    block = ours.network[3][0].train()
    x = torch.randn(40, 2, 3, 24, dtype=torch.float64)
    out = block(x)
    assert 3 < sum(torch.equal(one, other) for one, other in zip(out, x, strict=True)) < 17  # 0.16 of them


@pytest.mark.parametrize("train", ["__call__", "forward_train"])
def test_checkpoints_change_nothing(train):
    image, found = torch.randn(3, 3, 40, 56, dtype=torch.float64), []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        model = small(drop_path_rate=0.5).train()
        model.set_grad_checkpointing(checkpointed)
        calls = []
        for block in (model.network[0][0], model.network[1].blocks[0], model.network[3][0], model.post_network[1]):
            block.norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        out = getattr(model, train)(image)
        scores = [out] if train == "__call__" else out[:2]
        sum(s.square().sum() for s in scores).backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
        assert len(calls) == (8 if checkpointed else 4)
    assert all(value is not None for name, value in found[0].items() if train != "__call__")
    assert_close(found[0], found[1])


def test_training_compiles():
    model = small(drop_path_rate=0.5).train()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.compile(model, fullgraph=True, backend="aot_eager")(image).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
