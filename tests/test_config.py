"""What a run is made of: what makes no sense is refused, wherever it comes from."""

import pytest

from glocal.config import ModelConfig, TrainConfig


def test_what_makes_no_sense_is_refused_in_a_program_too():
    with pytest.raises(ValueError, match=r"^batch_size: 0; it must be at least 1$"):
        TrainConfig(batch_size=0)
    with pytest.raises(ValueError, match=r"^positions: 'a.py:Net\(\)' is a whole network"):
        ModelConfig(model="a.py:Net()", positions=False)


def test_the_name_of_a_network():
    assert ModelConfig("C-T").name == "C-T" and ModelConfig(model="timm:vit").name == "timm:vit"


def test_a_conversion_is_part_of_the_network():
    assert ModelConfig("C-T", convert="quadratic").name == "C-T as attention"
    assert ModelConfig(model="timm:vit", convert="learned", convert_alpha=3.0).name == "timm:vit as attention"
    gated = ModelConfig("C-T", convert="quadratic", convert_gated=True, convert_head_dim=4)
    assert gated.name == "C-T as gated attention" and gated.unconverted() == ModelConfig("C-T")
    with pytest.raises(ValueError, match="convert_head_dim: no head has a gate; give convert_gated too"):
        ModelConfig("C-T", convert="quadratic", convert_head_dim=4)
    with pytest.raises(ValueError, match="convert_head_dim: 0; it must be 1 or more"):
        ModelConfig("C-T", convert="quadratic", convert_gated=True, convert_head_dim=0)
    for options in ({"convert_alpha": 3.0}, {"convert_layers": ("stem.*",)}, {"convert_gated": True}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: nothing is converted; give convert too"):
            ModelConfig(**options)
    with pytest.raises(ValueError, match="convert_alpha: -1; it must be above 0"):
        ModelConfig(convert="quadratic", convert_alpha=-1)
