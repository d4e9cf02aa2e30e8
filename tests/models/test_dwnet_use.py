"""DWNet in use: images of any size, what users of timm know, training, looking into it, mistakes."""

import pytest
import torch
from torch.testing import assert_close

import glocal

from .dwnet_release import DIMS, RELEASED, VARIANTS, small

FAULTS = {
    "models/dwnet.py": (
        (
            "maps of the branch start as those of the MLP",
            "                part.reset_parameters()",
            "                pass",
        ),
        ("mixers are never skipped", "self.drop_path1(self.attn(x))", "self.attn(x)"),
        ("MLPs are never skipped", "self.drop_path2(self.mlp(", "(self.mlp("),
        ("groups are dropped in silence", "if groups and not", "if False and not"),
    ),
}


# Any image


@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448)])
@pytest.mark.parametrize("name", [*RELEASED, *VARIANTS])
def test_any_size(name, size):
    model = small(name, depths=(1, 1), **({"num_groups": DIMS} if "unshared" in name else {})).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    fine = tuple(-(-side // 4) for side in size)
    assert [tuple(m.shape[2:]) for m in maps] == [fine, tuple(-(-side // 2) for side in fine)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", ["dwnet_tiny", "local_mlp_tiny"])
def test_images_are_completed_by_zeros(name):
    model = small(name).double().eval()
    for height, width in ((33, 22), (1, 1)):
        image = torch.randn(2, 3, height, width, dtype=torch.float64)
        whole = torch.zeros(2, 3, -(-height // 4) * 4, -(-width // 4) * 4, dtype=torch.float64)
        whole[:, :, :height, :width] = image
        assert_close(model(image), model(whole))


def test_convolutions_move_with_the_image():
    """Away from the border; windows do not."""
    image = torch.zeros(1, 3, 160, 160, dtype=torch.float64)
    image[:, :, 64:96, 64:96] = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for name, moves in (("dwnet_tiny", True), ("i_d_dwnet_tiny", True), ("local_mlp_tiny_post_bn", False)):
        model = small(name, depths=(1, 1)).double().eval()
        one, other = (
            model.forward_intermediates(x, [1], intermediates_only=True)[0]
            for x in (image, image.roll((8, 16), (2, 3)))
        )
        # a border reaches five tokens in, and two more where it was moved
        same = torch.allclose(one.roll((1, 2), (2, 3))[..., 7:-7, 7:-7], other[..., 7:-7, 7:-7], atol=1e-9)
        assert same is moves


# What users of timm know


def test_methods():
    model = small("dwnet_tiny").eval()
    image = torch.randn(2, 3, 24, 16)
    tokens = model.forward_features(image)
    assert tokens.shape == (2, 3, 2, 16)
    assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean((1, 2)))
    assert_close(model(image), model.forward_head(tokens))
    features = small("dwnet_tiny", features_only=True, out_indices=(0,)).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert_close(features(image)[0], model.forward_intermediates(image, [0])[1][0])
    assert not any(name.startswith(("model.layers.1", "model.norm", "model.head")) for name in features.state_dict())
    model.reset_classifier(0)
    assert_close(model(image), tokens.mean((1, 2)))


def test_first_values():
    """Those of the branch that is convolutions in the release are PyTorch's own, those of the MLP are not."""
    torch.manual_seed(0)
    block = glocal.create_model("d_dwnet_tiny", dims=(96,), depths=(1,)).layers[0].blocks[0]
    for part, chans in ((block.attn.conv1, 96), (block.attn.conv2, 96), (block.attn.mixer.conv2, 24)):
        assert abs(part.weight.std().item() * (3 * chans) ** 0.5 - 1) < 0.05
    assert block.attn.mixer.conv2.bias.any()
    assert abs(block.mlp.fc1.weight.std().item() - 0.02) < 1e-3 and not block.mlp.fc1.bias.any()


@pytest.mark.parametrize("name", ["dwnet_tiny", "local_mlp_tiny"])
def test_blocks_may_be_skipped(name):
    model = small(name, drop_path_rate=0.3, depths=(1, 3))
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [b.drop_path1.rate for b in blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    block = small(name, drop_path_rate=0.999).layers[1].blocks[1]
    x = torch.randn(4, 5, 5, 16)
    assert torch.equal(block(x), x) and not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("name", RELEASED)
def test_checkpoints_change_nothing(name):
    """Gradients, and statistics that have seen the batch once."""
    image, found = torch.randn(3, 3, 24, 16), []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        model = small(name, drop_path_rate=0.5)
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)
        model(image).square().sum().backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())))
    assert_close(found[0], found[1])
    assert all(int(b) == 1 for name, b in found[1][1].items() if name.endswith("tracked"))


@pytest.mark.parametrize(("name", "groups"), [("i_d_dwnet_tiny", (4,)), ("local_mlp_tiny", (4,))])
def test_compiles(name, groups):
    model = glocal.create_model(name, dims=(8,), depths=(1,), num_groups=groups, num_classes=3).eval()
    image = torch.randn(2, 3, 24, 16)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), model(image))


def test_blocks_can_be_looked_into():
    model = small("i_d_dwnet_tiny")
    before = {name: buffer.clone() for name, buffer in model.eval().named_buffers()}
    with glocal.inspect(model) as seen:
        model(torch.randn(2, 3, 24, 16))
    assert [call.name for call in seen] == [f"layers.{i}.blocks.{j}.attn.mixer" for i, j in ((0, 0), (1, 0), (1, 1))]
    assert all(call.rebuild_error() < 1e-5 for call in seen)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("d_dwnet_tiny", {"kernel_size": 8}, "^d_dwnet_tiny: .*kernel_size: 8, must be odd"),
        ("dwnet_tiny", {"kernel_size": 0}, "^dwnet_tiny: kernel_size: 0"),
        ("dwnet_tiny", {"num_groups": (3, 6, 12, 25)}, "^dwnet_tiny: .*num_groups: 25 does not divide 768 channels"),
        ("d_dwnet_tiny", {"num_groups": (3, 6, 12, 24)}, "num_groups: 3, was given; DynamicDepthwiseConv has"),
        ("i_d_dwnet_tiny", {"num_groups": (5, 6, 12, 24)}, "num_groups: 5 does not divide dim 96"),
        ("i_d_dwnet_tiny", {"num_groups": (3, 6)}, r"^i_d_dwnet_tiny: num_groups: \(3, 6\), must have one number"),
        ("local_mlp_tiny", {"block": "bn"}, "^local_mlp_tiny: block: 'bn', must be 'post_bn' or 'pre_ln'"),
        ("local_mlp_tiny", {"depths": (2, 2)}, r"^local_mlp_tiny: depths: \(2, 2\), must have"),
        ("dwnet_tiny", {"window_size": 7}, "^dwnet_tiny: has no argument 'window_size'"),
        ("dwnet_tiny", {"img_size": "large"}, "^dwnet_tiny: img_size"),
    ],
)
def test_what_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        glocal.create_model(name, **arguments)


def test_a_single_image_in_training():
    with pytest.raises(ValueError, match="one value per channel in training"):
        small("d_dwnet_tiny")(torch.randn(1, 3, 16, 16))
