"""Where convolution ends and attention begins: C-C-C-C to T-T-T-T on CIFAR-10, with less and less data.

    python recipes/layouts_cifar10.py --data CIFAR10 --out runs/layouts_cifar10

CIFAR10 is a folder with `train` and `test`, each with a folder of images for every class. Five layouts of equal
multiply-adds, on all training images, a fifth and a twentieth of them, three seeds of each. An interrupted study goes
on when the same command is given again; other options of `glocal compare` may follow and count more.
On a GPU add --precision bf16; with `timeout 540` before it the command is a piece of nine minutes.

Time: 45 runs. On a GPU one after the other, a few minutes each; on two CPU cores a night and a day.

Expected: CoAtNet's study (Dai et al., NeurIPS 2021, arXiv 2106.04803, figure 1) finds on ImageNet-1K that more stages
of convolution generalise better, C-C-C-T and C-C-C-C best; that smaller data ask for more convolution is what this
study tests. It has not been run to its end here.
"""

import sys

from glocal.cli import main

RECIPE = [
    *["--layouts", "C-C-C-C", "C-C-C-T", "C-C-T-T", "C-T-T-T", "T-T-T-T"],
    *["--data-fractions", "1.0", "0.2", "0.05", "--seeds", "3", "--epochs", "20"],
]

if __name__ == "__main__":
    sys.exit(main(["compare", *RECIPE, *sys.argv[1:]]))
