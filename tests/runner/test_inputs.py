from __future__ import annotations

import torch

from labkit.request import SamplingParams
from labkit.runner.inputs import pack
from labkit.runner.sequence import Sequence, Work


def test_packing_says_where_every_token_is_and_goes() -> None:
    decoding = Sequence(0, [50, 51, 52, 53, 54, 55], 4, 99, SamplingParams(), 0, 0.0, computed=5, blocks=[7, 2])
    chunk = Sequence(1, list(range(60, 75)), 15, 99, SamplingParams(), 0, 0.0, computed=3, blocks=[9, 0, 4, 5])
    ending = Sequence(2, [80, 81], 2, 99, SamplingParams(), 0, 0.0, computed=0, blocks=[1])
    inputs = pack([Work(decoding, 1), Work(chunk, 6), Work(ending, 2)], 4, torch.device("cpu"))
    assert inputs.token_ids.tolist() == [55, 63, 64, 65, 66, 67, 68, 80, 81]
    assert inputs.positions.tolist() == [5, 3, 4, 5, 6, 7, 8, 0, 1]
    assert inputs.attention.slots.tolist() == [2 * 4 + 1, 9 * 4 + 3, 0, 1, 2, 3, 4 * 4, 4, 5]
    assert inputs.sample_rows.tolist() == [0, 8], "the chunk does not reach its end, so it samples nothing"
    assert inputs.attention.query_lens == [1, 6, 2]
    assert inputs.attention.context_lens == inputs.attention.contexts.tolist() == [6, 9, 2]
    assert inputs.attention.block_tables[1].tolist() == [9, 0, 4, 5]
    assert inputs.attention.block_tables[0, :2].tolist() == [7, 2]
    assert inputs.attention.decodes == 1
