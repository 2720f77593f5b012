"""The root of the exception family: everything this project raises on purpose is an `OnebitError`."""

from __future__ import annotations


class OnebitError(Exception):
    """Base class of every exception that onebit raises on purpose."""


class InputError(OnebitError, ValueError):
    """An argument has the wrong type, dtype, shape, device or value; nothing was changed."""
