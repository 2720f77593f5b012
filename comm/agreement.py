"""Ranks compare what they are about to do, so that a difference is an error on all of them and not a hang."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onebit.comm.backend import Backend
from onebit.comm.errors import MismatchError

_DIGEST_BYTES = 32
_REFUSED = "their input"
_REMEDY = (
    "Nothing was exchanged or changed. Every rank must make this call with the same tensors, in the same order, and "
    "the same options"
)


def agree(
    backend: Backend, subject: str, facts: Mapping[str, str], refusal: Exception | None = None, *, remedy: str = _REMEDY
) -> None:
    """Return if every rank calls this with the same facts; collective.

    One collective of 32 bytes per rank when all is well. The facts themselves travel, as JSON, only after a difference.

    Args:
        backend: the group that must agree.
        subject: what the facts are about, for the message.
        facts: name to value, most telling first; the first that differs is named.
        refusal: an error that this rank found in its own input; raised here once the other ranks know of it.
        remedy: what the message of a difference ends with.

    Raises:
        MismatchError: ranks differ, or another rank refused its input; raised on every rank.
        TransportError: a rank did not take part within the timeout.
    """
    if refusal is not None:
        facts = {_REFUSED: f"refused: {refusal}"}
    facts = {"subject": subject, **facts}
    if backend.size > 1:
        digests = _gather_bytes(
            backend, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest(), _DIGEST_BYTES
        )
        if any(digest != digests[0] for digest in digests):
            error = MismatchError(
                _difference(backend.rank, subject, _gather_texts(backend, json.dumps(facts).encode()), remedy)
            )
            if refusal is None:
                raise error
    if refusal is not None:
        raise refusal


def _difference(rank: int, subject: str, per_rank: Sequence[Mapping[str, str]], remedy: str) -> str:
    """Say which fact differs first and which ranks hold which value."""
    names = dict.fromkeys(name for facts in per_rank for name in facts)
    for name in sorted(names, key=lambda name: name != _REFUSED):  # a refusal explains every other difference
        holders: dict[str, list[int]] = {}
        for holder, facts in enumerate(per_rank):
            holders.setdefault(facts.get(name, "accepted" if name == _REFUSED else "none"), []).append(holder)
        if len(holders) > 1:
            said = "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}: {v}" for v, r in holders.items())
            break
    return f"rank {rank}: {subject}: ranks do not agree on {name}: {said}. {remedy}"


def _gather_texts(backend: Backend, text: bytes) -> list[dict[str, str]]:
    lengths = [int.from_bytes(b, "little") for b in _gather_bytes(backend, len(text).to_bytes(8, "little"), 8)]
    texts = _gather_bytes(backend, text, max(lengths))
    return [json.loads(t[:length]) for t, length in zip(texts, lengths, strict=True)]


def _gather_bytes(backend: Backend, content: bytes, size: int) -> list[bytes]:
    """All-gather `content`, filled up to `size` bytes, which is the same on every rank."""
    sent = torch.zeros(size, dtype=torch.uint8)
    sent[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    sent = _on_device(backend, sent)
    received = sent.new_empty(backend.size * size)
    with backend.limited("all_gather"):
        backend.all_gather(received, sent).wait()
        received = received.cpu()
    backend.check()
    return [bytes(row.tolist()) for row in received.view(backend.size, size)]


def _on_device(backend: Backend, tensor: Tensor) -> Tensor:
    return tensor if backend.device_type in (None, "cpu") else tensor.to(backend.device_type)
