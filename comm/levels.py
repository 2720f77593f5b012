"""The two levels of a group of ranks: those of a node, and those of equal number in their nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from onebit.comm.agreement import agree
from onebit.comm.backend import Backend
from onebit.comm.numbers import gather_numbers
from onebit.compress.errors import InputError
from onebit.compress.launch_env import local_rank, local_world_size
from onebit.compress.layout import Layout

LocalGroup = int | str | Backend | None
"""Which ranks are one node: ``"auto"``, as the launcher says; so many neighbours; or the group of them."""

AUTO = "auto"


@dataclass(frozen=True, eq=False)
class Levels:
    """A group of n = k · m ranks as m nodes of k ranks.

    Attributes:
        inside: the k ranks of this rank's node.
        between: the m ranks that have this rank's number in their nodes.
    """

    inside: Backend
    between: Backend

    @property
    def compresses(self) -> bool:
        """Whether there is more than one node, so that something is compressed."""
        return self.between.size > 1

    def slice_of(self, layout: Layout, number: int | None = None) -> Layout:
        """The k-th of a layout with n chunks that one of a node's ranks looks after, with a chunk for every node.

        Args:
            layout: of what all ranks average.
            number: which rank of the node; None: this one.
        """
        nodes = self.between.size
        slices = replace(layout, chunks=self.inside.size, chunk_blocks=nodes * layout.chunk_blocks)
        segments = slices.chunk_segments(self.inside.rank if number is None else number)
        return replace(layout, chunks=nodes, segments=tuple(segments))


def find_levels(
    backend: Backend, local_group: LocalGroup, subject: str, refusal: InputError | None = None
) -> Levels | None:
    """The levels that `local_group` means; None where there is only one, as with nodes of one rank.

    Collective, unless `local_group` is None. What was made for a backend once is used again.

    Args:
        backend: whose ranks they are.
        local_group: which of them are one node.
        subject: what the levels are for, for messages.
        refusal: an error that this rank has found already, to be raised here once the others know.

    Raises:
        InputError: it is none of these, the launcher does not tell, or nodes are of different size; nothing was made.
        MismatchError: ranks differ, or another rank refused.
        BackendError: the backend cannot be split.
        TransportError: a rank did not take part within the timeout.
    """
    if local_group is None:
        return None
    refusal = refusal or _refusal(backend, local_group)
    made = _known.setdefault(backend, {})
    found = made.get(local_group) if refusal is None else None
    facts = {"local_group": local_group_fact(local_group), "its levels": "known" if found else "not known yet"}
    agree(backend, subject, facts, refusal)
    if found is None:
        found = made[local_group] = _make(backend, local_group, subject)
    return None if found.inside.size == 1 else found


def local_group_fact(local_group: LocalGroup) -> str:
    """What all ranks must give alike, for `onebit.comm.agree`."""
    return f"a Backend of {local_group.size} ranks" if isinstance(local_group, Backend) else repr(local_group)


_known: WeakKeyDictionary[Backend, dict[LocalGroup, Levels]] = WeakKeyDictionary()


def _refusal(backend: Backend, local_group: object) -> InputError | None:
    """Why this rank cannot tell its node."""
    where = f"rank {backend.rank}: local_group="
    if isinstance(local_group, Backend):
        return None
    if local_group == AUTO:
        if local_rank() is not None:
            return None
        return InputError(
            f"{where}'auto': expected the launcher to tell this rank's number on its machine, as torchrun does in "
            "LOCAL_RANK, got no such variable; pass the number of ranks of a node, or the Backend of this rank's node"
        )
    if isinstance(local_group, int) and not isinstance(local_group, bool):
        if local_group >= 1 and backend.size % local_group == 0:
            return None
        return InputError(f"{where}{local_group}: expected a number of ranks that divides all {backend.size} of them")
    return InputError(
        f"{where}{local_group!r}: expected None, 'auto', the number of ranks of a node, or the Backend of this rank's "
        "node"
    )


def _make(backend: Backend, local_group: LocalGroup, subject: str) -> Levels:
    nodes = _nodes(backend, local_group)
    sizes = sorted({nodes.count(node) for node in nodes})
    if len(sizes) > 1:
        raise InputError(
            f"rank {backend.rank}: {subject}: local_group={local_group!r}: expected all nodes to have as many ranks, "
            f"got nodes of {', '.join(map(str, sizes))}; start as many ranks on every node, or leave local_group out"
        )
    if isinstance(local_group, Backend):
        inside = local_group
        inside.join_order(backend)
    else:
        inside = backend.split(nodes[backend.rank])
    return Levels(inside, backend.split(inside.rank))


def _nodes(backend: Backend, local_group: LocalGroup) -> list[int]:
    """The node of every rank, by any number; all ranks know the same."""
    size = backend.size
    if isinstance(local_group, Backend):
        first = min(rank for [rank] in gather_numbers(local_group, [backend.rank]))
        return [int(node) for [node] in gather_numbers(backend, [first])]
    if isinstance(local_group, int):
        return [rank // local_group for rank in range(size)]
    mine = [float(local_rank() or 0), float(local_world_size())]
    rows = gather_numbers(backend, mine)
    numbers, most = [int(number) for number, _ in rows], max(int(most) for _, most in rows)
    count = -(-size // most)
    if numbers == [rank % most for rank in range(size)]:
        return [rank // most for rank in range(size)]
    if numbers == [rank // count for rank in range(size)]:
        return [rank % count for rank in range(size)]
    raise InputError(
        f"rank {backend.rank}: local_group='auto': expected the ranks of a machine to be numbered one after the other, "
        f"or machines to take turns; got, in rank order, the numbers {numbers} on their machines. Pass the Backend of "
        "this rank's node, such as one made by Backend.split"
    )
