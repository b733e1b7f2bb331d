from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.request import SamplingParams
from labkit.runner.inputs import (
    BlockTables,
    Mailbox,
    Size,
    StepInputs,
    arrays,
    capacity_bytes,
    metadata,
    places_of,
    size_of,
)
from labkit.runner.sequence import PLACEHOLDER, Sequence, Work

CPU = torch.device("cpu")


def sequence(tokens: list[int], computed: int, blocks: list[int], row: int) -> Sequence:
    return Sequence(row, tokens, len(tokens), 99, SamplingParams(), 0, 0.0, computed, blocks, row)


def three() -> list[Work]:
    decoding = sequence([50, 51, 52, 53, 54, 55], 5, [7, 2], row=3)
    chunk = sequence(list(range(60, 75)), 3, [9, 0, 4, 5], row=0)
    ending = sequence([80, 81], 0, [1], row=2)
    return [Work(decoding, 1), Work(chunk, 6), Work(ending, 2)]


def inputs(work: list[Work], size: Size, tables: BlockTables) -> StepInputs:
    return Mailbox(capacity_bytes(64, 8, 64), CPU).send(arrays(work, size, tables, 4))


def test_packing_says_where_every_token_is_and_goes() -> None:
    tables, work = BlockTables(4, 5, CPU), three()
    found = inputs(work, size_of(work), tables)
    assert found.token_ids.tolist() == [55, 63, 64, 65, 66, 67, 68, 80, 81]
    assert found.positions.tolist() == [5, 3, 4, 5, 6, 7, 8, 0, 1]
    assert found.slots.tolist() == [2 * 4 + 1, 9 * 4 + 3, 0, 1, 2, 3, 4 * 4, 4, 5]
    assert found.rows.tolist() == [3, 0, 2]
    assert found.contexts.tolist() == [6, 9, 2]
    assert found.query_starts.tolist() == [0, 1, 7, 9]
    assert found.ends.tolist() == [0, 6, 8]


def test_padding_touches_nothing() -> None:
    tables, work = BlockTables(4, 5, CPU), three()
    found = inputs(work, Size(decodes=3, chunks=4, chunk_tokens=10), tables)
    assert found.token_ids.tolist() == [55, 0, 0, 63, 64, 65, 66, 67, 68, 80, 81, 0, 0]
    assert found.slots.tolist() == [9, -1, -1, 39, 0, 1, 2, 3, 16, 4, 5, -1, -1]
    assert found.rows.tolist() == [3, 4, 4, 0, 2, 4, 4], "rows of padding are nobody's"
    assert found.contexts.tolist() == [6, 0, 0, 9, 2, 0, 0]
    assert found.query_starts.tolist() == [0, 1, 2, 3, 9, 11, 11, 11]
    assert found.ends.tolist() == [0, 1, 2, 8, 10, 10, 10]
    nothing = inputs([], Size(2, 1, 3), tables)
    assert nothing.contexts.tolist() == [0, 0, 0] and nothing.slots.tolist() == [-1] * 5
    assert nothing.query_starts.tolist() == [0, 1, 2, 2] and nothing.ends.tolist() == [0, 1, 1]


def test_only_blocks_that_are_new_travel() -> None:
    tables, work = BlockTables(4, 5, CPU), three()
    first = inputs(work, size_of(work), tables)
    assert first.new_blocks.tolist() == [7, 2, 9, 0, 4, 5, 1]
    assert first.new_places.tolist() == [15, 16, 0, 1, 2, 3, 10]
    tables.device.view(-1).index_copy_(0, first.new_places, first.new_blocks)
    assert torch.equal(tables.device, torch.from_numpy(tables.host))
    work[2].sequence.blocks.append(6)
    second = inputs(work, size_of(work), tables)
    assert (second.new_blocks.tolist(), second.new_places.tolist()) == ([6], [11])
    meta = metadata(first, tables, size_of(work), ([1, 6, 2], [6, 9, 2]), triton=False)
    assert meta.block_tables[1].tolist() == [9, 0, 4, 5, 0]
    assert (meta.decodes, meta.triton) == (1, False)


def test_a_token_that_only_the_device_knows_is_named_by_its_row() -> None:
    waiting = sequence([50, 51, PLACEHOLDER], 2, [7], row=3)
    found = inputs([Work(waiting, 1)], Size(1), BlockTables(4, 5, CPU))
    assert found.token_ids.tolist() == [-1 - 3]


def test_sampling_parameters_travel_only_where_somebody_samples() -> None:
    work = three()
    assert len(inputs(work, size_of(work), BlockTables(4, 5, CPU)).temperature) == 0
    work[2].sequence.sampling = SamplingParams(temperature=0.5, top_k=10**12, top_p=0.25)
    found = inputs(work, size_of(work), BlockTables(4, 5, CPU))
    assert found.temperature.tolist() == [0, 0, 0.5] and found.top_p.tolist() == [1, 1, 0.25]
    assert found.top_k.tolist() == [0, 0, 2**31 - 1], "more than any vocabulary has"
    assert all(0 <= each < 1 for each in found.uniforms.tolist())
    padded = Size(decodes=3, chunks=3, chunk_tokens=10)
    assert places_of(work, padded) == [0, 3, 4]
    assert inputs(work, padded, BlockTables(4, 5, CPU)).temperature.tolist() == [0, 0, 0, 0, 0.5, 0]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_sent_stays_until_the_call_after_the_next(seed: int) -> None:
    chance = np.random.default_rng(seed)
    mailbox, tables = Mailbox(capacity_bytes(64, 8, 64), CPU), BlockTables(4, 5, CPU)
    step = [arrays(three()[:count], size_of(three()[:count]), tables, 4) for count in chance.integers(1, 4, size=3)]
    sent = [mailbox.send(parts) for parts in step[:2]]
    for parts, found in zip(step, sent, strict=False):
        assert all(np.array_equal(getattr(found, name).numpy(), part) for name, part in parts.items())
