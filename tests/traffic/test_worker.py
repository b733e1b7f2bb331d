from __future__ import annotations

import json

from labkit.traffic.answer import Record
from labkit.traffic.events import KINDS, events_table, read_spool
from labkit.traffic.target import Target
from labkit.traffic.worker import Order, own_share, prepare, spool_line
from labkit.traffic.workload import Arrival, Workload, schedule
from labkit.training.ledger import make_problem


def test_an_order_survives_its_journey():
    order = Order(Target("h", 1, True, "/b", "key"), "m", Workload.article(users=3), 1, 2, "spool")
    assert Order.from_json(order.to_json()) == order


def test_the_shares_of_the_processes_are_the_schedule():
    workload = Workload.article(arrivals="poisson", rate=20.0, requests=50)
    orders = [Order(Target("h", 1), "m", workload, share, 3, "spool") for share in range(3)]
    shares = [list(own_share(schedule(workload), order)) for order in orders]
    assert sorted((one for share in shares for one in share), key=lambda one: one.index) == list(schedule(workload))
    gaps = [{b.t_s - a.t_s for a, b in zip(share, share[1:], strict=False)} for share in shares]
    assert not gaps[0] & gaps[1] and not gaps[1] & gaps[2]


def test_a_request_asks_the_problem_of_its_number():
    workload = Workload.article(seed=4, max_tokens=99)
    ask = prepare(Arrival(7, None, "short"), workload, "m")
    problem, body = make_problem(4, 7, "short"), json.loads(ask.body)
    assert body["messages"] == [{"role": "user", "content": problem.prompt}] and ask.answer == problem.answer
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("m", 99, 0, True)
    assert body["stream_options"] == {"include_usage": True}
    plain = json.loads(prepare(Arrival(7, None, "short"), workload.but(stream=False), "m").body)
    assert plain["stream"] is False and "stream_options" not in plain


def test_a_record_comes_back_from_the_spool_as_events(tmp_path):
    record = Record(3, "long", "net", 10.0, 10.5, 11.0, [(11.5, 2, "reasoning"), (12.0, 1, "answer")], 12.5)
    record.prompt_tokens, record.completion_tokens, record.finish_reason = 40, 4, "stop"
    record.reasoning, record.text, record.correct = "r", "a", True
    failed = Record(4, "short", "net", 10.0, 10.0, end=11.0, failure="shed", message="429: busy")
    (tmp_path / "spool").write_text(spool_line(record, 10.0) + spool_line(failed, 10.0) + '{"index": 5, "cut')
    records = read_spool(tmp_path / "spool")
    assert [one["index"] for one in records] == [3, 4]  # the line without its end is left out
    events = events_table(records)
    one = events[events["request"] == 3]
    assert one["kind"].tolist() == ["scheduled", "sent", "first_byte", "chunk", "chunk", "done"]
    assert one["t_s"].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert one["tokens"].tolist() == [0, 0, 0, 2, 1, 4]
    done, bad = one.iloc[-1], events[events["kind"] == "failed"].iloc[0]
    assert (done["prompt_tokens"], done["detail"], done["correct"], done["text"]) == (
        40,
        "stop",
        True,
        "<think>r</think>a",
    )
    assert (bad["detail"], bad["text"]) == ("shed", "429: busy")
    assert set(events["kind"]) <= set(KINDS)
    assert events.dtypes.astype(str).to_dict() | {"kind": "", "bucket": "", "family": "", "detail": "", "text": ""} == {
        "request": "int64", "t_s": "float64", "tokens": "int32", "prompt_tokens": "int32", "correct": "boolean",
        "kind": "", "bucket": "", "family": "", "detail": "", "text": "",
    }  # fmt: skip
