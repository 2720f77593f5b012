"""A PyTorch loop with `DistributedDataParallel`: the lines that onebit changes are the optimizer's and `attach`.

torchrun --nproc-per-node 2 examples/clients/plain.py        # NCCL where there are GPUs, else Gloo
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from task import Classifier, Points, report
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from onebit.comm.ddp import attach
from onebit.optim import OnebitAdam, clip_grad_norm_

EPOCHS = 2


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    model = DistributedDataParallel(Classifier().to(device))
    optimizer = OnebitAdam(model.parameters(), lr=5e-3, freeze_step=60)
    attach(model, optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS * 128)

    points = Points(train=True)
    sampler: DistributedSampler[dict[str, torch.Tensor]] = DistributedSampler(points)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for batch in DataLoader(points, batch_size=32, sampler=sampler):
            optimizer.zero_grad()
            model(**{name: tensor.to(device) for name, tensor in batch.items()})["loss"].backward()
            clip_grad_norm_(optimizer, 1.0)
            optimizer.step()
            schedule.step()

    report(model.module, optimizer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
