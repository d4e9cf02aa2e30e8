"""The loop: deterministic, with the recipe it states, and loud when the loss is not finite."""

import dataclasses
import itertools

import pytest
import torch

from glocal import training
from glocal.backbone import Backbone
from glocal.config import ModelConfig, RunConfig, TrainConfig
from glocal.data import ImageData


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    return RunConfig("easy", ModelConfig("C-T", dims=(32, 32)), TrainConfig(**config))


def numbers(result):
    return [(epoch.train_loss, epoch.test_accuracy) for epoch in result.epochs]


def test_it_learns():
    result = training.train(run(epochs=6), easy(chans=3))
    assert result.epochs[-1].test_accuracy == 100
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    assert all(epoch.seconds > 0 and epoch.images_per_second > 0 for epoch in result.epochs)
    net = Backbone("C-T", in_chans=3, num_classes=2, img_size=8, dims=(32, 32))
    assert result.params == sum(p.numel() for p in net.parameters())


def test_the_seed_decides_everything():
    config = run(crop_padding=1, flip=True)
    torch.manual_seed(1)
    one = training.train(config, easy())
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert numbers(training.train(config, easy())) == numbers(one)
    assert numbers(training.train(dataclasses.replace(config, seed=1), easy())) != numbers(one)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # what is outside is left as it was


def test_the_loss_is_smoothed_cross_entropy():
    # with a learning rate that changes nothing, the epoch's loss can be computed from the first weights
    config = run(epochs=1, lr=1e-12, batch_size=64)
    data = easy()
    result = training.train(config, data)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = training.build_model(config.model, data).train()
    pixels = data.train_images.double()
    x = ((pixels - pixels.mean()) / pixels.std(correction=0)).float()
    log_p = model(x).log_softmax(1)
    right = log_p[torch.arange(64), data.train_labels]
    expected = -(0.9 * right + 0.1 * log_p.mean(1)).mean()
    assert result.epochs[0].train_loss == pytest.approx(expected.item(), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_step_and_rate():
    with pytest.raises(
        FloatingPointError, match=r"C-T, seed 0: the loss is (nan|inf) at step \d+ of 12, learning rate"
    ) as error:
        training.train(run(lr=1e30), easy())
    assert "lower the learning rate" in str(error.value)


def test_progress_is_told():
    steps, epochs = [], []
    training.train(run(epochs=2), easy(train=70), on_step=lambda *s: steps.append(s), on_epoch=epochs.append)
    assert steps == [(i, 8) for i in range(1, 9)]  # 70 images: four whole batches of 16 an epoch
    assert len(epochs) == 2


def test_fewer_images_than_a_batch():
    assert len(training.train(run(epochs=1, batch_size=1000), easy(train=10)).epochs) == 1


def test_the_rate_rises_and_falls():
    rates = [training.rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5) and 0 < rates[99] < 0.001
    assert training.rate(0, 1, 0.1) == 1


def test_one_axis_is_not_decayed():
    model = training.build_model(ModelConfig("C-T"), easy())
    decayed, free = training._groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    assert {p.ndim for p in free["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 2
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_evaluate_counts_what_is_right():
    class Brightness(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), torch.full((len(x),), 0.5)], 1)

    images = torch.zeros(600, 1, 2, 2, dtype=torch.uint8)
    images[:150] = 1
    labels = torch.zeros(600, dtype=torch.int64)
    assert training.evaluate(Brightness(), images, labels, lambda x: x.float()) == 25
