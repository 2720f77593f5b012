"""A loop under Hugging Face Accelerate: prepare as ever, then attach the optimizer inside of Accelerate's wrapper.

    torchrun --nproc-per-node 2 examples/clients/accelerate_loop.py      # or: accelerate launch

Clip with `onebit.optim.clip_grad_norm_`, not with `accelerator.clip_grad_norm_`: each rank would clip by its own norm.
With mixed_precision="fp16" call `accelerator.unscale_gradients()` before that.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from task import Classifier, Points, report
from torch.utils.data import DataLoader

from onebit.comm.ddp import attach
from onebit.optim import OnebitAdam, clip_grad_norm_

EPOCHS = 2


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    model = Classifier()
    optimizer = OnebitAdam(model.parameters(), lr=5e-3, freeze_step=60)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS * 256)
    loader = DataLoader(Points(train=True), batch_size=16, shuffle=True)
    model, prepared, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    attach(model, optimizer)

    for _ in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    clip_grad_norm_(optimizer, 1.0)
                prepared.step()
                schedule.step()
                prepared.zero_grad()

    report(accelerator.unwrap_model(model), optimizer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
