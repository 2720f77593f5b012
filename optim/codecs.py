"""Which codecs may carry what an optimizer averages: a momentum, or what it adds up between synchronisations."""

from __future__ import annotations

from onebit.compress import Codec, InputError
from onebit.compress.codec import as_codec


def codec_of_momenta(owner: str, codec: Codec | None) -> Codec:
    """Return `codec`, or the default one for None.

    A momentum goes through the codec at every step, so what rounding takes off is taken off again and again: without
    error feedback and to the nearest, an element whose gradients move it by less than half a step never moves. With a
    rounding that is right on average it does.

    Raises:
        InputError: it is no codec, or one that loses small elements for good.
    """
    codec = as_codec(codec)
    if not codec.error_feedback and not codec.unbiased:
        raise InputError(
            f"{owner}: {codec} keeps no error feedback and its rounding is not right on average, so elements of the "
            "momentum that are small in their block would never grow; give error_feedback=True, or, where the codec "
            "has it, rounding='stochastic'"
        )
    return codec
