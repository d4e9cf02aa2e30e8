"""What every image source gives: uint8 images and labels of two splits, in memory."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ImageData:
    """Labelled images in memory.

    Args:
        name: What a table calls this data: a probe's name or the path as the user gave it.
        train_images: uint8 [N, C, H, W], C = 1 (grey) or 3 (colour).
        train_labels: int64 [N].
        test_images: uint8 [M, C, H, W].
        test_labels: int64 [M].
        classes: Name of every label.
        kind: "probe" (generated), "digits" (embedded), "idx" or "folder"; it chooses the augmentation and the default
            epochs.
        note: What was done to the images on the way in, in sentences for the report; may be empty.
        val_images: uint8 [V, C, H, W], a validation split, only if the data brought one beside training and test.
        val_labels: int64 [V], with `val_images`.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    kind: str
    note: str = ""
    val_images: torch.Tensor | None = None
    val_labels: torch.Tensor | None = None

    @property
    def in_chans(self) -> int:
        """Channels of an image: 1 (grey) or 3 (colour)."""
        return self.train_images.shape[1]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.train_images.shape[-2:]
        return height, width

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of every channel of the training images, in grey levels 0 to 255."""
        # Per-channel histograms: exact, and no float copy of the whole set is ever made.
        levels = torch.arange(256, dtype=torch.float64)
        means, deviations = [], []
        for channel in range(self.in_chans):
            counts = torch.bincount(self.train_images[:, channel].reshape(-1), minlength=256).double()
            counts /= counts.sum()
            mean = (counts * levels).sum()
            variance = (counts * (levels - mean) ** 2).sum()
            means.append(mean.item())
            deviations.append(max(variance.sqrt().item(), 1e-3))  # a constant channel must not divide by zero
        return means, deviations
