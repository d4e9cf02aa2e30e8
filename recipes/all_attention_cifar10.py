"""The all-attention model on CIFAR-10: the recipe of Cordonnier, Loukas, Jaggi, ICLR 2020, arXiv 1911.03584.

    python recipes/all_attention_cifar10.py --data CIFAR10 --out runs/all_attention_cifar10

CIFAR10 is a folder with `train` and `test`, each with a folder of images for every class. The same command with
--resume goes on with an interrupted run; other options of `glocal train` may follow and count more, such as
--model all_attention_generalized, or --epochs 1 to see how long one takes.

On a GPU add --precision bf16. With `timeout 540` before it and --resume after it the command is a piece of nine
minutes; given again it goes on, from at most half a minute before.

Time: made for a GPU. 300 epochs are 1.5e17 multiply-adds: 3.3 G for an image forward, three times that with the
backward pass. On a CPU core one epoch takes hours.

Expected: 93.8 % of the test images, as published for isotropic heads; it has not been run to its end here. The run's
heads.jsonl tells centres and precision of all heads before training and after every epoch.

Differs from the released training (epfml/attention-cnn, train.py and runs/): no dropout on the attention weights;
the learning rate changes with every step, not once an epoch, so that the first epoch has one above 0; biases and the
scales of norms are not decayed; pixels are divided by their own deviation.
"""

import sys

from glocal.cli import main

RECIPE = [
    *["--model", "all_attention_quadratic"],
    *["--optimizer", "sgd", "--lr", "0.1", "--weight-decay", "1e-4", "--max-grad-norm", "0"],
    *["--epochs", "300", "--batch-size", "100", "--warmup", "0.05", "--label-smoothing", "0"],
    *["--crop-padding", "4", "--flip", "--seed", "42"],
]

if __name__ == "__main__":
    sys.exit(main(["train", *RECIPE, *sys.argv[1:]]))
