"""Training on several processes: `torchrun --nproc-per-node 2 examples/distributed.py`.

Each process computes the gradients of its part of the batch, and DistributedDataParallel (DDP) averages them. So
all take the same steps, those that one process would take on the whole batch. This is shown at the end: each
process trains a second network by itself on everything, and the two must agree.

When gradients travel: DDP puts parameters into buckets, last layers first, and sends a bucket as soon as backward has
computed its gradients, while it goes on with the layers before. A fastmlp network runs as one operation, whose
gradients arrive together when it ends, so the buckets leave in one burst and nothing is left to compute meanwhile.
Where sending takes long, make two networks of one, `nn.Sequential(MLP(...), MLP(...))`: the gradients of the
second travel while the first runs backward.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastmlp

STEPS, ROWS = 50, 256


def train(model: nn.Module, x: Tensor, target: Tensor) -> float:
    """Some steps of gradient descent, as anywhere else; the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    dist.init_process_group("gloo")  # torchrun tells each process who it is
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)

    torch.manual_seed(0)  # the same network and data everywhere
    model = fastmlp.MLP(8, [64, 64], 1, "tanh", dtype=torch.float64)
    alone = copy.deepcopy(model)
    x = torch.randn(ROWS * processes, 8, dtype=torch.float64)
    target = x.sin().sum(1, keepdim=True)

    mine = slice(rank * ROWS, (rank + 1) * ROWS)  # parts of equal size: the mean of their means is that of the whole
    loss = train(DistributedDataParallel(model), x[mine], target[mine])
    loss_alone = train(alone, x, target)

    # Only the order of additions differs. Each step rounds sums of ROWS * processes terms, and 50 steps of this size
    # hardly amplify what earlier ones left: the number of roundings in a row is the bound.
    difference = max((a - b).abs().max().item() for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    largest = max(p.abs().max().item() for p in alone.parameters())
    bound = STEPS * ROWS * processes * torch.finfo(torch.float64).eps * largest
    print(f"process {rank}: loss {loss:.4f} of its {ROWS} rows, {loss_alone:.4f} of all {len(x)} on one process")
    dist.barrier()
    if rank == 0:
        print(f"largest difference of the parameters after {STEPS} steps: {difference:.1e}, allowed {bound:.1e}")
    dist.destroy_process_group()
    if not difference <= bound:
        raise SystemExit(f"process {rank}: parameters differ by {difference:.1e}, allowed {bound:.1e}")


if __name__ == "__main__":
    main()
