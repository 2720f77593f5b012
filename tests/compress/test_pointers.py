"""Tables of addresses: what is sent, and when."""

from __future__ import annotations

import torch

from onebit.compress.gpu.pointers import Pointers


def test_the_table_holds_the_address_of_every_tensor_and_0_for_none() -> None:
    x = torch.zeros(8)
    pointers = Pointers(3, "cpu")
    pointers.update([x, None, x[1:]])
    assert pointers.table.tolist() == [x.data_ptr(), 0, x.data_ptr() + 4]


def test_it_is_sent_again_only_when_an_address_has_changed() -> None:
    x, y = torch.zeros(2, 8)
    pointers = Pointers(2, torch.device("cpu"))
    assert not pointers.update([None, None])
    assert pointers.update([x, y])
    assert not pointers.update([x.view(2, 4), y])
    assert pointers.update([x, None])
    assert pointers.update([x, y])
    assert pointers.table.tolist() == [x.data_ptr(), y.data_ptr()]


def test_the_table_keeps_its_own_address() -> None:
    pointers = Pointers(1, "cpu")
    assert pointers.address == pointers.table.data_ptr()
    pointers.update([torch.zeros(1)])
    assert pointers.address == pointers.table.data_ptr()


def test_no_tensor_at_all_is_a_table_of_none() -> None:
    assert not Pointers(0, "cpu").update([])
