"""ViT's weights as torchvision and transformers save them; timm's names are ours."""

from collections.abc import Mapping

import torch
from torch import Tensor

from glocal.models.keys import Source, renamed

_TORCHVISION = (  # theirs, ours
    ("class_token", "cls_token"),
    ("encoder.pos_embedding", "pos_embed"),
    ("conv_proj", "patch_embed.proj"),
    ("encoder.layers.encoder_layer_{i}.ln_1", "blocks.{i}.norm1"),
    ("encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight", "blocks.{i}.attn.qkv.weight"),
    ("encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias", "blocks.{i}.attn.qkv.bias"),
    ("encoder.layers.encoder_layer_{i}.self_attention.out_proj", "blocks.{i}.attn.proj"),
    ("encoder.layers.encoder_layer_{i}.ln_2", "blocks.{i}.norm2"),
    ("encoder.layers.encoder_layer_{i}.mlp.0", "blocks.{i}.mlp.fc1"),
    ("encoder.layers.encoder_layer_{i}.mlp.3", "blocks.{i}.mlp.fc2"),
    ("encoder.ln", "norm"),
    ("heads.head", "head"),
)
_TRANSFORMERS = (  # as in files; queries, keys and values are maps of their own
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("vit.encoder.layer.{i}.layernorm_before", "blocks.{i}.norm1"),
    ("vit.encoder.layer.{i}.attention.attention.query", "blocks.{i}.attn.q"),
    ("vit.encoder.layer.{i}.attention.attention.key", "blocks.{i}.attn.k"),
    ("vit.encoder.layer.{i}.attention.attention.value", "blocks.{i}.attn.v"),
    ("vit.encoder.layer.{i}.attention.output.dense", "blocks.{i}.attn.proj"),
    ("vit.encoder.layer.{i}.layernorm_after", "blocks.{i}.norm2"),
    ("vit.encoder.layer.{i}.intermediate.dense", "blocks.{i}.mlp.fc1"),
    ("vit.encoder.layer.{i}.output.dense", "blocks.{i}.mlp.fc2"),
    ("vit.layernorm", "norm"),
    ("classifier", "head"),
)
_SINCE_5 = (  # names that modules of transformers 5 have; its files have those above
    ("vit.layers.{i}.layernorm_before", "blocks.{i}.norm1"),
    ("vit.layers.{i}.attention.q_proj", "blocks.{i}.attn.q"),
    ("vit.layers.{i}.attention.k_proj", "blocks.{i}.attn.k"),
    ("vit.layers.{i}.attention.v_proj", "blocks.{i}.attn.v"),
    ("vit.layers.{i}.attention.o_proj", "blocks.{i}.attn.proj"),
    ("vit.layers.{i}.layernorm_after", "blocks.{i}.norm2"),
    ("vit.layers.{i}.mlp", "blocks.{i}.mlp"),
)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names.

    Raises:
        ValueError: a name that torchvision's network does not have.
    """
    return renamed(state, _TORCHVISION)


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under torchvision's names, which has none for `fc_norm`."""
    return renamed(state, [(ours, theirs) for theirs, ours in _TORCHVISION])


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `ViTForImageClassification` under our names; its three linear maps become one.

    Raises:
        ValueError: a name that transformers' network does not have, or not all three maps.
    """
    found = renamed(state, _TRANSFORMERS + _SINCE_5)
    for name in [name for name in found if ".attn.q." in name]:
        parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if missing := [part for part in parts if part not in found]:
            raise ValueError(f"{missing[0]} is missing")
        found[name.replace(".q.", ".qkv.")] = torch.cat([found.pop(part) for part in parts])
    return found


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names in files of `ViTForImageClassification`, which has none for `fc_norm`."""
    found = dict(state)
    for name in state:
        if ".attn.qkv." in name:
            for part, own in zip("qkv", found.pop(name).chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}.")] = own
    return renamed(found, [(ours, theirs) for theirs, ours in _TRANSFORMERS])


SOURCES = {
    "torchvision": Source("class_token", from_torchvision, to_torchvision),
    "transformers": Source("vit.embeddings.cls_token", from_transformers, to_transformers),
}
