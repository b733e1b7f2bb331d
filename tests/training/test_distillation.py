from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from labkit.errors import UserError
from labkit.training.card import card_text
from labkit.training.checkpoint import newest_checkpoint
from labkit.training.curve import read_curve
from labkit.training.distillation import (
    HINTED,
    Distillation,
    copy_weights,
    distill,
    divergence,
    hinted_layers,
    read_teacher,
    spread,
    student,
    written_by,
)
from labkit.training.documents import make_batch
from labkit.training.evaluate import evaluate
from labkit.training.evidence import read_evidence, take_evidence
from labkit.training.modeldir import read_model, write_model
from labkit.training.network import Network, Shape, operations_a_token
from labkit.training.options import DistillOptions, TrainOptions
from labkit.training.tokenizer import piece_table, train_tokenizer

BIG = Shape(hidden=32, layers=3, heads=2, kv_heads=1, intermediate=48)
TINY = TrainOptions(
    steps=4,
    batch_tokens=1536,
    warm_up=2,
    lr=3e-3,
    autocast=False,
    checkpoint_every_steps=1,
    curve_every=2,
    shares=(1.0, 0.0, 0.0),
    first_shares=(1.0, 0.0, 0.0),
    shape=replace(BIG, layers=2, intermediate=24),
    distill=DistillOptions(on_policy=0.4, hints=0.5),
)
CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_distillation import TINY, distill
root = Path({root!r})
distill(TINY, root / "teacher", root / "student", root / "checkpoints", root / "runs", say=print)
"""


def silent(line: str) -> None:
    pass


def loud(network: Network, factor: float = 6.0) -> Network:
    """The random network with larger matrices, so that what it says differs from token to token."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(factor if parameter.dim() == 2 else 1.0)
    return network


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher in ``teacher``, which has learnt nothing but has its opinions."""
    torch.set_num_threads(1)
    directory: Path = tmp_path_factory.mktemp("distillation")
    write_model(loud(Network(BIG, seed=4)), train_tokenizer(), directory / "teacher")
    return directory


def numpy_log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_of_the_definition(temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (3 * torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    p, q = (numpy_log_softmax(each.double().numpy() / temperature) for each in (theirs, ours))
    expected = (np.exp(p) * (p - q)).sum(-1)
    torch.testing.assert_close(divergence(ours, theirs, temperature), torch.from_numpy(expected).float())
    assert divergence(ours, ours).abs().max() < 1e-6 and divergence(ours, theirs).min() > 0


def test_the_loss_adds_divergence_and_cross_entropy_of_the_tokens_that_count(place: Path) -> None:
    teacher = read_teacher(place / "teacher", "cpu", torch.float32)
    network = loud(Network(replace(BIG, layers=1), seed=8))
    options = DistillOptions(temperature=2.0, soft=0.7, hard=0.2)
    ids = torch.randint(0, 768, (2, 9), generator=torch.Generator().manual_seed(3))
    weights = torch.tensor([[0, 0, 1, 1, 3, 0, 0, 1, 0], [5, 0, 0, 0, 0, 0, 1, 3, 3]], dtype=torch.uint8)
    objective = Distillation(network, teacher, options, seed=1)
    found = objective.loss(*objective.inputs(ids, weights, "short/0", 0.0))
    with torch.no_grad():
        ours, theirs = (each(ids).double().numpy() for each in (network, teacher.network))
    p, q, plain = numpy_log_softmax(theirs / 2), numpy_log_softmax(ours / 2), numpy_log_softmax(ours)
    total = count = 0.0
    for row in range(2):
        # no token precedes the first, so its weight counts for nothing
        for at in range(1, 9):
            soft = (np.exp(p[row, at - 1]) * (p[row, at - 1] - q[row, at - 1])).sum()
            hard = -plain[row, at - 1, int(ids[row, at])]
            total += int(weights[row, at]) * (0.7 * 4 * soft + 0.2 * hard)
            count += int(weights[row, at])
    assert float(found.detach()) == pytest.approx(total / count, rel=1e-4)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_hints_count_the_distance_to_the_teachers_states_and_fade(place: Path) -> None:
    teacher = read_teacher(place / "teacher", "cpu", torch.float32)
    network = loud(Network(replace(BIG, layers=2, hidden=32, heads=2, kv_heads=1), seed=8))
    ids = torch.randint(0, 768, (2, 9), generator=torch.Generator().manual_seed(3))
    weights = torch.ones((2, 9), dtype=torch.uint8)
    plain = Distillation(network, teacher, DistillOptions(), seed=1)
    bare = plain.loss(*plain.inputs(ids, weights, "short/0", 0.0))
    hinted = Distillation(network, teacher, DistillOptions(hints=0.5), seed=1)
    found = {
        done: hinted.loss(*hinted.inputs(ids, weights, "short/0", done)) for done in (0.0, HINTED / 2, HINTED, 1.0)
    }
    [(own, layer)] = hinted_layers(2, BIG.layers)
    with torch.no_grad():
        wise = teacher.network.states(ids)[layer].double().numpy()
        bridge = network.get_submodule("hints.0")
        guess = bridge(network.states(ids)[own]).double().numpy()
    wise /= np.sqrt((wise**2).mean(-1, keepdims=True))
    flat = wise.reshape(-1, wise.shape[-1])
    far = ((guess - (wise - flat.mean(0)) / flat.std(0, ddof=1)) ** 2).mean()
    for done, share in ((0.0, 1.0), (HINTED / 2, 0.5), (HINTED, 0.0), (1.0, 0.0)):
        assert float((found[done] - bare).detach()) == pytest.approx(0.5 * share * far, rel=1e-3, abs=1e-5)
    found[0.0].backward()
    assert all(parameter.grad is not None for parameter in bridge.parameters())


def test_layers_are_hinted_by_those_as_far_up() -> None:
    assert hinted_layers(4, 8) == ((0, 1), (1, 3), (2, 5))
    assert hinted_layers(6, 8) == ((0, 0), (1, 2), (2, 3), (3, 4), (4, 6))
    assert hinted_layers(1, 8) == ()


def test_a_student_of_all_layers_begins_as_its_teacher_and_a_narrower_one_with_the_strongest_neurons() -> None:
    teacher = loud(Network(BIG, seed=2))
    ids = torch.randint(0, 768, (1, 20), generator=torch.Generator().manual_seed(3))
    same = Network(BIG, seed=9)
    assert len(copy_weights(same, teacher, (0, 1, 2))) == len(list(same.parameters()))
    with torch.no_grad():
        assert torch.equal(same(ids), teacher(ids))
        # neurons that write nothing are the weakest, and can go without a trace
        for layer in teacher.model.layers:
            layer.mlp.down_proj.weight[:, 5:45:2] = 0
        narrow = Network(replace(BIG, intermediate=28), seed=9)
        copy_weights(narrow, teacher, (0, 1, 2))
        torch.testing.assert_close(narrow(ids), teacher(ids))


def test_what_does_not_fit_is_not_copied() -> None:
    teacher = Network(BIG, seed=2)
    wider = Network(replace(BIG, hidden=64, layers=1), seed=9)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    assert copy_weights(wider, teacher, (0,)) == [] and copy_weights(Network(BIG), teacher, ()) == []
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())
    more_heads = Network(replace(BIG, layers=1, kv_heads=2), seed=9)
    copied = copy_weights(more_heads, teacher, (2,))
    assert "model.layers.0.mlp.up_proj.weight" in copied and "model.layers.0.self_attn.k_proj.weight" not in copied
    assert torch.equal(more_heads.model.layers[0].mlp.up_proj.weight, teacher.model.layers[2].mlp.up_proj.weight)


def test_layers_are_spread_from_first_to_last() -> None:
    assert (spread(2, 8), spread(3, 8), spread(1, 8), spread(8, 8)) == ((0, 7), (0, 4, 7), (0,), tuple(range(8)))
    assert spread(3, 2) == ()


def test_a_student_writes_after_the_first_prompt_what_it_would_be_served_as() -> None:
    network = loud(Network(BIG, seed=6), 8.0)
    tokenizer = train_tokenizer()
    batch = make_batch(piece_table(tokenizer), 1, "short", 0, 2)
    ids, weights = torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.weights)
    written, counted = written_by(network, ids, weights, stop=-1)
    assert written.shape == ids.shape and counted.dtype == weights.dtype
    for row in range(2):
        end = int(weights[row].nonzero()[0])
        assert torch.equal(written[row, :end], ids[row, :end]) and not counted[row, :end].any()
        assert counted[row, end:].tolist() == [1] * 176 + [0] * (ids.shape[1] - end - 176)
        with torch.no_grad():
            chosen = network(written[row : row + 1])[0].argmax(-1)
        assert torch.equal(chosen[end - 1 : end + 175], written[row, end : end + 176])
        assert not written[row, end + 176 :].any()


def test_the_share_of_batches_that_the_student_writes_is_as_asked_and_has_no_right_tokens(place: Path) -> None:
    teacher = read_teacher(place / "teacher", "cpu", torch.float32)
    objective = Distillation(
        Network(replace(BIG, layers=1, context=9)), teacher, DistillOptions(on_policy=0.25, hard=0.5), seed=1
    )
    ids, weights = torch.ones(1, 8, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.uint8)
    hard = [float(objective.inputs(ids, weights, f"short/{number}", 0.0)[2]) for number in range(200)]
    assert set(hard) == {0.0, 0.5} and hard.count(0.0) / 200 == pytest.approx(0.25, abs=0.08)
    again = [float(objective.inputs(ids, weights, f"short/{number}", 0.0)[2]) for number in range(200)]
    assert again == hard, "a training that is resumed draws the same"


def test_a_distillation_killed_outright_resumes_to_the_same_weights(place: Path) -> None:
    torch.set_num_threads(1)
    whole = distill(TINY, place / "teacher", place / "whole", place / "whole-checkpoints", place / "runs", say=silent)
    code = CHILD.format(tests=str(Path(__file__).parent), root=str(place))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    while (found := newest_checkpoint(place / "checkpoints")) is None or found[1].step < 1:
        assert child.poll() is None and time.sleep(0.005) is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    stopped = newest_checkpoint(place / "checkpoints")
    assert stopped is not None and stopped[1].step < 4, "the child finished before it was killed"
    arguments = (place / "teacher", place / "student", place / "checkpoints", place / "runs")
    with pytest.raises(UserError, match=r"other options \(distill\)"):
        hotter = replace(TINY, distill=replace(TINY.distill, temperature=9.0))
        distill(hotter, *arguments, resume=True, say=silent)
    resumed = distill(TINY, *arguments, resume=True, say=silent)
    assert resumed.progress.taken == whole.progress.taken
    expected = load_file(place / "whole" / "model.safetensors")
    found_weights = load_file(place / "student" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in found_weights.items())


def test_a_student_without_right_tokens_comes_to_speak_like_its_teacher(place: Path, tmp_path: Path) -> None:
    options = replace(TINY, steps=24, lr=2e-2, distill=DistillOptions(soft=1.0, hard=0.0, temperature=1.0))
    trained = distill(options, place / "teacher", tmp_path / "s", tmp_path / "c", tmp_path / "runs", say=silent)
    losses = [float(str(row["loss"])) for row in read_curve(trained.run)]
    assert losses[-1] < 0.7 * losses[0]
    network, _ = read_model(tmp_path / "s", dtype=torch.float32)
    teacher, _ = read_model(place / "teacher", dtype=torch.float32)
    batch = make_batch(piece_table(train_tokenizer()), 77, "short", 0, 2)
    ids, counts = torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.weights).roll(-1, 1) > 0
    fresh = Network(network.shape, TINY.seed)
    copy_weights(fresh, teacher, (0, 2))
    with torch.no_grad():
        after, before = (divergence(each(ids), teacher(ids))[counts].mean() for each in (network, fresh))
    assert after < 0.7 * before


def test_the_card_of_a_student_holds_it_against_its_teacher(place: Path, tmp_path: Path) -> None:
    model = tmp_path / "mini"
    few = replace(TINY, steps=1)
    trained = distill(few, place / "teacher", model, tmp_path / "c", tmp_path / "runs", say=silent)
    evaluate(model, 2, ["short"], result=tmp_path / "evaluation.json", say=silent)
    take_evidence(model, trained.run, tmp_path / "evaluation.json")
    evidence = read_evidence(model)
    evidence.manifest["teacher"]["exact_match"] = {"short": 0.8}
    evidence.evaluation["buckets"]["short"]["share"] = 0.6
    text = card_text("mini", evidence)
    assert "Begun as layers 0, 2 of its teacher, taught by [teacher](../teacher/README.md)" in text
    ratio = operations_a_token(BIG, 1000) / operations_a_token(few.shape, 1000)
    assert f"| {ratio:.1f} |" in text and "| exact match, short | 80.0 % | 60.0 % | 75.0 % kept |" in text
    assert "labkit distill data/models/teacher --steps 1" in text and "labkit train" not in text
    assert str(tmp_path) not in text and str(place) not in text


def test_operations_are_those_of_the_products() -> None:
    shape = Shape(vocabulary=10, hidden=8, layers=1, heads=2, kv_heads=1, intermediate=6)
    # queries and output 8 x 8 each, keys and values 8 x 4 each, three of 8 x 6, scores and sums over 5 tokens, head
    assert operations_a_token(shape, 5) == 2 * (2 * 64 + 2 * 32 + 3 * 48 + 2 * 5 * 8 + 80)


@pytest.mark.parametrize(
    ("shape", "taught", "named"),
    [
        ({"heads": 7}, {}, "--hidden"),
        ({"layers": 0}, {}, "--layers"),
        ({"kv_heads": 4}, {}, "--kv-heads"),
        ({}, {"temperature": 0.0}, "--temperature"),
        ({}, {"soft": 0.0, "hard": 0.0}, "--soft and --hard"),
        ({}, {"on_policy": 1.0}, "--on-policy"),
        ({}, {"on_policy": 0.1, "soft": 0.0}, "--on-policy needs --soft"),
        ({"layers": 3}, {"copy_layers": (0, 7)}, "--copy-layers"),
    ],
)
def test_impossible_wishes_are_named(shape: dict[str, object], taught: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        student("ledger-r1-mini", shape, taught, steps=1)


def test_layers_that_the_teacher_does_not_have_and_teachers_that_are_none(place: Path, tmp_path: Path) -> None:
    wrong = replace(TINY, distill=DistillOptions(copy_layers=(0, 3)))
    places = (tmp_path / "s", tmp_path / "c", tmp_path / "runs")
    with pytest.raises(UserError, match="0 to 2"):
        distill(wrong, place / "teacher", *places, say=silent)
    with pytest.raises(UserError, match=r"no config\.json"):
        distill(TINY, tmp_path, *places, say=silent)
    assert not list(tmp_path.iterdir())
