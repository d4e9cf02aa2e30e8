"""A run small enough for tests: easy images, a short recipe, ways to end it from outside."""

import torch
from safetensors.torch import load_file

from glocal.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glocal.data import ImageData


def easy(train=64, test=20, chans=1):
    """Two classes told apart by which half is bright."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 60, (train + test, chans, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(train + test) % 2
    images[labels == 1, :, :, :4] += 150
    images[labels == 0, :, :, 4:] += 150
    return ImageData("easy", images[:train], labels[:train], images[train:], labels[train:], ("right", "left"), "probe")


def run(**recipe):
    config = {"epochs": 3, "batch_size": 16, "lr": 3e-3} | recipe
    return RunConfig(DataConfig("easy"), ModelConfig("C-T", dims=(32, 32)), TrainConfig(**config))


def numbers(result):
    return [(epoch.train_loss, epoch.test_accuracy) for epoch in result.epochs]


def weights(folder):
    return load_file(folder / "weights.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop(Exception):
    """Ends a run from outside."""


class StopAt:
    """A listener that ends the run after a step."""

    def __init__(self, step):
        self.at = step
        self.steps, self.epochs = [], []

    def step(self, done, steps):
        self.steps.append((done, steps))
        if done == self.at:
            raise Stop

    def epoch(self, result):
        self.epochs.append(result)
