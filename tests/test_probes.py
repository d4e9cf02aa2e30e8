"""Probes: each is what it says, and gives nothing away but what it asks for."""

import itertools

import numpy as np
import pytest
import torch

from glocal.data.recall import KEYS, PAIRS, VALUES, _glyphs, recall
from glocal.data.texture import OFFSETS, texture


def read_pairs(image):
    """Keys, values and the framed key of one recall image, found by looking at every place: an oracle of its own."""
    keys, values = _glyphs()
    pairs, framed = {}, []
    for top in range(1, image.shape[0] - 3):
        for left in range(1, image.shape[1] - 3):
            patch = image[top : top + 3, left : left + 3] == 255
            ring = image[top - 1 : top + 4, left - 1 : left + 4]
            for key in range(len(keys)):
                if not (patch == keys[key]).all():
                    continue
                if ring.shape == (5, 5) and (ring == 128).sum() == 16:
                    framed.append(key)
                beside = image[top : top + 3, left + 4 : left + 7] == 255
                for value in range(len(values)):
                    if beside.shape == (3, 3) and (beside == values[value]).all() and not (ring == 128).any():
                        pairs[key] = value
    return pairs, framed


@pytest.mark.parametrize("size", [24, 32])
def test_recall_asks_for_the_value_beside_the_framed_key(size):
    data = recall(train_size=60, test_size=60, size=size)
    for images, labels, fewest in (
        (data.test_images, data.test_labels, PAIRS),
        (data.train_images, data.train_labels, 1),
    ):
        assert images.shape == (60, 1, size, size)
        seen = set()
        for image, label in zip(images[:, 0].numpy(), labels.tolist(), strict=True):
            pairs, framed = read_pairs(image)
            assert len(framed) == 1
            assert pairs[framed[0]] == label
            # no value twice: else the one that is there most often would be a good guess
            assert len(set(pairs.values())) == len(pairs)
            seen.add(len(pairs))
        assert seen == set(range(fewest, PAIRS + 1))


@pytest.mark.parametrize("probe", [recall, texture])
def test_probes_are_seeded_and_their_splits_differ(probe):
    one, same, other = probe(train_size=200, test_size=100), probe(train_size=200, test_size=100), probe(seed=1)
    assert torch.equal(one.train_images, same.train_images) and torch.equal(one.test_labels, same.test_labels)
    assert not torch.equal(one.test_images, other.test_images[:100])
    train = {image.numpy().tobytes() for image in one.train_images}
    assert len(train) > 190 and not any(image.numpy().tobytes() in train for image in one.test_images)


@pytest.mark.parametrize("probe, classes", [(recall, VALUES), (texture, len(OFFSETS))])
def test_no_pixel_and_no_class_frequency_gives_the_answer_away(probe, classes):
    data = probe()
    assert data.train_images.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert len(data.classes) == classes and data.kind == "probe"
    for labels in (data.train_labels, data.test_labels):
        share = torch.bincount(labels, minlength=classes) / len(labels)
        assert torch.allclose(share, torch.full((classes,), 1 / classes), atol=0.04)
    # A linear classifier on pixels, by least squares: at chance, give or take four deviations of 1,000 answers.
    pixels, unseen = (x.flatten(1).double() / 255 for x in (data.train_images, data.test_images))
    wanted = torch.nn.functional.one_hot(data.train_labels).double()
    ridge = pixels.T @ pixels + 100 * torch.eye(pixels.shape[1], dtype=torch.float64)
    found = (unseen @ torch.linalg.solve(ridge, pixels.T @ wanted)).argmax(1)
    right = (found == data.test_labels).double().mean().item()
    chance = 1 / classes
    assert abs(right - chance) < 4 * (chance * (1 - chance) / len(found)) ** 0.5


def test_recall_glyphs_differ():
    for glyphs, count, inked in zip(_glyphs(), (KEYS, VALUES), (4, 5), strict=True):
        assert len(glyphs) == count and (glyphs.sum((1, 2)) == inked).all()
        assert min((a != b).sum() for i, a in enumerate(glyphs) for b in glyphs[:i]) >= 4


@pytest.mark.parametrize("size", [16, 30])
def test_recall_refuses_a_size_without_whole_cells(size):
    with pytest.raises(ValueError, match=rf"recall: size is {size}; it must be a multiple of 8 pixels and at least 24"):
        recall(size=size)


def agreement(image, down, across):
    """Correlation of the pixels of an image [H, W] with those an offset away, by NumPy."""
    height, width = image.shape
    here = image[max(0, -down) : height - max(0, down), max(0, -across) : width - max(0, across)]
    there = image[max(0, down) : height + min(0, down), max(0, across) : width + min(0, across)]
    return np.corrcoef(here.ravel(), there.ravel())[0, 1]


def test_texture_is_told_by_pixels_one_offset_apart():
    data = texture(train_size=1, test_size=300)
    images = data.test_images[:, 0].numpy().astype(float)
    found = [max(range(len(OFFSETS)), key=lambda i: agreement(image, *OFFSETS[i])) for image in images]
    assert found == data.test_labels.tolist()
    # co-occurrence of bright and dark tells as much as levels do
    binary = [max(range(len(OFFSETS)), key=lambda i: agreement(image > 127, *OFFSETS[i])) for image in images]
    assert np.mean(np.array(binary) == data.test_labels.numpy()) > 0.99
    assert data.classes == tuple(f"({down}, {across})" for down, across in OFFSETS)


def test_texture_shows_nothing_at_any_other_offset_nor_in_its_histogram():
    data = texture(train_size=1, test_size=300)
    images, labels = data.test_images[:, 0].numpy(), data.test_labels.numpy()
    assert all((np.bincount(image.ravel(), minlength=256) == 4).all() for image in images)
    for label, own in enumerate(OFFSETS):
        chosen = images[labels == label].astype(float)
        for down, across in itertools.product(range(7), range(-6, 7)):
            if (down, across) > (0, 0):
                mean = np.mean([agreement(image, down, across) for image in chosen])
                # the correlation of ranks of two normal variables: 6/pi asin(r/2), r = 1 / (2 + 0.3**2)
                expected = 0.461 if (down, across) == own else 0
                assert abs(mean - expected) < 0.03, (own, down, across)


def test_texture_offsets_are_all_those_at_one_distance():
    at_five = {(y, x) for y in range(-6, 7) for x in range(-6, 7) if y * y + x * x == 25}
    assert {(y * s, x * s) for y, x in OFFSETS for s in (1, -1)} == at_five and len(at_five) == 2 * len(OFFSETS)


def test_texture_has_the_same_histogram_at_any_size():
    images = texture(train_size=20, test_size=5, size=20).train_images
    assert images.shape == (20, 1, 20, 20)
    assert (images.flatten(1).sort(1).values == images[0].flatten().sort().values).all()


# planted by scripts/mutate
FAULTS = {
    "data/recall.py": (
        (
            "one value may stand beside several keys",
            "rng.random((count, VALUES)).argsort(1)[:, :PAIRS]",
            "rng.integers(0, VALUES, (count, PAIRS))",
        ),
        ("test images may have fewer pairs", "(seed, 1), PAIRS)", "(seed, 1), 1)"),
        ("the answer is the first value, whichever key is framed", "values[item, asked]", "values[item, 0]"),
    ),
    "data/texture.py": (
        ("the histogram is not the same in every image", "* 256 // (size * size)", "* 255 // (size * size)"),
        ("classes are named after mirrored offsets", "rows + down", "rows - down"),
        ("an offset is shorter than the others", "(3, -4))", "(2, -4))"),
        ("pixels agree less than is said", "_NOISE = 0.3", "_NOISE = 1.0"),
    ),
}
