"""Handwritten digits that come with scikit-learn: real images without a download.

1,797 grey images of 8 x 8 pixels with 17 levels, each a 4 x 4 count of ink in a bitmap of 32 x 32.
Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import numpy as np
import torch

from glocal.data.images import ImageData
from glocal.data.splits import hold_out


def digits() -> ImageData:
    """The digits 0 to 9, a fifth of every class set aside for the test: always the same images.

    The set's own split by writer is not used: scikit-learn carries one of its two parts only.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("digits: scikit-learn is not installed; run: pip install 'glocal[lab]'") from error
    read = load_digits()
    images = torch.from_numpy(np.rint(read.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(read.target.astype(np.int64))
    everything = ImageData(
        name="digits",
        train_images=images,
        train_labels=labels,
        test_images=images[:0],
        test_labels=labels[:0],
        classes=tuple(str(i) for i in range(10)),
        kind="digits",
    )
    return hold_out(everything, share=0.2)
