"""A training loop of one's own over a graph: torchrun --nproc-per-node 4 experiments/own-loop/train.py

Each process holds the digits of some classes only, and hears one other process a step. What all of them agree on in the
end knows every class.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import gossamer.distributed as gd

num_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 600
world = gd.init()
torch.manual_seed(0)  # the same model everywhere, so that no rank need send its own

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32, device=world.device) / 16
labels = torch.tensor(digits.target, device=world.device)
train, test = torch.randperm(len(labels)).to(world.device).split([1437, 360])
by_class = train[labels[train].argsort(stable=True)]
mine = by_class.tensor_split(world.size)[world.rank]

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(world.device)
inner = torch.optim.SGD(model.parameters(), lr=0.1)
graph = gd.topology("od-equidyn-complete")
optimizer = gd.DecentralizedOptimizer(inner, graph, mode="gradient-tracking")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)

torch.manual_seed(1 + world.rank)
for _ in range(num_steps):
    batch = mine[torch.randint(len(mine), (32,))]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
    optimizer.step()
    schedule.step()

distance = gd.consensus_distance([*model.parameters()])
for parameter, mean in zip(model.parameters(), gd.allreduce([p.detach() for p in model.parameters()]), strict=True):
    parameter.data.copy_(mean)
accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
if world.rank == 0:
    print(f"accuracy {accuracy:.3f}, consensus distance {distance:.4f}, {gd.bytes_sent() / num_steps:.0f} bytes a step")
gd.shutdown()
