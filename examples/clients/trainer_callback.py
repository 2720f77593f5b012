"""A callback for the Hugging Face Trainer: what that cannot know of an optimizer that averages by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from onebit.comm import InputError
from onebit.comm.ddp import attach
from onebit.optim import CompressedOptimizer, checkpoint, clip_grad_norm_


class OnebitCallback(TrainerCallback):
    """Attaches the optimizer to the wrapped model, clips by one factor on all ranks, and saves every rank's state.

    The Trainer's own clipping must be off, ``TrainingArguments(max_grad_norm=0)``.
    The Trainer's checkpoints hold the optimizer of rank 0 alone; a folder ``onebit`` in each of them holds all ranks'.
    """

    def __init__(self, trainer: Trainer, *, max_grad_norm: float) -> None:
        self._trainer = trainer
        self._max_grad_norm = max_grad_norm

    @property
    def _optimizer(self) -> CompressedOptimizer:
        optimizer: CompressedOptimizer = self._trainer.optimizer.optimizer  # inside of Accelerate's wrapper
        return optimizer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.max_grad_norm:
            raise InputError(
                f"the Trainer would clip every rank by a factor of its own, max_grad_norm={args.max_grad_norm}; set "
                "TrainingArguments(max_grad_norm=0), as OnebitCallback(trainer, max_grad_norm=...) clips by one for all"
            )
        wrapped = self._trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel) and self._optimizer.averager is None:  # train() may come again
            attach(wrapped, self._optimizer)
        if state.global_step > 0:
            checkpoint.load(_folder(args, state), self._optimizer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.accelerator.unscale_gradients()  # where fp16=True
        clip_grad_norm_(self._optimizer, self._max_grad_norm)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        checkpoint.save(_folder(args, state), self._optimizer)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "onebit"
