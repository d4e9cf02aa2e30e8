"""LESA-ResNet against the released network, written out from its definition, and published sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.lesa import from_official, to_official

GROUPS, CLASSES = 2, 3
SMALL = {"dims": (4, 4, 8, 16), "depths": (1, 1, 2, 2), "num_groups": GROUPS, "num_classes": CLASSES, "img_size": 64}
KINDS = ("lesa_resnet50", "sa_resnet50", "lesa_resnet50_detection", "sa_resnet50_detection", "deformable_resnet50")

FAULTS = {
    "models/lesa.py": (
        ("attention begins a block early", "> (len(strides) - 2, 0)", ">= (len(strides) - 2, 0)"),
        ("attention begins a block late", "> (len(strides) - 2, 0)", "> (len(strides) - 2, 1)"),
        ("attention is in the last stage alone", "> (len(strides) - 2, 0)", "> (len(strides) - 2, 9)"),
        ("tables are those of the tokens that go out", "stage + (number > 0)", "stage + 1"),
        ("tables are those of the stage before", "stage + (number > 0)", "stage"),
        ("tables have one size too few", "(n + step - 1) // step", "n // step"),
        ("there is a norm behind attention", "return mixer, nn.Identity()", "return mixer, nn.BatchNorm2d(width)"),
        ("attention has no stride", "unary=unary,\n                    stride=stride,", "unary=unary,"),
        ("deformable convolutions have no stride", '"DeformableConv", width, stride=stride', '"DeformableConv", width'),
        ("deformable convolutions are modulated", "modulated=False, bias=False", "bias=False"),
        ("deformable convolutions have a bias", "modulated=False, bias=False", "modulated=False"),
        ("the first stage's are deformable, too", "if deformable and stage:", "if deformable:"),
        ("self-attention has a local term", 'None if attention == "self" else', ""),
        ("LESA's convolutions are not deformable", '"deformable" if deformable else', ""),
        ("groups are always 8", "num_groups=num_groups,", ""),
        ("positions are those of classification", "position=position,", ""),
        ("the last stage is coarser in classification", "Sequence[int] = (1, 2, 2, 1)", "Sequence[int] = (1, 2, 2, 2)"),
        ("HTC's images are Mask R-CNN's", '_WIDE, img_size=1280),\n    "sa_r', '_WIDE, img_size=1024),\n    "sa_r'),
    ),
    "models/keys/lesa.py": (
        ("constants are weights", "if not name.endswith(_INDEX)", "if True"),
        ("the maps of the gate stay convolutions", r"x_transform\.1|reasoning\.1|projection\.0", r"x_transform\.1"),
        ("queries are written as images", "tensor = tensor[:, :, None]\n", "tensor = tensor[:, :, None, None]\n"),
        ("offsets are those from the query to the source", "(place[:, None] - place + ", "(place - place[:, None] + "),
        ("self-attention alone is written in silence", 'if f"{layer}x_transform.0.weight" not in state:', "if False:"),
        ("files of the release are not known", 'Source("layer3.1.conv2.flatten', 'Source("layer3.1.flatten'),
    ),
    "models/pretrained.py": (
        ("DataParallel's names are unknown", 'if all(name.startswith("module.")', 'if all(name.startswith("modul-")'),
    ),
    "checkpoint.py": (("the release's weights are not found", '"model_state_dict", "net")', '"model_state_dict")'),),
}  # fmt: skip


# The released network, from its definition


def official_state(kind="lesa", position="classification", deformable=False, strides=(1, 2, 2, 1), **sizes):
    """Random weights under the release's names and in its order."""
    dims, depths, side = (sizes.get(name, SMALL[name]) for name in ("dims", "depths", "img_size"))
    shapes = {}

    def norm(name, dim):
        shapes.update({f"{name}.{what}": (dim,) for what in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = None

    def moved(name, dim):
        if deformable:
            shapes.update({f"{name}.conv_offset.weight": (18, dim, 3, 3), f"{name}.conv_offset.bias": (18,)})

    def attention(own, dim, grid):
        part = dim // GROUPS // 2
        if position == "classification":
            shapes[f"{own}.relative"] = (4 * part, 2 * grid**2 - 1)
            if kind == "lesa":
                shapes[f"{own}.flatten_index"] = None
        else:
            shapes.update({f"{own}.rel_height": (2 * grid - 1, part), f"{own}.rel_width": (2 * grid - 1, part)})
        shapes[f"{own}.qkv_transform.weight"] = (2 * dim, dim, 1)
        norm(f"{own}.bn_qkv", 2 * dim)
        both = position == "classification"
        norm(f"{own}.bn_similarity", (3 if both else 2) * GROUPS)
        norm(f"{own}.bn_output", (2 if both else 1) * dim)
        if kind != "lesa":
            return
        shapes[f"{own}.x_transform.0.weight"] = (dim, dim // GROUPS, 3, 3)
        moved(f"{own}.x_transform.0", dim)
        shapes[f"{own}.x_transform.1.weight"] = (dim, dim, 1, 1)
        norm(f"{own}.bn_x", dim)
        shapes[f"{own}.reasoning.1.weight"] = (dim, 2 * dim, 1, 1)
        norm(f"{own}.reasoning.2", dim)
        shapes[f"{own}.projection.0.weight"] = (dim, dim, 1, 1)
        norm(f"{own}.projection.1", dim)

    shapes["conv1.weight"] = (dims[0], 3, 7, 7)
    norm("bn1", dims[0])
    came, side = dims[0], -(-side // 4)
    for i, (dim, depth, stride) in enumerate(zip(dims, depths, strides, strict=True)):
        for j in range(depth):
            block = f"layer{i + 1}.{j}"
            shapes[f"{block}.conv1.weight"] = (dim, came, 1, 1)
            norm(f"{block}.bn1", dim)
            if kind is not None and (i == 3 or (i == 2 and j > 0)):
                attention(f"{block}.conv2", dim, side)
            else:
                shapes[f"{block}.conv2.weight"] = (dim, dim, 3, 3)
                if i > 0:
                    moved(f"{block}.conv2", dim)
                norm(f"{block}.bn2", dim)
            shapes[f"{block}.conv3.weight"] = (4 * dim, dim, 1, 1)
            norm(f"{block}.bn3", 4 * dim)
            if j == 0:
                shapes[f"{block}.downsample.0.weight"] = (4 * dim, came, 1, 1)
                norm(f"{block}.downsample.1", 4 * dim)
                side = -(-side // stride)
            came = 4 * dim
    shapes |= {"fc.weight": (CLASSES, 4 * dims[-1]), "fc.bias": (CLASSES,)}
    state = {}
    for key, shape in shapes.items():
        if key.endswith("flatten_index"):
            count = (state[key.replace("flatten_index", "relative")].shape[1] + 1) // 2
            state[key] = torch.tensor([i - j + count - 1 for i in range(count) for j in range(count)])
        elif shape is None:
            state[key] = torch.tensor(3)
        else:
            tensor = torch.randn(shape, dtype=torch.float64)
            if len(shape) > 1 and "rel" not in key:
                tensor *= (2 / tensor[0].numel()) ** 0.5
            elif key.endswith("running_var"):
                tensor = tensor.square() + 0.5
            elif len(shape) == 1:
                tensor = 0.3 * tensor + ("weight" in key)
            if "conv_offset" in key:  # with large moves gradients are as large as they are rough
                tensor *= 0.1
            state[key] = tensor
    return state


def released(state, images, training, strides):
    """Logits of images; in training by the statistics of the batch."""

    def norm(name, x):
        mean, variance = (state[f"{name}.running_{what}"].clone() for what in ("mean", "var"))
        return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"], training)

    def conv3x3(name, x, stride, groups=1):
        weight = state[f"{name}.weight"]
        if f"{name}.conv_offset.weight" not in state:
            return F.conv2d(x, weight, stride=stride, padding=1, groups=groups)
        offset = (state[f"{name}.conv_offset.{part}"] for part in ("weight", "bias"))
        deform = pytest.importorskip("torchvision").ops.deform_conv2d
        return deform(x, F.conv2d(x, *offset, stride=stride, padding=1), weight, stride=stride, padding=1)

    def attention(own, x):
        batch, dim, height, width = x.shape
        count, part = height * width, dim // GROUPS // 2
        qkv = norm(f"{own}.bn_qkv", F.conv1d(x.flatten(2), state[f"{own}.qkv_transform.weight"]))
        q, k, v = qkv.view(batch, GROUPS, 4 * part, count).split([part, part, 2 * part], 2)
        maps, place = [torch.einsum("bgci,bgcj->bgij", q, k)], torch.arange(count)
        if f"{own}.relative" in state:
            table = F.interpolate(state[f"{own}.relative"][None], size=2 * count - 1, mode="linear")[0]
            of_pair = table[:, (place[:, None] - place + count - 1).flatten()].view(4 * part, count, count)
            of_q, of_k, of_v = of_pair.split([part, part, 2 * part])
            maps.append(torch.einsum("bgci,cij->bgij", q, of_q))
            maps.append(torch.einsum("bgci,cij->bgij", k, of_k).mT)
        else:
            tables = (state[f"{own}.rel_height"], state[f"{own}.rel_width"])
            of_row, of_column = (
                F.interpolate(t.T[None], size=2 * n - 1, mode="linear")[0].T
                for t, n in zip(tables, x.shape[2:], strict=True)
            )
            row, column = place // width, place % width
            of_pair = of_row[row - row[:, None] + height - 1] + of_column[column - column[:, None] + width - 1]
            maps.append(torch.einsum("bgci,ijc->bgij", q, of_pair))
        similarity = norm(f"{own}.bn_similarity", torch.cat(maps, 1)).unflatten(1, (len(maps), GROUPS)).sum(1)
        weights = similarity.softmax(-1)
        sums = [torch.einsum("bgij,bgcj->bgci", weights, v)]
        if len(maps) == 3:
            sums.append(torch.einsum("bgij,cij->bgci", weights, of_v))
        stacked = torch.stack(sums, 3).view(batch, len(sums) * dim, count)
        binary = norm(f"{own}.bn_output", stacked).view(batch, dim, len(sums), count).sum(2).view(x.shape)
        if f"{own}.bn_x.weight" not in state:
            return binary
        unary = F.conv2d(conv3x3(f"{own}.x_transform.0", x, 1, GROUPS), state[f"{own}.x_transform.1.weight"])
        unary = norm(f"{own}.bn_x", unary)
        gate = F.conv2d(torch.cat([unary, binary], 1).relu(), state[f"{own}.reasoning.1.weight"])
        gate = F.conv2d(norm(f"{own}.reasoning.2", gate).relu(), state[f"{own}.projection.0.weight"])
        return unary + norm(f"{own}.projection.1", gate).sigmoid() * binary

    x = norm("bn1", F.conv2d(images, state["conv1.weight"], stride=2, padding=3)).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for i, depth in enumerate(SMALL["depths"]):
        for j in range(depth):
            block, stride = f"layer{i + 1}.{j}", 1 if j else strides[i]
            y = norm(f"{block}.bn1", F.conv2d(x, state[f"{block}.conv1.weight"])).relu()
            if f"{block}.bn2.weight" in state:
                y = norm(f"{block}.bn2", conv3x3(f"{block}.conv2", y, stride))
            else:
                y = attention(f"{block}.conv2", y)
                y = F.avg_pool2d(y, stride, ceil_mode=True) if stride > 1 else y
            y = norm(f"{block}.bn3", F.conv2d(y.relu(), state[f"{block}.conv3.weight"]))
            if j == 0:
                x = norm(f"{block}.downsample.1", F.conv2d(x, state[f"{block}.downsample.0.weight"], stride=stride))
            x = (x + y).relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def small(name="lesa_resnet50", **more):
    return glocal.create_model(name, **{**SMALL, **more})


def state_of(name):
    more = {"deformable": True, "strides": (1, 2, 2, 2)} if name.endswith("detection") or name[0] == "d" else {}
    kind = None if name[0] == "d" else name.partition("_")[0]
    return official_state(kind, "detection" if name.endswith("detection") else "classification", **more)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
@pytest.mark.parametrize("name", KINDS)
def test_is_the_released_network(name, size, training):
    """Logits and every gradient, at the size of the tables and at another."""
    torch.manual_seed(3)
    state, strides = state_of(name), (1, 2, 2, 1) if name in KINDS[:2] else (1, 2, 2, 2)
    model = small(name).double().train(training)
    model.load_state_dict(from_official(state))
    ours = torch.randn(3, 3, *size, dtype=torch.float64)
    theirs = ours.clone().requires_grad_()
    ours.requires_grad_()
    leaves = {k: v.requires_grad_() for k, v in state.items() if v.is_floating_point() and "running" not in k}
    expected = released(state, theirs, training, strides)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [theirs, *leaves.values()], upstream)
    found = model(ours)
    found.backward(upstream)
    assert expected.abs().max() > 0.01
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert_close(ours.grad, expected_grads[0], rtol=1e-7, atol=1e-9 * expected_grads[0].abs().max().item())
    grads = from_official(dict(zip(leaves, expected_grads[1:], strict=True)))
    for key, parameter in model.named_parameters():
        largest = max(1, grads[key].abs().max().item())
        assert_close(parameter.grad, grads[key], rtol=1e-7, atol=1e-8 * largest, msg=lambda t, key=key: f"{key}\n{t}")
    assert len(grads) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["lesa_resnet50", "lesa_resnet50_detection"])
def test_weights_go_there_and_back(name, tmp_path):
    state = state_of(name)
    model = small(name).double()
    model.load_state_dict(from_official(state))
    back = to_official(model.state_dict())
    assert list(back) == list(state) and all(torch.equal(back[key], state[key]) for key in state)
    if name.endswith("detection"):
        return
    for found in (state, {"net": {f"module.{key}": value for key, value in state.items()}, "epoch": 94}):
        torch.save(found, tmp_path / "94.pth")
        loaded = small(name, pretrained=tmp_path / "94.pth").state_dict()
        assert all(torch.equal(loaded[key], value.float()) for key, value in model.state_dict().items())
    with pytest.raises(
        ValueError, match=r"weights of another network: .* has shape \(8, 511\), this network's \(8, 31\)"
    ):
        torch.save(official_state(img_size=256), tmp_path / "94.pth")
        small(name, pretrained=tmp_path / "94.pth")


def test_what_the_release_does_not_have():
    with pytest.raises(ValueError, match=r"^layer3\.1\.conv2: self-attention alone is not in the release"):
        to_official(small("sa_resnet50").state_dict())


def test_without_attention_it_is_torchvisions_network():
    resnet = pytest.importorskip("torchvision.models.resnet")
    theirs = resnet.ResNet(resnet.Bottleneck, [1, 1, 2, 2], num_classes=CLASSES).double().eval()
    dims = {"dims": (64, 128, 256, 512)}
    ours = small(attention=None, strides=(1, 2, 2, 2), **dims).double().eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 40, 56, dtype=torch.float64)
    assert_close(ours(image), theirs(image), rtol=1e-9, atol=1e-9)
    moved = small("deformable_resnet50", **dims).double().eval()  # taps that have not learned to move
    assert moved.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys == []
    assert_close(moved(image), theirs(image), rtol=1e-9, atol=1e-9)


# Published sizes

OFFSETS = sum(count * (9 * width * 18 + 18) for width, count in ((128, 4), (256, 6), (512, 3)))
WIDE_OFFSETS = sum(count * (9 * width * 18 + 18) for width, count in ((256, 4), (512, 6), (1024, 3)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lesa_resnet50", 23_777_512),
        ("lesa_wrn50", 61_145_896),
        ("sa_resnet50", 18_050_792),
        ("sa_wrn50", 38_272_808),
        ("lesa_resnet50(attention=None)", 25_557_032),
        ("deformable_resnet50", 25_557_032 + OFFSETS),
        ("deformable_wrn50", 68_883_240 + WIDE_OFFSETS),
        (  # the first block of the last stage has 64 x 64 tokens, the others 32 x 32
            "lesa_resnet50_detection",
            25_557_032 - 5 * 590_336 - 3 * 2_360_320 + 5 * 474_112 + 3 * 1_882_080 - 2 * 128 * 32 + OFFSETS,
        ),
        (
            "lesa_wrn50_detection(img_size=1024)",
            68_883_240 - 5 * 2_360_320 - 3 * 9_439_232 + 5 * 1_882_080 + 3 * 7_499_680 - 2 * 128 * 64 + WIDE_OFFSETS,
        ),
    ],
)
def test_parameters(name, parameters):
    with torch.device("meta"):
        model = glocal.create_model(name)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "giga"),
    [("lesa_resnet50", 6.178), ("sa_resnet50", 5.059), ("lesa_wrn50", 16.53), ("sa_wrn50", 12.05)],
)
def test_multiply_adds(name, giga):
    """Convolutions, linear maps, and the products of attention by its definition."""
    with torch.device("meta"):
        assert cost.macs(glocal.create_model(name), torch.zeros(1, 3, 224, 224)) == pytest.approx(giga * 1e9, rel=5e-4)


def test_stages_and_tables():
    with torch.device("meta"):
        model = glocal.create_model("lesa_resnet50", img_size=(220, 160))
        maps = model.forward_intermediates(torch.zeros(1, 3, 220, 160), intermediates_only=True)
        detector = glocal.create_model("lesa_resnet50_detection")
        htc = glocal.create_model("lesa_wrn50_detection")
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 55, 40), (512, 28, 20), (1024, 14, 10), (2048, 14, 10)]
    assert model.feature_info.reduction() == [4, 8, 16, 16] and detector.feature_info.reduction() == [4, 8, 16, 32]
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "qkv_transform")}
    assert list(layers) == [f"layer3.{j}.conv2" for j in range(1, 6)] + [f"layer4.{j}.conv2" for j in range(3)]
    assert {m.grid_size for m in layers.values()} == {(14, 10)}
    sides = [block.conv2.grid_size for block in (*detector.layer3[1:], *detector.layer4)]
    assert sides == [(64, 64)] * 6 + [(32, 32)] * 2
    assert htc.layer4[0].conv2.grid_size == (80, 80) and htc.layer4[1].conv2.grid_size == (40, 40)
    kinds = [type(block.conv2).__name__ for stage in detector.stages() for block in stage]
    assert kinds == ["Convolution"] * 3 + ["DeformableConv"] * 5 + ["LocallyEnhancedAttention"] * 8
    assert repr(detector.layer4[0].conv2) == (
        "LocallyEnhancedAttention(grid_size=(64, 64), position='detection', unary='deformable', stride=2)"
    )


def test_first_values():
    torch.manual_seed(0)
    model = glocal.create_model("deformable_resnet50", dims=(4, 64, 64, 64), depths=(1, 1, 1, 1))
    assert not any(b.any() for n, b in model.named_parameters() if "conv_offset" in n)
    assert model.layer2[0].conv2.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    lesa = glocal.create_model("lesa_resnet50", dims=(4, 8, 64, 64), depths=(1, 1, 1, 1)).layer4[0].conv2
    for tensor, std in (
        (lesa.qkv_transform.weight, 64**-0.5),
        (lesa.x_transform[0].weight, (2 / 576) ** 0.5),
        (lesa.relative, 8**-0.5),
    ):
        assert tensor.std().item() == pytest.approx(std, rel=0.05)
