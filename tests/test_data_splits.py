"""Splits and forms: every image is where it should be, once, and every class has its share."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from glocal.data import ImageData
from glocal.data.splits import as_form, fold, fraction, hold_out


def numbered(train_counts, test_counts, val_counts=None, size=(4, 5), chans=1):
    """Images whose first two pixels are their number, from 0 on, in mixed order; labels by the counts of classes."""
    counts = [train_counts, test_counts, val_counts or []]
    rng = np.random.default_rng(7)
    parts, number = [], 0
    for split in counts:
        labels = rng.permutation(np.repeat(np.arange(len(split)), split))
        images = np.zeros((len(labels), chans, *size), np.uint8)
        for image in images:
            image[:, 0, 0], image[:, 0, 1] = divmod(number, 256)
            number += 1
        parts.append((torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))))
    (train, train_labels), (test, test_labels), (val, val_labels) = parts
    data = ImageData(
        name="numbered",
        train_images=train,
        train_labels=train_labels,
        test_images=test,
        test_labels=test_labels,
        classes=tuple("abcdef"[: len(train_counts)]),
        kind="folder",
    )
    return data if val_counts is None else dataclasses.replace(data, val_images=val, val_labels=val_labels)


def numbers(images):
    return [256 * int(image[0, 0, 0]) + int(image[0, 0, 1]) for image in images]


def labels_by_number(data):
    """The label of every image of both splits."""
    images = [*numbers(data.train_images), *numbers(data.test_images)]
    return dict(zip(images, [*data.train_labels.tolist(), *data.test_labels.tolist()], strict=True))


def counts(labels, classes=3):
    return torch.bincount(labels, minlength=classes).tolist()


def test_a_fraction_takes_the_same_share_of_every_class():
    data = numbered([100, 40, 3], [5, 5, 5])
    for share, expected in ((0.05, [5, 2, 1]), (0.2, [20, 8, 1]), (0.5, [50, 20, 2]), (0.99, [99, 40, 3])):
        part = fraction(data, share, seed=0)
        assert counts(part.train_labels) == expected
        assert numbers(part.train_images) == sorted(numbers(part.train_images))  # the order of the data is kept
        everything = labels_by_number(data)
        assert all(everything[n] == label for n, label in labels_by_number(part).items())
        assert part.test_images is data.test_images and part.test_labels is data.test_labels
    assert fraction(data, 1, seed=0) is data


def test_fractions_of_a_seed_are_nested_and_another_seed_gives_others():
    data = numbered([100, 40, 30], [5, 5, 5])
    chosen = [set(numbers(fraction(data, share, seed=3).train_images)) for share in (0.02, 0.05, 0.2, 0.7)]
    assert all(small < large for small, large in itertools.pairwise(chosen))
    assert chosen[2] == set(numbers(fraction(data, 0.2, seed=3).train_images))
    others = [set(numbers(fraction(data, 0.2, seed=seed).train_images)) for seed in range(4, 9)]
    # of 34 images, 0.2 * 34 = 7 are expected to be the same by chance
    assert all(len(chosen[2] & other) < 18 for other in others)


def test_every_image_of_a_class_may_be_chosen():
    data = numbered([10, 10], [1, 1])
    seen = set().union(*(numbers(fraction(data, 0.1, seed).train_images) for seed in range(80)))
    assert seen == set(numbers(data.train_images))


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_a_share_beyond_all_is_refused(share):
    with pytest.raises(ValueError, match=r"share: .*; it must be above 0 and at most 1"):
        fraction(numbered([4, 4], [1, 1]), share, seed=0)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_every_image_is_tested_in_one_fold(folds):
    data = numbered([11, 23, 6], [4, 5, 1])
    everything = labels_by_number(data)
    tested = []
    for k in range(folds):
        part = fold(data, k, folds)
        assert labels_by_number(part) == everything  # with the training images it is all of them, with their labels
        assert not set(numbers(part.train_images)) & set(numbers(part.test_images))
        tested += numbers(part.test_images)
        assert all(
            n // folds <= c <= -(-n // folds) for n, c in zip((15, 28, 7), counts(part.test_labels), strict=True)
        )
        assert 50 // folds <= len(part.test_labels) <= -(-50 // folds)
        assert torch.equal(part.test_images, fold(data, k, folds).test_images)
    assert sorted(tested) == list(range(50))


def test_folds_are_mixed():
    """Training and test images, and early and late ones, come into every fold."""
    data = numbered([40, 40], [40, 40])
    for k in range(2):
        tested = numbers(fold(data, k, 2).test_images)
        assert 20 < sum(n < 80 for n in tested) < 60 and 20 < sum(n % 2 for n in tested) < 60


def test_folds_leave_a_validation_split_alone():
    data = numbered([4, 4], [2, 2], [3, 3])
    assert fold(data, 0, 3).val_images is data.val_images


@pytest.mark.parametrize(
    "k, folds, message",
    [
        (0, 4, r"folds: 4, but class 'b' has 3 images; ask for fewer folds or add images to the class"),
        (0, 1, "folds: 1; it must be at least 2"),
        (3, 3, "k: 3; with 3 folds it must be 0 to 2"),
        (-1, 3, "k: -1; with 3 folds it must be 0 to 2"),
    ],
)
def test_folds_that_cannot_be_are_refused(k, folds, message):
    with pytest.raises(ValueError, match=message):
        fold(numbered([5, 2], [1, 1]), k, folds)


def test_a_class_of_one_image_is_counted_in_english():
    with pytest.raises(ValueError, match="class 'b' has 1 image; ask"):
        fold(numbered([5, 1], [1, 0]), 0, 2)


def test_held_out_images_come_from_training():
    data = numbered([100, 14, 3, 1], [5, 5, 5, 5])
    held = hold_out(data)
    assert counts(held.test_labels, 4) == [10, 1, 1, 0] and counts(held.train_labels, 4) == [90, 13, 2, 1]
    assert sorted(numbers(held.train_images) + numbers(held.test_images)) == list(range(118))
    everything = labels_by_number(data)
    assert all(everything[n] == label for n, label in labels_by_number(held).items())
    assert torch.equal(held.test_images, hold_out(data).test_images)
    assert counts(hold_out(data, share=0.5).test_labels, 4) == [50, 7, 2, 0]
    assert counts(hold_out(data, share=0.99).train_labels, 4) == [1, 1, 1, 1]  # never all of a class


def test_a_validation_split_of_its_own_is_held_out():
    data = numbered([6, 6], [2, 2], [3, 4])
    held = hold_out(data)
    assert held.test_images is data.val_images and held.test_labels is data.val_labels
    assert held.train_images is data.train_images and held.val_images is None and held.val_labels is None


def test_nothing_to_hold_out():
    with pytest.raises(ValueError, match="numbered: no class has two training images"):
        hold_out(numbered([1, 1], [1, 1]))
    for share in (0, 1):
        with pytest.raises(ValueError, match="it must be above 0 and below 1"):
            hold_out(numbered([9, 9], [1, 1]), share=share)


def test_a_form_that_fits_is_left_alone():
    data = numbered([3, 3], [1, 1])
    assert as_form(data, 1, (4, 5)) is data


def test_grey_is_repeated_to_colour_without_a_copy():
    data = dataclasses.replace(numbered([3, 3], [1, 1], [1, 1]), note="Read as it is.")
    formed = as_form(data, 3, (4, 5))
    for ours, theirs in zip(
        (formed.train_images, formed.test_images, formed.val_images),
        (data.train_images, data.test_images, data.val_images),
        strict=True,
    ):
        assert ours.shape[1] == 3 and all(torch.equal(ours[:, i : i + 1], theirs) for i in range(3))
        assert ours.data_ptr() == theirs.data_ptr()
    assert formed.note == "Read as it is. Images were repeated from grey to 3 channels."


@pytest.mark.parametrize("size", [(7, 9), (40, 30), (13, 13)])
def test_sizes_are_met_by_resizing(size):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, 1, 20, 16)).astype(np.uint8))
    data = dataclasses.replace(numbered([1, 1], [1, 1]), train_images=images, test_images=images)
    formed = as_form(data, 3, size)
    assert formed.img_size == size and formed.train_images.dtype == torch.uint8
    for ours, image in zip(formed.train_images, images, strict=True):
        pillow = Image.fromarray(image[0].numpy()).resize(size[::-1], Image.Resampling.BILINEAR)  # antialiased too
        assert np.abs(ours[2].numpy().astype(int) - np.asarray(pillow)).max() <= 1
    height, width = size
    assert (
        formed.note
        == f"Images were resized from 20 x 16 to {height} x {width} pixels and repeated from grey to 3 channels."
    )


def test_colour_does_not_become_grey():
    with pytest.raises(ValueError, match="numbered: its images have 3 channels and cannot be used as grey; begin with"):
        as_form(numbered([3, 3], [1, 1], chans=3), 1, (4, 5))


# planted by scripts/mutate
FAULTS = (
    (
        "a smaller share of the training images is not among those of a larger one",
        "in _shuffled(data.train_labels, seed)]",
        "in _shuffled(data.train_labels, seed + int(100 * share))]",
    ),
    (
        "the first folds get the remainders of all classes",
        "(torch.arange(len(indices)) + dealt) % folds",
        "torch.arange(len(indices)) % folds",
    ),
    ("a class may lose all its training images", ", len(indices) - 1)]", ", len(indices))]"),
    ("images are made smaller without antialiasing", "antialias=True", "antialias=False"),
)
