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
