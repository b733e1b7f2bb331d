"""Every command that the pages show is run, with the substitutions that stand here.

Those of programs that others wrote are run by tests/peers/test_pages.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

import nbformat
import pytest
from typer.testing import CliRunner

from labkit.bench import serving as serving_bench
from labkit.cli import app
from labkit.errors import UserError
from labkit.serving.schedule import Schedule
from labkit.training.modeldir import write_model
from labkit.training.network import Network, Shape
from labkit.training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/network.md")
SERVE_SMALL = "labkit serve build/ledger-r1-4bit --port 8000"
# Benches of something else than the engine -> the one case that is run here.
BENCHES = {"labkit bench linear": "M=64", "labkit bench training": "fused", "labkit bench serving": "grpc"}

# Run by .ci/run itself, or what those targets begin with.
IN_CI = {"make install", "make lab", "make lint", "make test", "make test-peers"}


def blocks(page: str, language: str = "bash") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def lines(page: str) -> list[str]:
    whole = [re.sub(r"\s*\\\n\s*", " ", block) for block in blocks(page)]
    return [line.removeprefix(".venv/bin/") for block in whole for line in block.splitlines() if line.strip()]


def commands() -> set[str]:
    return {line for page in PAGES for line in lines(page)}


def served() -> dict[str, list[str]]:
    """The servers of the pages, and what each is sent: all that comes before the next one."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        sent: list[str] = []
        for line in lines(page):
            if line.startswith("labkit serve"):
                sent = found.setdefault(line, [])
            elif line.startswith(("curl ", "labkit load", "jmeter ")):
                sent.append(line)
    return found


def shown(beginning: str) -> list[str]:
    """The commands of the pages that begin so; none is a mistake in this file."""
    found = sorted(command for command in commands() if command.startswith(beginning))
    assert found, f"the pages no longer show {beginning}"
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def shell(command: str, cwd: Path = ROOT, timeout: float = 120) -> str:
    done = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def labkit(command: str) -> str:
    """What a command prints, run in this process: loading torch for each takes longer than most of them."""
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, f"{command}\n{done.output[-2000:]}\n{done.exception!r}"
    return done.output


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(command: str, url: str, within_s: float = 120, **more: str) -> Iterator[None]:
    """Starts what runs until it is stopped, waits until it answers at ``url``, and stops it by Ctrl-C."""
    said = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=ROOT,
        env=environment() | more,
        stdout=said,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + within_s
        while not _answers(url):
            assert process.poll() is None, f"{command} ended: {_read(said)}"
            assert time.monotonic() < deadline, f"{command} did not answer at {url}: {_read(said)}"
            time.sleep(0.3)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.close()


@pytest.fixture(scope="module")
def warm() -> Iterator[subprocess.Popen[str]]:
    """See tests/warm_labkit.py: a dozen servers need not each load torch."""
    command = [sys.executable, str(ROOT / "tests" / "warm_labkit.py")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    yield process
    process.stdin.close()
    process.wait(30)


@contextmanager
def serving(warm: subprocess.Popen[str], command: str, log: Path, within_s: float = 120) -> Iterator[str]:
    """What the server has said when it is ready; it is stopped by Ctrl-C."""
    assert warm.stdin and warm.stdout
    log.touch()
    warm.stdin.write(json.dumps({"arguments": shlex.split(command)[1:], "log": str(log)}) + "\n")
    warm.stdin.flush()
    number = int(warm.stdout.readline())
    try:
        deadline = time.monotonic() + within_s
        while "labkit: ready on" not in log.read_text():
            assert _runs(number), f"{command} ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"{command} was not ready: {log.read_text()[-2000:]}"
            time.sleep(0.1)
        yield log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGINT)
        deadline = time.monotonic() + 10
        while _runs(number) and time.monotonic() < deadline:
            time.sleep(0.02)
        if _runs(number):
            os.killpg(number, signal.SIGKILL)


def _runs(number: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(number, 0)
        return True
    return False


def _read(said: TextIO) -> str:
    said.seek(0)
    return said.read()[-2000:]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_every_command_is_run_by_a_test_of_this_file():
    tested = ("source ", "labkit ", "curl ", "make jupyter", "python -m pytest ", "pre-commit install")
    tested += ("jmeter ", "locust ", "guidellm ")  # by tests/peers/test_pages.py
    others = {command for command in commands() - IN_CI if not command.startswith(tested)}
    assert others == set()
    assert set(re.findall(r"make ([a-z-]+)", " ".join(IN_CI))) - {"install"} == set(
        re.search(r"for target in (.*); do", (ROOT / ".ci/run").read_text())[1].split()
    )
    known = ("serve", "load", "link", "ladder", "bench", "run", "report", "train", "evaluate", "quantize", "distill")
    assert {command.split()[1] for command in shown("labkit ")} == set(known)
    sent = {line for each in served().values() for line in each}
    assert sent == {*shown("curl "), *shown("labkit load"), *shown("jmeter ")}


def test_the_pages_name_only_what_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} points to {target}"


def test_the_environment_can_be_entered():
    if not (ROOT / ".venv").exists():
        pytest.skip("set up without .venv (conda)")
    for command in shown("source "):
        assert shell(f"{command} && command -v labkit").strip() == str(ROOT / ".venv" / "bin" / "labkit")


@pytest.mark.parametrize("command", [each for each in served() if each != SERVE_SMALL])
def test_servers_are_started_and_sent_what_the_pages_send(command, port, warm, tiny_model, tmp_path):
    """A tiny model stands in for your own and for one of a hub, the CPU for GPUs, and known timing for the shipped
    model where the page is about the wire."""
    small = command.replace("path/to/model", str(tiny_model)).replace("8000", str(port))
    small = re.sub(r"serve [a-zA-Z-]+/DeepSeek-R1-Distill-Qwen-1.5B", f"serve {tiny_model}", small)
    small = small.replace("tokens=100", "tokens=10")
    small = re.sub(r"(tensor_parallel=2|--at-full-speed)", r"\1 --set device=cpu", small)
    if "transport=" in command:
        small += " --schedule ttft_ms=20,itl_ms=2,tokens=20"
    with serving(warm, small, tmp_path / "said") as said:
        given = {"8000": str(port), "path/to/certificate.pem": "".join(re.findall("certificate (.*)", said))}
        for sent in served()[command] or ["curl -s http://127.0.0.1:8000/v1/models"]:
            send(sent, given, tmp_path)


def send(command: str, given: dict[str, str], folder: Path) -> None:
    """Six short questions instead of forty of the usual mix."""
    small = command.replace("--users 8 --requests 40", "--users 2 --requests 6")
    for name, value in given.items():
        small = small.replace(name, value)
    if command.startswith("curl "):
        assert ('"data"' if "models" in command else '"choices"') in shell(small)
    elif "--export-jmeter" in command:
        told = labkit(small.replace("plan.jmx", f"{folder}/plan.jmx"))
        assert told.replace(f"{folder}/", "").splitlines()[-1] in shown("jmeter ")
    elif command.startswith("labkit load"):
        assert "kept as" in labkit(f"{small} --mix 100/0/0 --max-tokens 40 --no-calibrate --runs {folder}")


@pytest.mark.parametrize("command", shown("labkit link"))
def test_wires_are_laid(command, tmp_path, capfd):
    """Whether one is as asked for is not judged here, where others use the machine as well."""
    small = command.replace("wire.pcap", f"{tmp_path}/wire.pcap")
    small = small if " -- " in small else f"{small} --seconds 0.5"
    done = CliRunner().invoke(app, shlex.split(small)[1:])
    said = done.output + capfd.readouterr().out
    if "delay only" in said:
        pytest.skip(said)
    assert done.exit_code in (0, 1), said
    if " -- " in small:
        assert "200 OK" in said and (tmp_path / "wire.pcap").stat().st_size > 1000
    else:
        assert "made by" in said and "40 ms" in said


@pytest.mark.parametrize("program", [block for page in PAGES for block in blocks(page, "python")])
def test_python_runs(program, capfd):
    try:
        exec(compile(program, "page", "exec"), {})
    except UserError as error:
        if "delay only" not in str(error):
            raise
        pytest.skip(str(error))
    assert capfd.readouterr().out.count("200 OK") == 2


def test_the_ladder_is_walked(tmp_path):
    """Two of its rungs and two questions, instead of all of them."""
    for command in shown("labkit ladder"):
        small = command.replace("--users 8 --requests 24", "--users 2 --requests 2 --repeats 1")
        said = labkit(f'{small} --rung "own engine" --device cpu --runs {tmp_path}')
        assert "all 2" in said and "times better" in said


@pytest.mark.parametrize("command", [each for each in shown("labkit bench") if each not in BENCHES])
def test_the_engine_is_benched(command, tmp_path, tiny_model):
    """A request or two instead of all, and the shipped model or a tiny one where a shape would need a GPU."""
    small = re.sub(r"throughput decode --random-weights \S+", f"decode --model {tiny_model}", command)
    small = re.sub(r" --(requests|repeat) \d+", "", small)
    said = labkit(f"{small} --requests 1 --repeat 1 --peers none --device cpu --runs {tmp_path}")
    assert "output tokens/s" in said and "kept as" in said


@pytest.mark.parametrize("command", BENCHES)
def test_other_things_are_benched(command, tmp_path, monkeypatch):
    """One case of each, once; of a server five streams of five tokens."""
    short = partial(serving_bench.lateness, streams=5, schedule=Schedule(ttft_ms=50, itl_ms=10, tokens=5))
    monkeypatch.setattr(serving_bench, "lateness", short)
    monkeypatch.setattr(serving_bench, "RAMP_S", 0.1)
    assert command in shown("labkit bench")
    said = labkit(f"{command} --only {BENCHES[command]} --repeat 1 --peers none --device cpu --runs {tmp_path}")
    assert BENCHES[command] in said and "kept as" in said


def test_notebooks_are_run_and_reported(tmp_path):
    """One notebook of one cell stands in for the story, and profile quick for a GPU's."""
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        cells=[
            nbformat.v4.new_markdown_cell("# Is two and two four?"),
            nbformat.v4.new_code_cell('profile = "quick"\ninteractive = False', metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("2 + 2"),
        ],
    )
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "00_baseline.ipynb")
    for command in shown("labkit run"):
        labkit(f"{command.replace('h200', 'quick')} --folder {tmp_path}/notebooks --out {tmp_path}/runs")
    for command in shown("labkit report"):
        said = labkit(f"{command} --runs {tmp_path}/runs --site {tmp_path}/site")
        assert str(tmp_path / "site" / "index.html") in said
    assert (tmp_path / "site" / "index.html").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Stands for build/ in the commands below, which fill it in the order of the pages."""
    return tmp_path_factory.mktemp("made")


def evaluated(of: str, made: Path, teacher: str, more: str) -> list[str]:
    """What the commands that evaluate ``of`` print; ``teacher`` stands for the shipped model and for one of yours."""
    found = [each for each in shown("labkit evaluate") if each.split()[2] == of]
    assert found
    said = []
    for command in found:
        small = re.sub(r" --(problems|buckets|text) \S+", "", command).replace("build/", f"{made}/")
        small = small.replace("data/models/ledger-r1", teacher).replace("path/to/model", teacher)
        said.append(labkit(f"{small} --device cpu {more}"))
    return said


ONE = "--problems 1 --buckets short"


def test_the_model_is_trained_and_evaluated(made, tmp_path):
    """Two steps of a small batch, and one problem, instead of all of them."""
    for command in shown("labkit train"):
        small = command.replace("build/", f"{made}/")
        labkit(f"{small} --steps 2 --batch-tokens 1024 --device cpu --processes 0 --runs {tmp_path}")
    for said in evaluated("build/ledger-r1", made, "", ONE):
        assert "/1 " in said


def test_the_model_is_quantised_served_and_compared(made, tmp_path, port, warm):
    """One that has learnt nothing stands in for the shipped one, a single text for the 24."""
    beginner = tmp_path / "ledger-r1"
    write_model(
        Network(Shape(hidden=128, layers=1, heads=2, kv_heads=1, intermediate=128)), train_tokenizer(), beginner
    )
    for command in (each for each in shown("labkit quantize") if "path/to" not in each):
        small = command.replace("data/models/ledger-r1", str(beginner)).replace("build/", f"{made}/")
        said = labkit(f"{small.replace('--sequences 24', '--sequences 1')} --device cpu")
        assert "GPTQ / RTN" in said and "written to" in said
    serve = next(each for each in shown("labkit serve") if each == SERVE_SMALL)
    with serving(warm, serve.replace("8000", str(port)).replace("build/", f"{made}/"), tmp_path / "said"):
        assert '"ledger-r1-4bit"' in shell(f"curl -s http://127.0.0.1:{port}/v1/models")
    for said in evaluated("build/ledger-r1-4bit", made, str(beginner), ONE):
        assert "McNemar" in said and "same first choice" in said


def test_a_model_of_your_own_is_quantised_and_compared(made, tmp_path, tiny_model):
    """This README stands in for your texts."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text()[:1500])
    for command in (each for each in shown("labkit quantize") if "path/to" in each):
        small = command.replace("path/to/model", str(tiny_model)).replace("build/", f"{made}/")
        small = small.replace("calibration.txt", str(text))
        assert "written to" in labkit(f"{small} --group-size 32 --sequences 2 --length 64 --device cpu")
    for said in evaluated("build/model-4bit", made, str(tiny_model), f"--text {text}"):
        assert "perplexity" in said and "same first choice" in said


def test_a_student_is_taught_and_compared(made, tmp_path):
    """Two steps of one short text each."""
    for command in shown("labkit distill"):
        small = re.sub(r"--steps \d+", "--steps 2", command).replace("build/", f"{made}/")
        options = "--micro-batch 1 --accumulate 1 --device cpu --processes 0"
        labkit(f"{small} {options} --runs {tmp_path}")
    for said in evaluated("build/ledger-r1-mini", made, str(ROOT / "data/models/ledger-r1"), ONE):
        assert "McNemar" in said


def test_jupyter_opens_on_the_notebooks(port):
    for command in shown("make jupyter"):
        # BROWSER is what Jupyter would open.
        with running(command, f"http://127.0.0.1:{port}/api", BROWSER="true %s", JUPYTER_PORT=str(port)):
            pass


def test_one_test_file_at_a_time():
    for command in shown("python -m pytest"):
        assert "tests collected" in shell(f"{command} --collect-only -q")


def test_hooks_are_installed_and_refuse_an_executed_notebook(tmp_path):
    """In a repository of its own, so that this one keeps its hooks."""
    clone = tmp_path / "clone"
    clone.mkdir()
    shell("git init -q . && git config user.email a@b.c && git config user.name a", cwd=clone)
    shutil.copy(ROOT / ".pre-commit-config.yaml", clone)
    (clone / ".venv").symlink_to(BIN.parent)
    for command in shown("pre-commit install"):
        shell(command, cwd=clone)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1", execution_count=1)])
    nbformat.write(notebook, clone / "executed.ipynb")
    shell("git add executed.ipynb .pre-commit-config.yaml", cwd=clone)
    refused = subprocess.run(
        ["git", "commit", "-q", "-m", "x"], cwd=clone, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert refused.returncode != 0 and "notebooks carry no outputs" in refused.stderr + refused.stdout
    assert nbformat.read(clone / "executed.ipynb", 4).cells[0].execution_count is None
    shell("git add -u && git commit -q -m x", cwd=clone)
