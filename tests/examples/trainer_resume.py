"""A run of the Trainer that ends at half-way and is resumed, against one without a break; writes what ranks hold.

torchrun --nproc-per-node 2 tests/examples/trainer_resume.py FOLDER        # FOLDER/RANK.pt: two lists of tensors
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples" / "clients"))

import torch
import torch.distributed as dist
from task import Classifier, Points
from trainer_callback import OnebitCallback
from transformers import Trainer, TrainingArguments

from onebit.optim import OnebitAdam

STEPS, SAVED_AT = 12, 6


def train(folder: Path, *, resume: bool) -> list[torch.Tensor]:
    """Parameters after `STEPS`, half of the first `SAVED_AT` of which are compressed."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        use_cpu=True,
        save_strategy="steps",
        save_steps=SAVED_AT,
        disable_tqdm=True,
        report_to="none",
    )
    model = Classifier()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Points(train=False),
        optimizer_cls_and_kwargs=(OnebitAdam, {"lr": 1e-2, "freeze_step": SAVED_AT // 2}),
    )
    trainer.add_callback(OnebitCallback(trainer, max_grad_norm=1.0))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AT}") if resume else None)
    return [p.detach().clone() for p in model.parameters()]


def main() -> None:
    folder = Path(sys.argv[1])
    whole = train(folder / "trainer", resume=False)
    resumed = train(folder / "trainer", resume=True)
    torch.save([whole, resumed], folder / f"{os.environ['RANK']}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
