from __future__ import annotations

import pytest

from labkit.bench import workloads
from labkit.errors import UserError


def lengths(requests):
    return [len(request.prompt_ids) for request in requests]


def test_throughput_draws_both_lengths_from_100_to_1024():
    requests = workloads.throughput(1000)
    assert len(requests) == 256
    for drawn in (lengths(requests), [request.new_tokens for request in requests]):
        assert 100 <= min(drawn) < 120 and 1000 < max(drawn) <= 1024
        assert 480 < sum(drawn) / len(drawn) < 640
    assert {token for request in requests for token in request.prompt_ids} == set(range(1000))


def test_the_mix_has_its_shares_exactly_and_in_no_order():
    requests = workloads.mix(50)
    short, medium, long = (
        [length for length in lengths(requests) if low <= length <= high]
        for low, high in ((32, 511), (512, 2047), (2048, 4096))
    )
    assert (len(short), len(medium), len(long)) == (360, 180, 60)
    assert lengths(requests) != sorted(lengths(requests))
    assert {request.new_tokens for request in requests} == {128}
    assert len(workloads.mix(50, 7)) == 7 and len(workloads.mix(50, 1)) == 1


def test_other_contents_have_the_same_lengths_and_seeds_have_not():
    first, again, other = (workloads.mix(5000, 20, content=content) for content in (0, 0, 1))
    assert first == again
    assert lengths(first) == lengths(other) and first[0].prompt_ids != other[0].prompt_ids
    assert lengths(workloads.mix(5000, 20, seed=1)) != lengths(first)


def test_decode_is_one_short_prompt():
    (request,) = workloads.decode(50)
    assert (len(request.prompt_ids), request.new_tokens) == (128, 256)


def test_what_does_not_fit_the_context_is_refused_with_both_numbers():
    workloads.check_context(workloads.decode(50), 384)
    with pytest.raises(UserError, match="384 tokens together, the model takes 383"):
        workloads.check_context(workloads.decode(50), 383)
