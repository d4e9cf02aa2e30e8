"""DWNet's released network, written out from its definition, and ours as small as it."""

import torch
import torch.nn.functional as F

import glocal

RELEASED = ("dwnet_tiny", "d_dwnet_tiny", "i_d_dwnet_tiny")
VARIANTS = (
    *("dwnet_tiny_pre_ln", "dwnet_tiny_shared_channels", "local_mlp_tiny", "local_mlp_tiny_shared_positions"),
    *("local_mlp_tiny_post_bn", "local_mlp_tiny_post_bn_unshared"),
)
DIMS, DEPTHS, GROUPS, CLASSES = (8, 16), (1, 2), (4, 4), 3
SMALL = {"dims": DIMS, "depths": DEPTHS, "num_classes": CLASSES}


def official_state(name, dims=DIMS, depths=DEPTHS, groups=4, kernel=7):
    """Random weights under the release's names and in its order."""
    shapes = {"patch_embed.proj.weight": (dims[0], 3, 4, 4), "patch_embed.proj.bias": (dims[0],)}

    def norm(name, dim, batch=True):
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})
        if batch:
            shapes.update({f"{name}.{what}": (dim,) for what in ("running_mean", "running_var")})
            shapes[f"{name}.num_batches_tracked"] = None

    norm("patch_embed.norm", dims[0], batch=False)
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            own, few = f"{block}.attn2conv", dim // 4
            shapes[f"{own}.conv0.weight"] = (dim, dim, 1, 1)
            norm(f"{own}.bn0", dim)
            if name.startswith("dwnet"):
                shapes |= {f"{own}.conv.weight": (dim, 1, kernel, kernel), f"{own}.conv.bias": (dim,)}
            elif name.startswith("d_"):
                shapes |= {f"{own}.conv.bias": (dim,), f"{own}.conv.conv1.weight": (few, dim, 1, 1)}
                norm(f"{own}.conv.bn", few)
                shapes[f"{own}.conv.conv2.weight"] = (dim * kernel**2, few, 1, 1)
                shapes[f"{own}.conv.conv2.bias"] = (dim * kernel**2,)
            else:
                shapes |= {f"{own}.conv.conv1.0.weight": (few, dim, 1, 1), f"{own}.conv.conv1.0.bias": (few,)}
                norm(f"{own}.conv.conv1.1", few)
                shapes[f"{own}.conv.conv2.0.weight"] = (groups * kernel**2, few, 1, 1)
                shapes[f"{own}.conv.conv2.0.bias"] = (groups * kernel**2,)
            norm(f"{own}.bn", dim)
            shapes[f"{own}.conv2.weight"] = (dim, dim, 1, 1)
            norm(f"{own}.bn2", dim)
            for part, (out, width) in {"fc1": (4 * dim, dim), "fc2": (dim, 4 * dim)}.items():
                shapes |= {f"{block}.mlp.{part}.weight": (out, width), f"{block}.mlp.{part}.bias": (out,)}
            norm(f"{block}.bn", dim)
        if i + 1 < len(dims):
            shapes[f"layers.{i}.downsample.reduction.weight"] = (dims[i + 1], 4 * dim)
            norm(f"layers.{i}.downsample.norm", 4 * dim, batch=False)
    norm("norm", dims[-1], batch=False)
    shapes |= {"head.weight": (CLASSES, dims[-1]), "head.bias": (CLASSES,)}
    state = {}
    for key, shape in shapes.items():
        if shape is None:
            state[key] = torch.tensor(3)
            continue
        tensor = torch.randn(shape, dtype=torch.float64)
        if len(shape) > 1:
            tensor /= tensor[0].numel() ** 0.5
        elif key.endswith("running_var"):
            tensor = tensor.square() + 0.5
        else:
            tensor = 0.3 * tensor + ("weight" in key)
        state[key] = tensor
    return state


def released(state, images, training, groups=4, kernel=7):
    """Logits of images; in training by the statistics of the batch."""

    def batch_norm(name, x):
        mean, variance = (state[f"{name}.running_{what}"].clone() for what in ("mean", "var"))
        return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"], training)

    def layer_norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, x, **more):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **more)

    def mixed(own, x):
        batch, dim, height, width = x.shape
        if f"{own}.conv.weight" in state:
            return conv(f"{own}.conv", x, groups=dim, padding=kernel // 2)
        if f"{own}.conv.bias" in state:
            hidden = batch_norm(f"{own}.conv.bn", conv(f"{own}.conv.conv1", x.mean((2, 3), keepdim=True)))
            kernels = conv(f"{own}.conv.conv2", hidden.relu()).view(batch * dim, 1, kernel, kernel)
            flat = x.reshape(1, batch * dim, height, width)
            out = F.conv2d(flat, kernels, padding=kernel // 2, groups=batch * dim).view(x.shape)
            return out + state[f"{own}.conv.bias"].view(1, -1, 1, 1)
        hidden = batch_norm(f"{own}.conv.conv1.1", conv(f"{own}.conv.conv1.0", x)).relu()
        kernels = conv(f"{own}.conv.conv2.0", hidden).view(batch, groups, 1, kernel**2, height, width)
        slots = F.unfold(x, kernel, padding=kernel // 2).view(batch, groups, dim // groups, kernel**2, height, width)
        return (kernels * slots).sum(3).view(x.shape)

    x = conv("patch_embed.proj", images, stride=4)
    x = layer_norm("patch_embed.norm", x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            own = f"{block}.attn2conv"
            y = batch_norm(f"{own}.bn0", conv(f"{own}.conv0", x)).relu()
            y = batch_norm(f"{own}.bn", mixed(own, y)).relu()
            x = x + batch_norm(f"{own}.bn2", conv(f"{own}.conv2", y))
            y = batch_norm(f"{block}.bn", x).permute(0, 2, 3, 1)
            y = F.gelu(F.linear(y, state[f"{block}.mlp.fc1.weight"], state[f"{block}.mlp.fc1.bias"]))
            y = F.linear(y, state[f"{block}.mlp.fc2.weight"], state[f"{block}.mlp.fc2.bias"])
            x = x + y.permute(0, 3, 1, 2)
        if i + 1 < len(DEPTHS):
            four = [x[:, :, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
            y = layer_norm(f"layers.{i}.downsample.norm", torch.cat(four, 1).permute(0, 2, 3, 1))
            x = (y @ state[f"layers.{i}.downsample.reduction.weight"].T).permute(0, 3, 1, 2)
    x = layer_norm("norm", x.flatten(2).transpose(1, 2)).mean(1)
    return x @ state["head.weight"].T + state["head.bias"]


def small(name, **more):
    groups = {"num_groups": GROUPS} if name.startswith(("i_d", "local", "dwnet_tiny_shared")) else {}
    return glocal.create_model(name, **{**SMALL, **groups, **more})
