"""A LightningModule: `configure_optimizers` as ever, and `attach` once Lightning has wrapped the model.

torchrun --nproc-per-node 2 examples/clients/lightning_module.py
"""

from __future__ import annotations

import os
from typing import Any

import pytorch_lightning as lightning
import torch
from task import Classifier, Points, report
from torch import Tensor
from torch.utils.data import DataLoader

from onebit.comm.ddp import attach
from onebit.optim import OnebitAdam, clip_grad_norm_

EPOCHS = 2


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Classifier()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch)["loss"]
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = OnebitAdam(self.parameters(), lr=5e-3, freeze_step=60)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS * 128)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        attach(self.trainer.strategy.model, self.trainer.optimizers[0])

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        clip_grad_norm_(optimizer, 1.0)  # Lightning's own would clip each rank by its own norm


def main() -> None:
    trainer = lightning.Trainer(
        strategy="ddp",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),  # what torchrun was told; "auto" is one where there are no GPUs
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(Points(train=True), batch_size=32, shuffle=True))
    report(module.model, trainer.optimizers[0])


if __name__ == "__main__":
    main()
