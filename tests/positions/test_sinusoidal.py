"""Sinusoidal encodings against loops from their formulas, and transformers' DETR where it is there."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from glocal.positions import (
    LearnedPositions,
    SinusoidalPositions1d,
    SinusoidalPositions2d,
    sinusoids,
)

from .tokens import EXACT, corner_valid, float64


def by_formula(place, dim, layout="interleaved", frequencies="vaswani", temperature=10000):
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)); fairseq: exp(-i * log(10000) / (d/2 - 1)), sines first."""
    row = []
    for i in range(dim // 2):
        if frequencies == "vaswani":
            angle = place / temperature ** (2 * i / dim)
        else:
            angle = place * math.exp(-i * math.log(temperature) / (dim // 2 - 1))
        row += [math.sin(angle), math.cos(angle)]
    return row if layout == "interleaved" else row[::2] + row[1::2]


LAYOUTS = [("interleaved", "vaswani"), ("halves", "fairseq"), ("halves", "vaswani"), ("interleaved", "fairseq")]


@pytest.mark.parametrize(("layout", "frequencies"), LAYOUTS)
@pytest.mark.parametrize("temperature", [10000, 20])
def test_sinusoids_are_the_formula(layout, frequencies, temperature):
    places = torch.tensor([[0, 1, 2.5], [-3, 700, 1]], dtype=torch.float64)
    found = sinusoids(places, 6, layout=layout, frequencies=frequencies, temperature=temperature)
    expected = [[by_formula(p, 6, layout, frequencies, temperature) for p in row] for row in places.tolist()]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
    for dtype in (torch.bfloat16, torch.int64):
        few = torch.tensor([3, 200]).to(dtype)
        assert_close(sinusoids(few, 6), sinusoids(few.float(), 6), rtol=0, atol=0)


@pytest.mark.parametrize(("layout", "frequencies"), LAYOUTS)
def test_a_sequence_is_the_formula_from_its_offset_on(layout, frequencies):
    encode = SinusoidalPositions1d(8, layout=layout, frequencies=frequencies)
    found = encode(float64(3, 5, 8), offset=40)
    expected = [by_formula(p, 8, layout, frequencies) for p in range(40, 45)]
    assert_close(found, torch.tensor([expected], dtype=torch.float64), **EXACT)
    each = encode(float64(2, 5, 8), offset=torch.tensor([40, 0]))
    assert_close(each[:1], found, **EXACT)
    assert_close(each[1:], encode(float64(1, 5, 8)), **EXACT)


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_steps_of_decoding_get_what_the_whole_sequence_gets(name):
    learned = LearnedPositions(8, grid_size=(9,), resize=False).double()
    encode = SinusoidalPositions1d(8) if name == "sinusoidal" else learned
    x = float64(2, 7, 8)
    whole = encode(x)
    steps = [encode(x[:, start:end], offset=start) for start, end in ((0, 3), (3, 4), (4, 7))]
    assert_close(torch.cat(steps, 1), whole, **EXACT)
    assert whole.unique(dim=1).shape[1] == 7


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_only_real_tokens_count_in_a_sequence(name):
    """fairseq's rule: the number of a token is that of the real ones before it; padding gets zeros."""
    learned = LearnedPositions(8, grid_size=(9,), resize=False).double()
    encode = SinusoidalPositions1d(8) if name == "sinusoidal" else learned
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, False, False], [False] * 5])
    found = encode(float64(3, 5, 8), valid=valid, offset=2)
    alone = encode(float64(1, 3, 8), offset=2)[0]
    assert_close(found[0, 2:], alone, **EXACT)
    assert_close(found[1, :3], alone, **EXACT)
    assert (found[~valid] == 0).all()


def test_fairseq_numbers_words_from_2_on():
    """Its table, padding symbol 1: words are 2, 3, ... whichever end is padded."""
    dim, padding = 6, 1
    tokens = torch.tensor([[1, 1, 5, 7, 9], [5, 7, 9, 4, 1]])
    half = dim // 2
    wave = torch.exp(torch.arange(half).double() * -(math.log(10000) / (half - 1)))
    angle = torch.arange(8).double()[:, None] * wave
    table = torch.cat([angle.sin(), angle.cos()], 1)
    table[padding] = 0
    real = tokens.ne(padding)
    numbers = real.cumsum(1) * real + padding
    encode = SinusoidalPositions1d(dim, layout="halves", frequencies="fairseq")
    assert_close(encode(float64(2, 5, dim), valid=real, offset=2), table[numbers], **EXACT)


def detr_by_loop(valid, dim, normalize, scale, temperature):
    """One pixel at a time: how many real ones there are above and to the left, itself included."""
    images = []
    for mask in valid:
        height, width = mask.shape
        rows = []
        for y, x in itertools.product(range(height), range(width)):
            down, right = int(mask[: y + 1, x].sum()), int(mask[y, : x + 1].sum())
            if normalize:
                down = down / (int(mask[:, x].sum()) + 1e-6) * scale
                right = right / (int(mask[y].sum()) + 1e-6) * scale
            rows.append([by_formula(place, dim // 2, temperature=temperature) for place in (down, right)])
        images.append(torch.tensor(rows, dtype=torch.float64).view(height, width, dim))
    return torch.stack(images)


DETR = [(True, 2 * math.pi, 10000), (True, 1.5, 20), (False, 2 * math.pi, 10000)]


@pytest.mark.parametrize(("normalize", "scale", "temperature"), DETR)
def test_an_image_is_detrs_by_loop(normalize, scale, temperature):
    encode = SinusoidalPositions2d(12, normalize=normalize, scale=scale, temperature=temperature)
    valid = corner_valid((4, 5), (4, 5), (2, 3))
    valid[1, 0, 1] = False  # a hole, and pixels that no rectangle holds
    expected = detr_by_loop(valid, 12, normalize, scale, temperature)
    assert_close(encode(float64(2, 4, 5, 12), valid=valid), expected, **EXACT)
    assert_close(encode(float64(2, 4, 5, 12)), expected[:1], **EXACT)


def test_numbers_of_detrs_released_code():
    """Of a run of it: 256 channels, 4 x 5, normalised."""
    found = SinusoidalPositions2d(256)(torch.zeros(1, 4, 5, 256))
    assert_close(found[0, 0, 0, :4], torch.tensor([1.0, 3.1e-7, 0.97792, 0.20899]), atol=2e-5, rtol=0)
    assert_close(found[0, 0, 0, 128:132], torch.tensor([0.9511, 0.3090, 0.8858, 0.4641]), atol=1e-4, rtol=0)
    assert abs(found.sum().item() - 2495.843) < 1e-2


@pytest.mark.parametrize(("normalize", "scale", "temperature"), DETR)
def test_an_image_is_transformers_detr(normalize, scale, temperature):
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    theirs = detr.DetrSinePositionEmbedding(6, temperature, normalize, scale if normalize else None)
    encode = SinusoidalPositions2d(12, normalize=normalize, scale=scale, temperature=temperature)
    x, valid = float64(2, 4, 5, 12), corner_valid((4, 5), (4, 3), (2, 5))
    for mask in (None, valid):
        expected = theirs((2, 12, 4, 5), x.device, x.dtype, mask).movedim(1, -1)
        assert_close(encode(x, valid=mask).expand_as(x), expected, **EXACT)


def test_an_image_gets_the_same_alone_as_padded():
    encode = SinusoidalPositions2d(8)
    valid = corner_valid((5, 6), (3, 6), (5, 2))
    found = encode(float64(2, 5, 6, 8), valid=valid)
    assert_close(found[:1, :3], encode(float64(1, 3, 6, 8)), **EXACT)
    assert_close(found[1:, :, :2], encode(float64(1, 5, 2, 8)), **EXACT)


FAULTS = {
    (
        "positions/sinusoidal.py",
        "positions/test_sinusoidal.py",
        "positions/test_every_encoding.py",
        "positions/test_with_attention.py",
    ): (
        ("every layout is interleaved", 'if layout == "interleaved" else torch.cat(both, -1)', "if True else None"),
        ("cosines come before sines", "both = angle.sin(), angle.cos()", "both = angle.cos(), angle.sin()"),
        ("fairseq's rule is Vaswani's", '(half if frequencies == "vaswani" else half - 1)', "half"),
        ("frequencies rise", "temperature**-share", "temperature**share"),
        (
            "frequencies are in the dtype of the places",
            "torch.arange(half, device=places.device).to(dtype)",
            "torch.arange(half, device=places.device).to(places.dtype)",
        ),
        (
            "places are in the dtype of the tokens",
            "return torch.promote_types(x.dtype, torch.float32)",
            "return x.dtype",
        ),
        ("rows and columns count from 0", "torch.arange(1, height + 1, device", "torch.arange(height, device"),
        ("columns are counted along columns", "for axis in (1, 2))", "for axis in (2, 1))"),
        ("rows are a share of the first", "row / (row[:, -1:] +", "row / (row[:, :1] +"),
        ("columns are a share of the image's rows", "column / (column[:, :, -1:] +", "column / (row[:, -1:] +"),
        ("the column comes before the row", "for place in (row, column)]", "for place in (column, row)]"),
        ("each axis has the frequencies of all channels", "self.dim // 2, temperature=", "self.dim, temperature="),
        ("padding is encoded", "encoding.masked_fill(~tokens.valid[..., None], 0)", "encoding"),
        ("the temperature is not used in images", "self.dim // 2, temperature=self.temperature)", "self.dim // 2)"),
    ),
}
