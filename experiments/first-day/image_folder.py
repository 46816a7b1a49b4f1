"""A folder of images for each class, divided as a file says: ``python image_folder.py IMAGES PARTITION.json``."""

import sys

from torch import nn

import gossamer


def network(num_classes):
    """Return a network of one convolution for images [3, 32, 32]."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 15 * 15, num_classes))


images, partition, *changes = sys.argv[1:]
data = {"name": "image-folder", "path": images, "size": 32}
parts = {"name": "file", "path": partition, "partial": True}
setting = {"rounds": 20, "clients": {"per_round": 2}, "train": {"lr": 0.05}}
print(gossamer.run(setting, changes, model=network, data=data, partition=parts))
