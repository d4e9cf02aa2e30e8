"""Whether images fit in memory, asked before they are decoded."""

import math
import os
from pathlib import Path


def available_bytes() -> int | None:
    """Memory that this process may still use; None where the system does not say.

    On Linux what the kernel estimates to be free without swapping, or what the container's limit leaves, if that is
    less; elsewhere all the memory that is built in.
    """
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())  # "max", no number, without a limit
        usage = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free.append(limit - int(usage["anon"]))  # the file cache gives way
    except (OSError, ValueError, KeyError):
        pass
    if not free and hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, default=None)


def check_fits(name: str, count: int, in_chans: int, img_size: tuple[int, int]) -> None:
    """Refuses images that would not fit in memory as uint8.

    Args:
        name: What holds them, for the message.
        count: Number of images.
        in_chans: Channels of an image.
        img_size: Height and width in pixels.

    Raises:
        ValueError: They need more than is available; the message says how much, and which size would fit.
    """
    height, width = img_size
    needed, free = count * in_chans * height * width, available_bytes()
    if free is None or needed <= free:
        return
    shrink = math.sqrt(0.8 * free / needed)  # leaves a fifth for everything else
    smaller = f"{int(height * shrink)} x {int(width * shrink)}"
    raise ValueError(
        f"{name}: {count} images of {height} x {width} pixels need {needed / 1e9:.1f} GB of memory, but "
        f"{free / 1e9:.1f} GB are available; save them smaller ({smaller} pixels fit) or use fewer"
    )
