"""ResNet-18 on CIFAR-10, the network that the all-attention model is compared with, by the same recipe.

    python recipes/resnet18_cifar10.py --data CIFAR10 --out runs/resnet18_cifar10

CIFAR10 is a folder with `train` and `test`, each with a folder of images for every class. The same command with
--resume goes on with an interrupted run; other options of `glocal train` may follow and count more.

On a GPU add --precision bf16. With `timeout 540` before it and --resume after it the command is a piece of nine
minutes; given again it goes on, from at most half a minute before.

Time: made for a GPU. 300 epochs are 2.5e16 multiply-adds: 0.56 G for an image forward, three times that with the
backward pass.

Expected: 93.8 % of the test images, as published; it has not been run to its end here.

Differs from the released training (epfml/attention-cnn): the learning rate rises over the first twentieth of all steps
and falls along a cosine, as that of the all-attention model, where the release divides it by 10 after 80, 150 and 250
epochs; biases and the scales of norms are not decayed; pixels are divided by their own deviation.
"""

import sys

from glocal.cli import main

RECIPE = [
    *["--model", "resnet18_cifar"],
    *["--optimizer", "sgd", "--lr", "0.1", "--weight-decay", "1e-4", "--max-grad-norm", "0"],
    *["--epochs", "300", "--batch-size", "100", "--warmup", "0.05", "--label-smoothing", "0"],
    *["--crop-padding", "4", "--flip", "--seed", "42"],
]

if __name__ == "__main__":
    sys.exit(main(["train", *RECIPE, *sys.argv[1:]]))
