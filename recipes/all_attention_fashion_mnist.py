"""The all-attention model on Fashion-MNIST, small enough for two CPU cores.

    python recipes/all_attention_fashion_mnist.py --data FASHION --out runs/all_attention_fashion_mnist

FASHION is a folder with the four idx files of Fashion-MNIST. The same command with --resume goes on with an
interrupted run; other options of `glocal train` may follow and count more, such as --epochs 1.

Time: TODO.

Expected: TODO.
"""

import sys

from glocal.cli import main

RECIPE = [
    *["--model", "all_attention_quadratic(patch_size=4, dim=64, depth=3, mlp_ratio=2, drop_rate=0.0)"],
    *["--epochs", "6", "--batch-size", "64", "--lr", "2e-3", "--warmup", "0.05", "--label-smoothing", "0"],
]

if __name__ == "__main__":
    sys.exit(main(["train", *RECIPE, *sys.argv[1:]]))
