"""Light augmentation of a whole batch at once."""

import torch


def crop_and_flip(
    images: torch.Tensor, *, padding: int, flip: bool, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Shifts every image by up to `padding` pixels on both axes and mirrors half of them.

    What a shift uncovers is black (0). One gather does both, so the cost is one copy of the batch.

    Args:
        images: [B, C, H, W], any type.
        padding: Largest shift in pixels.
        flip: Whether to mirror an image left to right with probability 1/2.
        generator: Where the random numbers come from; PyTorch's global one if not given.

    Returns:
        [B, C, H, W] in channels_last memory.
    """
    batch, _, height, width = images.shape
    device = images.device
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    shift = _moved(torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator), device)
    rows = shift[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(batch, -1)
    if flip:
        mirrored = _moved(torch.rand((batch, 1), generator=generator) < 0.5, device)
        columns = torch.where(mirrored, columns.flip(1), columns)
    columns = columns + shift[1]
    item = torch.arange(batch, device=device)[:, None, None]
    # Indices apart from each other put their axes first: the result is [B, H, W, C].
    return padded[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _moved(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting for a GPU."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn


def randaugment(images: torch.Tensor, num_ops: int) -> torch.Tensor:
    """RandAugment on every image by itself: `num_ops` operations of magnitude 9 of 30.

    Random numbers come from PyTorch's global state.

    Args:
        images: uint8 [B, C, H, W] with C = 1 or 3.
        num_ops: Operations an image.

    Source: Cubuk, Zoph, Shlens, Le, "RandAugment", NeurIPS 2020, arXiv 1909.13719; torchvision's implementation.
    """
    from torchvision.transforms import v2

    transform = v2.RandAugment(num_ops)  # draws once a call, so it is called for every image
    return torch.stack([transform(image) for image in images])
