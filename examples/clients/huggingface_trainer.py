"""The Hugging Face Trainer makes the optimizer and wraps the model; a callback brings the two together.

    torchrun --nproc-per-node 2 examples/clients/huggingface_trainer.py

It averages by itself after the freeze, so clipping is left to the callback too, with one factor for all ranks.
"""

from __future__ import annotations

import torch
from task import Classifier, Points, report
from trainer_callback import OnebitCallback
from transformers import Trainer, TrainingArguments

from onebit.optim import OnebitAdam

EPOCHS = 2


def main() -> None:
    arguments = TrainingArguments(
        output_dir="out/huggingface_trainer",
        per_device_train_batch_size=32,
        num_train_epochs=EPOCHS,
        learning_rate=5e-3,
        max_grad_norm=0,  # else each rank would clip by its own norm, which turns the mean
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        Classifier(),
        arguments,
        train_dataset=Points(train=True),
        optimizer_cls_and_kwargs=(OnebitAdam, {"lr": arguments.learning_rate, "freeze_step": 60}),
    )
    trainer.add_callback(OnebitCallback(trainer, max_grad_norm=1.0))
    trainer.train()
    report(trainer.model, trainer.optimizer.optimizer)


if __name__ == "__main__":
    main()
