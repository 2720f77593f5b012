"""Processes among which a campaign's work is shared out."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def crew(jobs: int) -> ProcessPoolExecutor:
    """`jobs` workers, each with one thread; their warnings, of skipped steps and the like, are not shown.

    They are spawned, for torch's threads do not survive a fork. Ctrl-C ends the campaign in the process that has them,
    which waits for what they are at; if it is killed they end with it.
    """
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare)


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    logging.getLogger("onebit").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def shares(total: int, jobs: int) -> list[int]:
    """`total` in at most `jobs` nearly equal parts, none of them 0."""
    return [part for part in ((total + i) // jobs for i in range(jobs)) if part]
