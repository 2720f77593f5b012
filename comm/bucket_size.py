"""How much of a list of tensors travels together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from onebit.compress.errors import InputError

# A bucket should travel about as long as the next one takes to encode. Between hosts that is a few milliseconds; over
# NVLink it is less than the 0.2 ms that it takes to launch a bucket's work, so there buckets only keep buffers small.
BUCKET_MB = {"cpu": 16.0, "cuda": 512.0}

# An optimizer's step launches more for a bucket than an average does, and looks at hundreds of tensors besides. Over
# NVLink its work is as fast in one bucket as in three; the host, which must keep ahead of the device, is not.
STEP_BUCKET_MB = {"cpu": 16.0, "cuda": 2048.0}


def bucket_mb_for(
    tensors: Sequence[Tensor], bucket_mb: float | None, defaults: Mapping[str, float] = BUCKET_MB
) -> float:
    """Return the bucket size for these tensors: the one given, or None: the default for their type of device.

    Raises:
        InputError: not a positive number.
    """
    if bucket_mb is None:
        return defaults.get(tensors[0].device.type if tensors else "cpu", defaults["cpu"])
    if isinstance(bucket_mb, bool) or not isinstance(bucket_mb, (int, float)) or not 0 < bucket_mb < float("inf"):
        raise InputError(f"bucket_mb must be a positive number of MiB, got {bucket_mb!r}")
    return float(bucket_mb)
