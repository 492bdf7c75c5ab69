from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.types.free_list import FreeList


def test_best_fit_and_joined_neighbours():
    free = FreeList()
    free.add(0, 10)
    free.add(20, 4)
    assert free.take(4) == 20  # the smallest hole that holds it
    assert free.take(6) == 0
    free.add(0, 6)  # joins [6, 10)
    assert (free.free_bytes, free.largest_bytes) == (10, 10)
    free.add(20, 4)
    free.add(10, 10)  # joins both sides
    assert (free.free_bytes, free.largest_bytes) == (24, 24)
    assert free.take(25) is None
    assert free.take_largest(100) == (0, 24)
    assert free.take_largest(1) is None
    free.add(5, 3)
    assert (free.hole_at(5), free.hole_at(6)) == (3, 0)
    assert free.take_hole(5) == 3
    assert free.free_bytes == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 40)), max_size=80),
    st.randoms(use_true_random=False),
)
def test_no_byte_is_lost_or_given_twice(steps, random):
    size = 256
    free, owner = FreeList(), [None] * size
    free.add(0, size)
    taken: list[tuple[int, int]] = []
    for take, nbytes in steps:
        if take:
            start = free.take(nbytes)
            if start is None:
                assert free.largest_bytes < nbytes
                continue
            assert all(o is None for o in owner[start : start + nbytes])
            owner[start : start + nbytes] = [len(taken)] * nbytes
            taken.append((start, nbytes))
        elif taken:
            start, size_back = taken.pop(random.randrange(len(taken)))
            owner[start : start + size_back] = [None] * size_back
            free.add(start, size_back)
        assert free.free_bytes == owner.count(None)
        runs = "".join("." if o is None else "x" for o in owner).split("x")
        assert free.largest_bytes == max(map(len, runs))  # neighbours are always joined
