"""Fifty peers without a server train a module of one's own on data of one's own, as in a notebook."""

import sys

import numpy as np
from torch import nn

import gossamer

source = np.random.default_rng(0)
x = source.normal(size=(6000, 20))
y = (x @ source.normal(size=(20, 3))).argmax(axis=1)
data = (x[:5000], y[:5000], x[5000:], y[5000:])
parts = np.array_split(np.argsort(y[:5000]), 50)  # each peer has one or two of the classes
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
setting = {"rounds": 30, "peers": {"topology": "od-equidyn"}, "train": {"lr": 0.1}}
print(gossamer.run(setting, sys.argv[1:], model=model, data=data, partition=parts))
