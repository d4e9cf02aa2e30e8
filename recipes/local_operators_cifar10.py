"""Local attention and its convolutions in one frame: six networks of equal multiply-adds on CIFAR-10.

    python recipes/local_operators_cifar10.py --data CIFAR10 --out runs/local_operators_cifar10

CIFAR10 is a folder with `train` and `test`, each with a folder of images for every class. Window attention, local
MLP, and depthwise convolution with static weights, weights of an image, and weights of a position take the same
place, all with 7 x 7 tokens, beside attention to the whole image; widths make multiply-adds equal. An interrupted
study goes on when the same command is given again; other options of `glocal compare` may follow and count more.
On a GPU add --precision bf16; with `timeout 540` before it the command is a piece of nine minutes.

Time: 18 runs. On a GPU one after the other, a few minutes each; on two CPU cores a night.

Expected: Han et al. (ICLR 2022, arXiv 2106.04263) find depthwise convolution as good as window attention on
ImageNet-1K, and the dynamic ones better. It has not been run to its end here.
"""

import sys

from glocal.cli import main

RECIPE = [
    *["--layouts", "T-T-T", "--mixers", "WindowAttention(window_size=7)", "LocalMLP(window_size=7)"],
    *["DepthwiseConv(kernel_size=7)", "DynamicDepthwiseConv(kernel_size=7)"],
    *["InhomogeneousDepthwiseConv(kernel_size=7)", "--budget", "macs", "--seeds", "3", "--epochs", "20"],
]

if __name__ == "__main__":
    sys.exit(main(["compare", *RECIPE, *sys.argv[1:]]))
