"""The same workload as a plan of JMeter: ``jmeter -n -t plan.jmx -Jresults=plan.jtl -Jsample_variables=index``.

A plan is two files that go together, ``plan.jmx`` and the questions beside it, ``plan.tsv``, of which each thread takes
the next; with the last one, or when the time is up, the run ends. The plan keeps to what JMeter 2.13 and 5 both know
(but the 2.13 of Debian 12 reads no plan at all: the XStream that it is given forbids that). ``make peer-jmeter``
installs a JMeter 5.5. What can be set when a plan is run: ``-Jhost= -Jport=`` (elsewhere), ``-Japi_key=`` (not written
into the plan) and ``-Jresults=``, a CSV file for ``read_jtl``; JMeter adds to one that is there.

What JMeter measures: the elapsed time ends with the last byte; ``Latency`` is the time to the first byte of the body,
not of the headers. That is the TTFT of a server whose first event holds the first token, and less than that where the
first event only says whose turn it is. The time between tokens it does not see. The first request of each thread bears
the warming up of the JVM, some 0.2 s.

What differs from our own client: times are whole milliseconds; an answer that takes longer than the timeout is a
failure, but not cut off while bytes keep coming; after any failure, not only when it was turned away, a user waits
FAILURE_PAUSE_S; and what is asked during the ramp counts. JMeter trusts every certificate.
"""

from __future__ import annotations

import csv
import math
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import pandas as pd

from labkit.errors import UserError
from labkit.files import writing_atomic
from labkit.traffic.answer import MESSAGE_CHARACTERS, kind_of_status
from labkit.traffic.ask import server_model
from labkit.traffic.events import events_table
from labkit.traffic.target import Target
from labkit.traffic.worker import FAILURE_PAUSE_S, prepare
from labkit.traffic.workload import Workload, schedule

FASTEST_ANSWER_S = 0.5
"""Where the clock ends a run, there are questions enough for answers that take so long."""

ERROR = '"error": ?[{"]|"finish_reason": ?"error"'
FINISHED = '"finish_reason": ?"'
DONE = r"(?m)^data: ?\[DONE\]"
"""What an answer must not hold, must hold, and must hold when it is streamed: regular expressions of JMeter. Inside of
a text the quotation marks would be escaped."""

READ = {"timeStamp", "elapsed", "label", "responseCode", "responseMessage", "success", "failureMessage", "Latency"}
"""Columns of the results."""

CONTAINS, EQUALS, NOT = 2, 8, 4
"""JMeter's numbers for how an assertion compares."""


def write_plan(path: Path, workload: Workload, target: Target, model: str | None = None) -> int:
    """Writes the plan to ``path`` and its questions beside it, and returns how many these are.

    ``model`` None asks the server for its first. Raises UserError for a workload or a target that JMeter cannot do as
    our client does, and for files that exist or cannot be written.
    """
    questions = path.with_suffix(".tsv")
    if path.suffix != ".jmx":
        raise UserError(f"a plan of JMeter is a .jmx file, and {path} is not named so; call it {path.stem}.jmx")
    for file in (path, questions):
        if file.exists():
            raise UserError(f"{file} exists already; remove it or give the plan another name")
    _refuse(workload, target)
    model = server_model(target) if model is None else model
    count = _questions(workload)
    try:
        # One in the other: both files take their places, or neither.
        with writing_atomic(questions) as lines, writing_atomic(path) as whole:
            _write_questions(lines, workload, count, model)
            plan(workload, target, questions.name).write(whole, encoding="UTF-8", xml_declaration=True)
    except OSError as error:
        raise UserError(f"the plan cannot be written to {path.parent}: {error.strerror or error}") from error
    return count


def export(path: Path, workload: Workload, target: Target, model: str | None = None) -> str:
    """``write_plan``, and in words what was written and how it is run."""
    count, results = write_plan(path, workload, target, model), path.with_suffix(".jtl")
    said = f"wrote {path}, and its {count} questions to {path.with_suffix('.tsv').name} beside it"
    if workload.duration_s is not None:
        said += f" (one for each user every {workload.think_s + FASTEST_ANSWER_S:g} s; the run ends when none is left)"
    key = ' -Japi_key="$LABKIT_API_KEY"' if target.api_key else ""
    return f"{said}; run it with\njmeter -n -t {path} -Jresults={results} -Jsample_variables=index{key}"


def plan(workload: Workload, target: Target, questions: str) -> ElementTree[Element]:
    """The plan, its questions in a file called ``questions`` beside it."""
    root = Element("jmeterTestPlan", version="1.2", properties="2.8", jmeter="2.13")
    tests = _add(SubElement(root, "hashTree"), "TestPlan", "TestPlanGui", workload.name, {
        "TestPlan.functional_mode": False, "TestPlan.serialize_threadgroups": False,
    })  # fmt: skip
    users = _users(tests, workload)
    _add(users, "CSVDataSet", "TestBeanGUI", "questions", {
        "filename": questions, "fileEncoding": "UTF-8", "variableNames": "index,bucket,body", "delimiter": r"\t",
        "quotedData": False, "ignoreFirstLine": False, "recycle": False, "stopThread": True,
        "shareMode": "shareMode.all",
    })  # fmt: skip
    _headers(users, target)
    asked = _request(users, workload, target)
    # The first that fails gives the reason that JMeter writes down.
    _asserts(asked, "status", "Assertion.response_code", EQUALS, ["200"])
    _asserts(asked, "no error inside", "Assertion.response_data", CONTAINS | NOT, [ERROR])
    _asserts(asked, "a whole answer", "Assertion.response_data", CONTAINS, [FINISHED] + [DONE] * workload.stream)
    _add(asked, "DurationAssertion", "DurationAssertionGui", "in time", {
        "DurationAssertion.duration": str(_ms(workload.timeout_s)),
    })  # fmt: skip
    # A timer would wait before the first question too; a pause comes after the answer.
    think, failed = _ms(workload.think_s), _ms(max(workload.think_s, FAILURE_PAUSE_S))
    _add(users, "TestAction", "TestActionGui", "think", {
        "ActionProcessor.action": 1, "ActionProcessor.target": 0,
        "ActionProcessor.duration": f"${{__jexl2(${{JMeterThread.last_sample_ok}} ? {think} : {failed})}}",
    })  # fmt: skip
    _results(tests)
    indent(root)
    return ElementTree(root)


def read_jtl(path: Path) -> pd.DataFrame:
    """The events (see labkit.traffic.events) in the CSV that a plan writes to ``-Jresults=``; t_s since the first.

    ``request`` is the index in the schedule where JMeter was told to keep it (``-Jsample_variables=index``), otherwise
    the row. Sent is scheduled, first_byte the first of the body; JMeter knows no tokens and no right answers. Raises
    UserError for another file, and for one that holds a question twice: two runs, one after the other.
    """
    try:
        with open(path, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not rows or not rows[0].keys() >= READ:
        raise UserError(f"{path} has no results of JMeter with a header; run the plan with -Jresults={path}")
    try:
        zero = min(int(row["timeStamp"]) for row in rows)
        records = [_record(row, number, zero) for number, row in enumerate(rows)]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}; was JMeter killed while it wrote?") from error
    if len({record["index"] for record in records}) < len(records):
        raise UserError(f"{path} holds more than one run: JMeter adds to a file that is there; give each its own")
    return events_table(records)


def _write_questions(path: Path, workload: Workload, count: int, model: str) -> None:
    """Lines of index, bucket and body. JSON escapes tabs and ends of lines, so nothing needs quotation marks."""
    with open(path, "w", encoding="ascii", newline="\n") as lines:
        for arrival in islice(schedule(workload), count):
            lines.write(f"{arrival.index}\t{arrival.bucket}\t{prepare(arrival, workload, model).body.decode()}\n")


def _refuse(workload: Workload, target: Target) -> None:
    if target.transport not in ("http/1.1", "http/1.1 close", "alpn") or isinstance(target.connections, int):
        raise UserError(
            "JMeter speaks HTTP/1.1, on a connection of each thread's own; "
            "give an http:// or https:// address, and neither another --transport nor --connections"
        )
    if workload.open_loop:
        raise UserError(
            "JMeter's threads each wait for their answer: a plan holds a closed loop only, and a slow server would be "
            "asked less than --rate or --trace says; export --users, or let labkit load send it"
        )
    if workload.warmup_s:
        raise UserError("JMeter counts all that it sends: a plan has no warm-up; leave out --warm-up")
    for name, seconds in (("ramp", workload.ramp_s), ("duration", workload.duration_s or 0.0)):
        if seconds != int(seconds):
            raise UserError(f"JMeter counts a {name} in whole seconds; {seconds:g} s is none")


def _questions(workload: Workload) -> int:
    if workload.duration_s is None:
        assert workload.requests is not None, "a closed loop ends by one of them"
        return workload.requests
    asked_s = workload.ramp_s + workload.duration_s
    return workload.users * math.ceil(asked_s / (workload.think_s + FASTEST_ANSWER_S))


def _users(tree: Element, workload: Workload) -> Element:
    clock = workload.duration_s is not None
    under = _add(tree, "ThreadGroup", "ThreadGroupGui", "users", {
        "ThreadGroup.on_sample_error": "continue",
        "ThreadGroup.num_threads": str(workload.users),
        "ThreadGroup.ramp_time": str(int(workload.ramp_s)),
        "ThreadGroup.scheduler": clock,
        "ThreadGroup.duration": str(int(workload.ramp_s + (workload.duration_s or 0))) if clock else "",
        "ThreadGroup.delay": "",
        # JMeter 5 would otherwise open a new connection for every question.
        "ThreadGroup.same_user_on_next_iteration": True,
    })  # fmt: skip
    loop = SubElement(
        tree[-2], "elementProp", name="ThreadGroup.main_controller", elementType="LoopController",
        guiclass="LoopControlPanel", testclass="LoopController", testname="until the questions end", enabled="true",
    )  # fmt: skip
    _properties(loop, {"LoopController.continue_forever": False, "LoopController.loops": -1})
    return under


def _headers(tree: Element, target: Target) -> None:
    headers = {"Content-Type": "application/json", "X-Request-Id": "${index}"}
    if target.api_key:
        headers["Authorization"] = "Bearer ${__P(api_key,)}"
    _add(tree, "HeaderManager", "HeaderPanel", "headers", {})
    collection = SubElement(tree[-2], "collectionProp", name="HeaderManager.headers")
    for name, value in headers.items():
        header = SubElement(collection, "elementProp", name=name, elementType="Header")
        _properties(header, {"Header.name": name, "Header.value": value})


def _request(tree: Element, workload: Workload, target: Target) -> Element:
    under = _add(tree, "HTTPSamplerProxy", "HttpTestSampleGui", "chat ${bucket}", {
        "HTTPSampler.implementation": "HttpClient4",
        "HTTPSampler.protocol": "https" if target.tls else "http",
        "HTTPSampler.domain": f"${{__P(host,{target.host})}}",
        "HTTPSampler.port": f"${{__P(port,{target.port})}}",
        "HTTPSampler.path": f"{target.base}/v1/chat/completions",
        "HTTPSampler.method": "POST",
        "HTTPSampler.contentEncoding": "UTF-8",
        "HTTPSampler.follow_redirects": False,
        "HTTPSampler.auto_redirects": False,
        "HTTPSampler.use_keepalive": target.transport != "http/1.1 close",
        "HTTPSampler.DO_MULTIPART_POST": False,
        "HTTPSampler.connect_timeout": str(_ms(workload.timeout_s)),
        "HTTPSampler.response_timeout": str(_ms(workload.timeout_s)),
        "HTTPSampler.postBodyRaw": True,
    })  # fmt: skip
    given = SubElement(tree[-2], "elementProp", name="HTTPsampler.Arguments", elementType="Arguments")
    collection = SubElement(given, "collectionProp", name="Arguments.arguments")
    body = SubElement(collection, "elementProp", name="", elementType="HTTPArgument")
    _properties(body, {"HTTPArgument.always_encode": False, "Argument.value": "${body}", "Argument.metadata": "="})
    return under


def _asserts(tree: Element, name: str, field: str, how: int, patterns: list[str]) -> None:
    _add(tree, "ResponseAssertion", "AssertionGui", name, {
        "Assertion.test_field": field, "Assertion.test_type": how, "Assertion.assume_success": False,
    })  # fmt: skip
    # JMeter's own spelling.
    collection = SubElement(tree[-2], "collectionProp", name="Asserion.test_strings")
    for number, pattern in enumerate(patterns):
        _properties(collection, {str(number): pattern})


def _results(tree: Element) -> None:
    """What ``-Jresults=`` is written in, whatever this JMeter writes by itself (2.13: XML without reasons)."""
    _add(tree, "ResultCollector", "SimpleDataWriter", "results", {
        "ResultCollector.error_logging": False, "filename": "${__P(results,)}",
    })  # fmt: skip
    saved = SubElement(tree[-2], "objProp")
    SubElement(saved, "name").text = "saveConfig"
    value = SubElement(saved, "value", {"class": "SampleSaveConfiguration"})
    kept = {"time", "latency", "timestamp", "success", "label", "code", "message", "threadName", "fieldNames", "bytes",
            "saveAssertionResultsFailureMessage"}  # fmt: skip
    dropped = {"xml", "dataType", "encoding", "assertions", "subresults", "responseData", "samplerData",
               "responseHeaders", "requestHeaders", "responseDataOnError", "threadCounts"}  # fmt: skip
    for what in sorted(kept | dropped):
        SubElement(value, what).text = "true" if what in kept else "false"
    SubElement(value, "assertionsResultsToSave").text = "0"


def _add(tree: Element, kind: str, gui: str, name: str, properties: dict[str, str | int | bool]) -> Element:
    """Adds a test element to ``tree``; returns what holds the elements under it."""
    element = SubElement(tree, kind, guiclass=gui, testclass=kind, testname=name, enabled="true")
    _properties(element, properties)
    return SubElement(tree, "hashTree")


def _properties(element: Element, properties: dict[str, str | int | bool]) -> None:
    for name, value in properties.items():
        kind = "boolProp" if isinstance(value, bool) else "intProp" if isinstance(value, int) else "stringProp"
        SubElement(element, kind, name=name).text = str(value).lower() if kind == "boolProp" else str(value)


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _record(row: dict[str, str], number: int, zero: int) -> dict[str, Any]:
    """A row of results in the form of our own client's spool."""
    sent, latency = (int(row["timeStamp"]) - zero) / 1e3, int(row["Latency"]) / 1e3
    code, reason = row["responseCode"], row["responseMessage"]
    return {
        "index": int(row.get("index") or number),
        "bucket": row["label"].removeprefix("chat "),
        "family": "",
        "scheduled": sent,
        "sent": sent,
        "first_byte": sent + latency if latency else None,
        "chunks": (),
        "end": sent + int(row["elapsed"]) / 1e3,
        "failure": "" if row["success"] == "true" else _failure(row),
        "message": (row["failureMessage"] if code == "200" else f"{code}: {reason}")[:MESSAGE_CHARACTERS],
        "finish_reason": "", "completion_tokens": 0, "prompt_tokens": 0, "correct": None, "reasoning": "", "text": "",
    }  # fmt: skip


def _failure(row: dict[str, str]) -> str:
    """Our name (labkit.traffic.answer.FAILURES) of what JMeter says in its own words."""
    code, message = row["responseCode"], row["failureMessage"]
    if code == "200":
        kinds = {ERROR: "stream_error", FINISHED: "truncated", DONE: "truncated"}
        return next((kind for pattern, kind in kinds.items() if pattern in message), "timeout")
    if code.isdecimal():
        return kind_of_status(int(code))
    # "Non HTTP response code: " and the name of a Java exception.
    if code.endswith("TimeoutException"):
        return "timeout"
    if code.endswith("ConnectException"):
        return "refused" if "refused" in row["responseMessage"] else "connect"
    if code.endswith("ProtocolException"):
        return "protocol"
    return "connect" if row["Latency"] == "0" else "truncated"
