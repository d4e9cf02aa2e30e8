"""The runs of a comparison: every candidate under every condition, with every seed and fold, in their order."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from glocal.candidates import Network, Networks, base_dims, entries
from glocal.config import CompareConfig, DataConfig, TrainConfig
from glocal.data import ImageData
from glocal.data.splits import as_form, fold
from glocal.summary import Condition

TUNED = (1 / 3, 1.0, 3.0)  # times the recipe's learning rate


def recipe(data: ImageData, config: CompareConfig, fraction: float = 1.0) -> TrainConfig:
    """The recipe that all candidates share, by the kind of data.

    Probes are generated and need no augmentation. Real images are shifted by up to a sixteenth of their side at
    random; those of folders are mirrored too, those of idx files are not, because most such sets hold characters.
    With a share f of the images there are 1 / sqrt(f) times as many epochs: between the same number of steps, which
    would cost as much as the whole, and the same number of epochs, which would leave small shares untrained.
    """
    usual, own = _usual(data)
    epochs = round((usual if config.epochs is None else config.epochs) / math.sqrt(fraction))
    return TrainConfig(epochs=epochs, precision=config.precision, **own)


def _usual(data: ImageData) -> tuple[int, dict[str, Any]]:
    """Epochs, and what else is not as in other recipes."""
    if data.name == "recall":
        return 5, {"batch_size": 32, "lr": 1e-3}
    if data.name == "texture":
        return 5, {"batch_size": 32}
    if data.kind == "digits":
        return 20, {"batch_size": 32}
    return 6, {"crop_padding": max(1, min(data.img_size) // 16), "flip": data.kind == "folder"}


@dataclass(frozen=True)
class Cell:
    """A candidate under a condition, with all that its runs share: a row of the tables."""

    name: str
    condition: Condition
    without: str | None
    data: DataConfig
    recipe: TrainConfig
    network: Network
    seeds: int
    target: int | None  # what networks of ours cost under this condition; None where they were sized for another
    parent: "Cell | None" = None  # the weights of whose runs its own start from

    @property
    def label(self) -> str:
        """What progress calls it."""
        parts = [self.name, *([f"without {self.without}"] if self.without else []), self.condition.data]
        parts += [f"{self.condition.fraction:g} of the images"] if self.condition.fraction < 1 else []
        parts += [f"width {self.condition.width:g}"] if self.condition.width != 1 else []
        return ", ".join(parts + ([f"after {self.condition.after}"] if self.condition.after else []))


@dataclass(frozen=True)
class Planned:
    """A run that will be done: which configuration it has may depend on runs before it."""

    cell: Cell
    seed: int
    fold: int
    lr_factor: float | None = None  # of a run that only helps to choose the learning rate

    @property
    def label(self) -> str:
        """What progress calls it."""
        return (
            f"{self.cell.label}, seed {self.seed}"
            + (f", fold {self.fold}" if self.cell.data.folds else "")
            + (f", trying {self.cell.recipe.lr * self.lr_factor:.1g}" if self.lr_factor is not None else "")
        )


class Plan:
    """What there is to do, phase by phase; what a later phase does depends on what an earlier one gave.

    Args:
        config: What to compare.
        data: Images of every source.
        networks: Makes the networks.

    Attributes:
        cells: In the order of the tables.
        phases: Runs that may be done side by side.
        targets: What every network of ours costs, by source, at the first width.

    Raises:
        ValueError: A candidate cannot be built for the data, or the data not be split.
    """

    def __init__(self, config: CompareConfig, data: dict[str, ImageData], networks: Networks):
        self.config, self.data, self.networks = config, data, networks
        if config.folds:
            for images in data.values():
                fold(images, 0, config.folds)  # an error must come now, not in the middle
        self.targets: dict[str, int] = {}
        first = [cell for source in config.data for cell in self._cells(source)]
        largest = max(config.data_fractions)
        whole = [cell for cell in first if cell.without is None and cell.condition.fraction == largest]
        after = [self._after(cell, config.then) for cell in whole] if config.then else []
        self.cells = [*first, *after]
        folds = range(max(1, config.folds))
        self.phases: list[list[Planned]] = []
        for cells in (first, after):
            if config.tune:
                self.phases.append([Planned(cell, 0, 0, factor) for cell in cells for factor in TUNED])
            self.phases.append(
                [
                    Planned(cell, seed, part)
                    for seed in range(max(config.seeds))
                    for cell in cells
                    if seed < cell.seeds
                    for part in folds
                ]
            )

    def _cells(self, source: str) -> list[Cell]:
        own = self.data[source]
        chans = own.in_chans if self.config.then is None else max(own.in_chans, self.data[self.config.then].in_chans)
        data, images = self._form(source, chans, own.img_size)
        targets = {
            width: self.networks.budget(images, of=self.config.budget, width=width) for width in self._widths(own)
        }
        self.targets[source] = targets[self.config.widths[0]]
        cells = []
        for fraction in sorted(self.config.data_fractions):
            seeds = self.config.seeds[self.config.data_fractions.index(fraction) if len(self.config.seeds) > 1 else 0]
            for width in self.config.widths:
                for entry in entries(self.config):
                    whole = self.networks.network(entry, images, of=self.config.budget, width=width)
                    cell = Cell(
                        entry.name,
                        Condition(source, fraction, None, width),
                        None,
                        dataclasses.replace(data, fraction=fraction),
                        recipe(own, self.config, fraction),
                        whole,
                        seeds,
                        targets[width],
                    )
                    cells.append(cell)
                    cells += [
                        dataclasses.replace(
                            cell, without=without, network=self.networks.ablated(whole, without, images)
                        )
                        for without in self.config.ablate
                        if without in whole.ablatable
                    ]
        for without in self.config.ablate:
            if not any(cell.without == without for cell in cells):
                raise ValueError(f"--ablate: {without} changes nothing in any of the networks; leave it out")
        return cells

    def _widths(self, data: ImageData) -> tuple[float, ...]:
        """The widths of the study.

        Raises:
            ValueError: Two of them, or one and the standard width, are the same network.
        """
        made: dict[tuple[int, ...], float] = {base_dims(data, 1): 1}
        for width in self.config.widths:
            dims = base_dims(data, width)
            if made.setdefault(dims, width) != width:
                raise ValueError(
                    f"--widths: {width:g} and {made[dims]:g} both give stages of {dims} channels for {data.name}, as "
                    "widths go in steps of a head's 32 channels; leave one out, or take one further away"
                )
        return self.config.widths

    def _after(self, cell: Cell, then: str) -> Cell:
        before = self.data[cell.condition.data]
        chans = max(before.in_chans, self.data[then].in_chans)
        data, images = self._form(then, chans, before.img_size)
        return dataclasses.replace(
            cell,
            condition=dataclasses.replace(cell.condition, data=then, fraction=1.0, after=cell.condition.data),
            data=data,
            recipe=recipe(self.data[then], self.config),
            network=self.networks.made_for(cell.network.config, images, cell.network.resized),
            target=None,
            parent=cell,
        )

    def _form(self, source: str, chans: int, size: tuple[int, int]) -> tuple[DataConfig, ImageData]:
        """A source in a form: how runs are told, and one image of it to build networks for."""
        own = self.data[source]
        sample = dataclasses.replace(own, train_images=own.train_images[:1], test_images=own.test_images[:1])
        config = DataConfig(
            source,
            folds=self.config.folds,
            in_chans=None if chans == own.in_chans else chans,
            img_size=None if size == own.img_size else size,
        )
        return config, sample if config.in_chans is config.img_size is None else as_form(sample, chans, size)
