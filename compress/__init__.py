"""Arrays in, arrays out: codecs that turn tensors into a few bits per number, and their kernels."""

from onebit.compress.blockwise import BlockFormat
from onebit.compress.codec import Codec
from onebit.compress.errors import InputError, OnebitError
from onebit.compress.fp8 import Fp8Codec
from onebit.compress.int4 import Int4Codec
from onebit.compress.int8 import Int8Codec
from onebit.compress.layout import Layout
from onebit.compress.operators import BlockOperators
from onebit.compress.sign import SignCodec, pack_signs, unpack_signs
from onebit.compress.threads import num_threads, set_num_threads

__all__ = [
    "BlockFormat",
    "BlockOperators",
    "Codec",
    "Fp8Codec",
    "InputError",
    "Int4Codec",
    "Int8Codec",
    "Layout",
    "OnebitError",
    "SignCodec",
    "num_threads",
    "pack_signs",
    "set_num_threads",
    "unpack_signs",
]
