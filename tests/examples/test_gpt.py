"""The example's model predicts from the past alone, and its tensors fill whole blocks of the codec."""

from __future__ import annotations

import torch

from examples.gpt import Gpt, Size

TINY = Size(width=32, layers=2, heads=2, context=16)


def test_a_later_byte_changes_no_earlier_prediction() -> None:
    torch.manual_seed(0)
    model = Gpt(TINY)
    tokens = torch.randint(256, (3, 16))
    changed = tokens.clone()
    changed[:, 9] = (tokens[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:], before[:, 9:])


def test_the_order_of_the_past_matters() -> None:
    torch.manual_seed(0)
    model = Gpt(TINY)
    tokens = torch.randint(256, (1, 16))
    swapped = tokens[:, [1, 0, *range(2, 16)]]
    assert not torch.allclose(model(swapped)[:, -1], model(tokens)[:, -1])


def test_no_tensor_of_the_default_model_is_padded_on_the_wire() -> None:
    for name, parameter in Gpt(Size()).named_parameters():
        assert parameter.numel() % 1024 == 0, name
