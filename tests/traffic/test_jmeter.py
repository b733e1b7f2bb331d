"""The plan for JMeter says what the workload says, its questions are those of our client, and its results are read."""

from __future__ import annotations

import csv
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import pytest

from labkit.cli import app
from labkit.errors import UserError
from labkit.experiments.metrics import latency, requests_table, ttfb
from labkit.traffic.answer import FAILURES
from labkit.traffic.golden import Golden
from labkit.traffic.jmeter import DONE, ERROR, FINISHED, read_jtl, write_plan
from labkit.traffic.target import Target
from labkit.traffic.worker import prepare
from labkit.traffic.workload import Workload, schedule

WORKLOAD = Workload.article(users=7, requests=45, timeout_s=2.5, think_s=0.25, ramp_s=3.0, seed=4)
TARGET = Target.parse("http://10.0.0.7:8000/api", "secret")
HEADER = "timeStamp,elapsed,label,responseCode,responseMessage,threadName,success,failureMessage,bytes,Latency,index"


def properties(plan: Path, kind: str) -> dict[str, str]:
    """Name -> value of every simple property of the plan's only element of this kind."""
    [element] = ElementTree.parse(plan).getroot().iter(kind)
    return {
        each.get("name", ""): each.text or ""
        for each in element.iter()
        if each.tag in ("stringProp", "intProp", "boolProp")
    }


@pytest.fixture
def plan(tmp_path) -> Path:
    assert write_plan(tmp_path / "plan.jmx", WORKLOAD, TARGET, "golden") == 45
    return tmp_path / "plan.jmx"


def test_its_questions_are_those_of_our_client_byte_for_byte(plan):
    lines = plan.with_suffix(".tsv").read_bytes().split(b"\n")
    assert lines.pop() == b""
    asks = [prepare(arrival, WORKLOAD, "golden") for arrival in islice(schedule(WORKLOAD), 45)]
    assert [tuple(line.split(b"\t")) for line in lines] == [
        (str(ask.index).encode(), ask.bucket.encode(), ask.body) for ask in asks
    ]
    given = properties(plan, "CSVDataSet")
    assert given["filename"] == "plan.tsv" and given["delimiter"] == r"\t" and given["recycle"] == "false"
    assert given["stopThread"] == "true" and given["shareMode"] == "shareMode.all" and given["quotedData"] == "false"


def test_its_threads_are_the_users(plan, tmp_path):
    users = properties(plan, "ThreadGroup")
    assert users["ThreadGroup.num_threads"] == "7" and users["ThreadGroup.ramp_time"] == "3"
    assert users["LoopController.loops"] == "-1" and users["ThreadGroup.scheduler"] == "false"
    assert " ? 250 : 500)" in properties(plan, "TestAction")["ActionProcessor.duration"]

    count = write_plan(tmp_path / "timed.jmx", WORKLOAD.but(requests=None, duration_s=60.0), TARGET, "golden")
    users = properties(tmp_path / "timed.jmx", "ThreadGroup")
    assert users["ThreadGroup.scheduler"] == "true" and users["ThreadGroup.duration"] == "63"
    assert count == 7 * 63 / (0.25 + 0.5) == len((tmp_path / "timed.tsv").read_text().splitlines())


def test_its_request_can_be_sent_elsewhere_and_holds_no_key(plan):
    request = properties(plan, "HTTPSamplerProxy")
    assert (
        request["HTTPSampler.domain"] == "${__P(host,10.0.0.7)}" and request["HTTPSampler.port"] == "${__P(port,8000)}"
    )
    assert request["HTTPSampler.path"] == "/api/v1/chat/completions" and request["HTTPSampler.method"] == "POST"
    assert request["HTTPSampler.response_timeout"] == request["HTTPSampler.connect_timeout"] == "2500"
    assert request["HTTPSampler.use_keepalive"] == "true" and request["Argument.value"] == "${body}"
    assert properties(plan, "DurationAssertion")["DurationAssertion.duration"] == "2500"
    text = plan.read_text()
    assert "Bearer ${__P(api_key,)}" in text and "secret" not in text


def test_without_a_key_there_is_no_header_and_without_a_stream_no_done(tmp_path):
    target = Target.parse("https://localhost", transport="http/1.1 close")
    write_plan(tmp_path / "plan.jmx", WORKLOAD.but(stream=False), target, "golden")
    request, text = properties(tmp_path / "plan.jmx", "HTTPSamplerProxy"), (tmp_path / "plan.jmx").read_text()
    assert request["HTTPSampler.protocol"] == "https" and request["HTTPSampler.use_keepalive"] == "false"
    assert "Authorization" not in text and "DONE" not in text and "finish_reason" in text


@pytest.mark.parametrize(
    "changes, url, options, said",
    [
        ({"arrivals": "poisson"}, "http://h:1", {}, "a closed loop only"),
        ({"warmup_s": 2.0}, "http://h:1", {}, "leave out --warm-up"),
        ({"ramp_s": 2.5}, "http://h:1", {}, "a ramp in whole seconds"),
        ({}, "grpc://h:1", {}, "HTTP/1.1"),
        ({}, "https://h:1", {"transport": "http/2 tls"}, "HTTP/1.1"),
        ({}, "http://h:1", {"connections": 2}, "--connections"),
    ],
)
def test_what_jmeter_cannot_do_is_refused(changes, url, options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        write_plan(tmp_path / "plan.jmx", WORKLOAD.but(**changes), Target.parse(url, **options), "golden")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_and_what_fails_leaves_nothing(plan, tmp_path):
    before = plan.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_plan(plan, WORKLOAD, TARGET, "golden")
    plan.rename(tmp_path / "other.jmx")
    with pytest.raises(UserError, match=r"plan\.tsv exists already"):
        write_plan(plan, WORKLOAD, TARGET, "golden")
    assert (tmp_path / "other.jmx").read_bytes() == before
    with pytest.raises(UserError, match=r"call it plan\.jmx"):
        write_plan(tmp_path / "plan.xml", WORKLOAD, TARGET, "golden")
    with pytest.raises(UserError, match="cannot be written"):
        write_plan(tmp_path / "plan.tsv" / "p.jmx", WORKLOAD, TARGET, "golden")
    assert {each.name for each in tmp_path.iterdir()} == {"other.jmx", "plan.tsv"}


def test_the_command_asks_the_server_for_its_model_and_says_what_to_run(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    with Golden() as golden:
        words = ["load", golden.url, "--users", "3", "--duration", "2", "--export-jmeter", "plan.jmx", "--api-key", "k"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert not golden.answered
    first, command = done.stdout.splitlines()
    assert first.startswith("wrote plan.jmx, and its 12 questions to plan.tsv beside it")
    assert command == ('jmeter -n -t plan.jmx -Jresults=plan.jtl -Jsample_variables=index -Japi_key="$LABKIT_API_KEY"')
    assert '"model": "golden"' in Path("plan.tsv").read_text() and not Path("runs").exists()


def write_results(path: Path, rows: list[dict[str, object]]) -> None:
    """As JMeter writes them; what is left out is that of a whole answer."""
    whole = {"timeStamp": 1_700_000_000_000, "elapsed": 500, "label": "chat short", "responseCode": "200",
             "responseMessage": "OK", "success": "true", "failureMessage": "", "Latency": 200}  # fmt: skip
    with open(path, "w", newline="") as lines:
        out = csv.DictWriter(lines, HEADER.split(","))
        out.writeheader()
        out.writerows({**whole, "index": index, **row} for index, row in enumerate(rows))


def exception(name: str, message: str = "", first_byte: int = 0) -> dict[str, object]:
    return {"responseCode": f"Non HTTP response code: {name}", "responseMessage": message, "Latency": first_byte,
            "success": "false"}  # fmt: skip


FAILED: list[tuple[dict[str, object], str]] = [
    (exception("org.apache.http.conn.HttpHostConnectException", "Connection refused (Connection refused)"), "refused"),
    (exception("java.net.ConnectException", "Network is unreachable"), "connect"),
    (exception("org.apache.http.NoHttpResponseException"), "connect"),
    (exception("java.net.UnknownHostException"), "connect"),
    (exception("org.apache.http.conn.ConnectTimeoutException"), "timeout"),
    (exception("java.net.SocketTimeoutException", first_byte=300), "timeout"),
    (exception("java.net.SocketException", "Connection reset", first_byte=300), "truncated"),
    (exception("org.apache.http.client.ClientProtocolException"), "protocol"),
    ({"responseCode": "503", "success": "false"}, "shed"),
    ({"responseCode": "404", "success": "false"}, "4xx"),
    ({"responseCode": "302", "success": "false"}, "protocol"),
    ({"success": "false", "failureMessage": f"Test failed: text expected to contain /{FINISHED}/"}, "truncated"),
    ({"success": "false", "failureMessage": f"Test failed: text expected to contain /{DONE}/"}, "truncated"),
    ({"success": "false", "failureMessage": f"Test failed: text expected not to contain /{ERROR}/"}, "stream_error"),
    ({"success": "false", "failureMessage": "Der Vorgang hat zu lange gedauert"}, "timeout"),
]  # fmt: skip


def test_failures_get_our_names(tmp_path):
    write_results(tmp_path / "plan.jtl", [row for row, _ in FAILED])
    table = requests_table(read_jtl(tmp_path / "plan.jtl"))
    assert list(table["failure"]) == [kind for _, kind in FAILED]
    assert {kind for _, kind in FAILED} == set(FAILURES) - {"5xx"}
    assert "refused" in table["text"][0] and FINISHED in table["text"][11]


def test_results_are_read_into_events_and_go_by_our_metrics(tmp_path):
    rows: list[dict[str, object]] = [
        {"timeStamp": 1_700_000_000_000 + 100 * n, "elapsed": 400 + n, "Latency": 200 + n, "label": "chat long"}
        for n in range(101)
    ]
    write_results(tmp_path / "plan.jtl", rows[::-1])
    table = requests_table(read_jtl(tmp_path / "plan.jtl"))
    assert table["scheduled"].min() == 0.0 and table["scheduled"].max() == pytest.approx(10.0)
    assert table["bucket"].unique().tolist() == ["long"] and not table["failure"].any()
    assert latency(table, (0, 11), 50).value == pytest.approx(0.45)
    assert ttfb(table, (0, 11), 50).value == pytest.approx(0.25)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "plan.jtl"
    with pytest.raises(UserError, match="cannot be read"):
        read_jtl(path)
    path.write_text("1700000000000,500,chat short,200,OK\n")
    with pytest.raises(UserError, match="run the plan with -Jresults="):
        read_jtl(path)
    path.write_text(f"{HEADER}\n1700000000000,500,chat short,200,OK,users 1-1,true,,9,2x,0\n")
    with pytest.raises(UserError, match="is damaged"):
        read_jtl(path)
    write_results(path, [{"index": 0}, {"index": 0}])
    with pytest.raises(UserError, match="more than one run"):
        read_jtl(path)
