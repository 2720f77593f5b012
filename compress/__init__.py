"""Arrays in, arrays out: codecs that turn tensors into a few bits per number, and their kernels."""

from onebit.compress.codec import Codec
from onebit.compress.errors import InputError, OnebitError
from onebit.compress.layout import Layout
from onebit.compress.sign import SignCodec, pack_signs, unpack_signs
from onebit.compress.threads import num_threads, set_num_threads

__all__ = [
    "Codec",
    "InputError",
    "Layout",
    "OnebitError",
    "SignCodec",
    "num_threads",
    "pack_signs",
    "set_num_threads",
    "unpack_signs",
]
