"""CIFAR-10 over ten unequal clients, with a residual network of one's own; arguments as ``rounds=1`` change entries."""

import sys

from torch import nn

import gossamer


class Residual(nn.Sequential):
    """Layers whose output is added to their input."""

    def forward(self, x):
        """Return x [b, channels, height, width] with what the layers make of it, rectified."""
        return (x + super().forward(x)).relu()


def conv(inputs, outputs):
    """Return a 3 x 3 convolution with BatchNorm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def resnet(num_classes, width=32):
    """Return a network with two residual layers for images [3, 32, 32]."""
    stages = [conv(3, width), Residual(conv(width, width)), nn.MaxPool2d(4), Residual(conv(width, width))]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


clients = {"num": 10, "per_round": 5, "partition": {"name": "dirichlet", "alpha": 0.5}}
run = gossamer.run({"rounds": 20}, sys.argv[1:], model=resnet, data="cifar10", clients=clients, train={"lr": 0.05})
print(run)
