"""What newcomers get wrong under each client, tried on every rank; writes the messages that they get.

torchrun --nproc-per-node 2 tests/examples/client_mistakes.py FOLDER        # FOLDER/RANK.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples" / "clients"))

import pytorch_lightning as lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator
from lightning_module import Module
from task import Classifier, Points
from torch.utils.data import DataLoader
from trainer_callback import OnebitCallback
from transformers import Trainer, TrainingArguments

from onebit.comm import OnebitError
from onebit.comm.ddp import attach
from onebit.optim import OnebitAdam


def adam(parameters: Any, **options: Any) -> OnebitAdam:
    return OnebitAdam(parameters, freeze_step=2, **options)


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    batch = next(iter(DataLoader(Points(train=False), batch_size=4)))
    model(**batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_before_the_process_group() -> None:
    adam(Classifier().parameters(), backend="gloo")


def accelerate_without_attach() -> None:
    model = Classifier()
    step(*Accelerator(cpu=True).prepare(model, adam(model.parameters())))


def accelerate_attached_before_prepare() -> None:
    model = Classifier()
    optimizer = adam(model.parameters())
    attach(model, optimizer)


def accelerates_wrapper_attached() -> None:
    model = Classifier()
    attach(*Accelerator(cpu=True).prepare(model, adam(model.parameters())))


def optimizer_of_another_model() -> None:
    model = Accelerator(cpu=True).prepare(Classifier())
    attach(model, adam(Classifier().parameters()))


def two_optimizers_under_accelerate() -> None:
    accelerator = Accelerator(cpu=True)
    inner = Classifier()
    first, second = adam(inner.parameters()), adam(inner.layers[0].parameters())
    for optimizer in (first, second, first):
        step(inner, accelerator.prepare(optimizer))


def hugging_face_trainer(*, attached: bool = False, callback: bool = False) -> Callable[[], None]:
    """A Trainer as it is without further arguments: it clips."""

    def train() -> None:
        arguments = TrainingArguments(
            output_dir=sys.argv[1], max_steps=2, use_cpu=True, save_strategy="no", disable_tqdm=True, report_to="none"
        )
        model = Classifier()
        optimizer = adam(model.parameters())
        trainer = Trainer(model, arguments, train_dataset=Points(train=False), optimizers=(optimizer, None))
        if attached:
            attach(trainer.model_wrapped, optimizer)
        if callback:
            trainer.add_callback(OnebitCallback(trainer, max_grad_norm=1.0))
        trainer.train()

    return train


def lightning_trainer(hook: str) -> Callable[[], None]:
    """`Module` without `attach`, or with it in `configure_optimizers`, where the model is not wrapped yet."""

    class Mistaken(Module):
        def on_train_start(self) -> None:
            pass

        def configure_optimizers(self) -> dict[str, Any]:
            configured = super().configure_optimizers()
            if hook == "configure_optimizers":
                attach(self, configured["optimizer"])
            return configured

    def train() -> None:
        trainer = lightning.Trainer(
            strategy="ddp", accelerator="cpu", devices=2, max_steps=2, logger=False, enable_checkpointing=False
        )
        trainer.fit(Mistaken(), DataLoader(Points(train=False), batch_size=4))

    return train


MISTAKES: dict[str, Callable[[], None]] = {
    "optimizer before the process group": optimizer_before_the_process_group,  # the first: the next ones make it
    "Accelerate without attach": accelerate_without_attach,
    "Accelerate, attached before prepare": accelerate_attached_before_prepare,
    "Accelerate, its wrapper attached": accelerates_wrapper_attached,
    "optimizer of another model": optimizer_of_another_model,
    "two optimizers": two_optimizers_under_accelerate,
    "Trainer without attach": hugging_face_trainer(),
    "Trainer, attached before it wraps": hugging_face_trainer(attached=True),
    "Trainer that clips": hugging_face_trainer(callback=True),
    "Lightning without attach": lightning_trainer("none"),
    "Lightning, attached before it wraps": lightning_trainer("configure_optimizers"),
}


def message_of(mistake: Callable[[], None]) -> str:
    try:
        mistake()
    except OnebitError as error:
        return str(error)
    return "no error"


def main() -> None:
    messages = {name: message_of(mistake) for name, mistake in MISTAKES.items()}
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(messages, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
