"""Read plans: pure, so checked on made-up layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from expertstream.checkpoint.format import ALIGNMENT, ExpertLayout
from expertstream.experts.store import plan_read, slot_bytes
from expertstream.formats import Affine, ExpertFormat

FORMAT = ExpertFormat(*[Affine(1, 32, 2, 32, "bf16")] * 3)


def layout(offsets: list[list[int]], lengths: list[int]) -> ExpertLayout:
    array = np.array(offsets, np.int64)
    pieces = tuple((i % len(lengths), 0) for i in range(9))
    return ExpertLayout(0, FORMAT, (Path("a"),), np.zeros_like(array), array, tuple(lengths), pieces)


@given(st.data(), st.lists(st.integers(1, 20000), min_size=1, max_size=9))
def test_reads_are_aligned_and_cover_every_range(data: st.DataObject, lengths: list[int]) -> None:
    offsets = [[data.draw(st.integers(0, 1 << 40)) for _ in lengths] for _ in range(3)]
    made = layout(offsets, lengths)
    room = slot_bytes(made)
    for expert in range(3):
        plan = plan_read(made, expert)
        end = 0
        for read, offset, length, start in zip(plan.reads, offsets[expert], lengths, plan.pieces, strict=False):
            assert read.offset % ALIGNMENT == read.length % ALIGNMENT == read.dest % ALIGNMENT == 0
            assert read.dest >= end  # parts do not overlap
            end = read.dest + read.length
            assert read.offset <= offset and offset + length == read.offset + read.needed <= read.offset + read.length
            # Byte 0 of the range lies where the plan says.
            assert start - read.dest == offset - read.offset
        assert end <= room


def test_an_aligned_record_is_one_read_of_exactly_its_bytes() -> None:
    plan = plan_read(layout([[8192], [8192 + 12288]], [12288]), 1)
    assert len(plan.reads) == 1
    assert (plan.reads[0].offset, plan.reads[0].length, plan.reads[0].needed, plan.reads[0].dest) == (
        20480,
        12288,
        12288,
        0,
    )
    assert slot_bytes(layout([[8192]], [12288])) == 12288
