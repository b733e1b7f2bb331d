"""Options of a training: what is measured, when a policy is wrong, and how C11 and C12 are judged."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from labkit.experiments import training_options as training
from labkit.experiments.contests import run_contests
from labkit.experiments.training_options import CHOSEN, COLUMNS, FLOAT32, KEEPS, RECOMPUTES, WHOLE, rate_names
from labkit.report import framework
from labkit.training.modeldir import write_model
from labkit.training.network import Network, weighted_loss
from labkit.training.tokenizer import train_tokenizer
from labkit.training.variants import CHECKPOINTING_NAMES, OPTIMIZER_NAMES, documents

CPU = torch.device("cpu")
SIZE = training.size_of({"hidden": 16, "layers": 2, "heads": 1, "kv_heads": 1, "intermediate": 32}, 2, 1)
FUSED, FOREACH, LOOP = OPTIMIZER_NAMES.values()


def made_up(times: dict[tuple[str, int], tuple[float | list[float], int]]) -> pd.DataFrame:
    """9 rounds: (policy, micro) -> (seconds of all or of each, bytes)."""
    rows = []
    for (policy, micro), (seconds, most) in times.items():
        each = seconds if isinstance(seconds, list) else [seconds] * 9
        way = f"{policy}, {micro} at a time"
        rows += [(way, policy, micro, 1536, turn, one, most, "") for turn, one in enumerate(each)]
    return pd.DataFrame(rows, columns=COLUMNS)


def answers(recomputing: float = 1.0) -> pd.DataFrame:
    rows = [(way, 64, turn, s, 8, "") for way, s in ((KEEPS, 1.0), (RECOMPUTES, recomputing)) for turn in range(15)]
    return pd.DataFrame(rows, columns=["way", "x", "round", "seconds", "bytes", "note"])


MEASURED = {(KEEPS, 1): (1.0, 100), (KEEPS, 2): (0.9, 200), (RECOMPUTES, 1): (1.4, 60), (RECOMPUTES, 2): (1.3, 110)}


def test_a_policy_is_wrong_where_another_is_faster_in_no_more_memory() -> None:
    found = {one.way: one for one in training.choices(made_up(MEASURED))}
    assert found[f"{RECOMPUTES}, 2 at a time"].beaten_by == f"{KEEPS}, 1 at a time"
    assert not found[f"{RECOMPUTES}, 1 at a time"].beaten_by, "nothing else is so small"
    assert not found[f"{KEEPS}, 1 at a time"].beaten_by and not found[f"{KEEPS}, 2 at a time"].beaten_by


def test_recomputing_pays_where_nothing_else_fits() -> None:
    found = training.choices(made_up(MEASURED))
    assert [(one.way, rival) for one, rival in training.paying(found)] == [(f"{RECOMPUTES}, 1 at a time", None)]
    words = framework.when_it_pays(found)
    assert "not even 1 document at a time" in words and f"*{RECOMPUTES}, 1 at a time* takes 1.40\u00a0s" in words
    assert "with all activations kept do as well" in words
    small = training.choices(made_up(MEASURED | {(KEEPS, 1): (1.0, 50)}))
    assert not training.paying(small) and "pays nowhere" in framework.when_it_pays(small)


def test_recomputing_pays_where_smaller_parts_do_not_fill_the_device() -> None:
    """The whole batch with activations recomputed, against half of it with all kept, which takes less and is slower."""
    found = training.choices(made_up(MEASURED | {(KEEPS, 1): (1.9, 100), (RECOMPUTES, 2): (1.3, 110)}))
    pairs = [(one.way, rival and rival.way) for one, rival in training.paying(found)]
    assert pairs == [(f"{RECOMPUTES}, 1 at a time", None), (f"{RECOMPUTES}, 2 at a time", f"{KEEPS}, 1 at a time")]
    words = framework.when_it_pays(found)
    assert f"*{RECOMPUTES}, 2 at a time* takes 1.30\u00a0s" in words and f"*{KEEPS}, 1 at a time* 1.90\u00a0s" in words
    unsure = training.choices(made_up(MEASURED | {(KEEPS, 1): ([1.2, 1.9, 1.9] * 3, 100)}))
    assert len(training.paying(unsure)) == 1, "it may be as fast"


def test_the_largest_part_follows_from_what_a_document_takes() -> None:
    found = training.choices(made_up(MEASURED))
    assert training.largest_micro(found, KEEPS, 1050) == 10
    assert training.largest_micro(found, RECOMPUTES, 1060) == 21
    assert math.isnan(training.largest_micro(found[:1], KEEPS, 1000))


@pytest.mark.parametrize(
    "times, answering, outcome",
    [
        (MEASURED, 1.0, "partly"),
        (MEASURED, 2.0, "confirmed"),
        ({key: (1.0, most) for key, (_, most) in MEASURED.items()}, 1.0, "refuted"),
        # between half as fast and twice: nobody can tell
        (MEASURED | {(RECOMPUTES, 2): ([0.5, 2.0] * 4 + [1.0], 110)}, 1.0, "no verdict"),
    ],
)
def test_recomputation_is_judged_in_training_and_in_serving(
    times: dict[tuple[str, int], tuple[float | list[float], int]], answering: float, outcome: str
) -> None:
    verdict = training.judge_recomputation(made_up(times), answers(answering))
    assert verdict.outcome == outcome, verdict.reason
    assert "which policy it had" in verdict.reason


def configured(times: dict[str, tuple[float, int] | str]) -> pd.DataFrame:
    rows = []
    for way, found in times.items():
        if isinstance(found, str):
            rows.append((way, KEEPS, 1, 1536, -1, math.nan, 0, found))
        else:
            rows += [(way, KEEPS, 1, 1536, turn, found[0], found[1], "") for turn in range(9)]
    return pd.DataFrame(rows, columns=COLUMNS)


def learnt(article: float, ours: float) -> pd.DataFrame:
    rows = [
        (way, step, step * 768, loss)
        for way, loss in zip(rate_names(), (article, ours), strict=True)
        for step in range(9)
    ]
    return pd.DataFrame(rows, columns=["way", "step", "tokens", "loss"])


BETTER: dict[str, tuple[float, int] | str] = {CHOSEN: (1.0, 50), FOREACH: (1.2, 50), LOOP: (1.5, 50), WHOLE: (1.0, 90)}


def test_each_part_of_the_configuration_is_a_fact() -> None:
    everything = configured(BETTER | {FLOAT32: (2.0, 80)})
    assert training.judge_configuration(everything, learnt(2.0, 2.0)).outcome == "confirmed"
    mixed = training.judge_configuration(everything, learnt(6.0, 4.0), learnt(1.0, 1.5))
    assert mixed.outcome == "partly"
    assert "from nothing, a rate of 3e-05 learns as much as 0.0015: no" in mixed.reason
    assert "for a trained model, 3e-05 leaves no higher loss than 0.0015: yes" in mixed.reason
    numbers = {item.label: item.value for item in mixed.evidence}
    assert numbers["bfloat16: times faster"] == 2 and numbers["small batches summed: times less memory"] == 1.8
    assert numbers["loss left by the article's rate over ours, from nothing"] == 2
    slower = configured({CHOSEN: (1.0, 90), FOREACH: (0.9, 90), LOOP: (0.9, 90), WHOLE: (0.5, 80), FLOAT32: (0.5, 90)})
    assert training.judge_configuration(slower, learnt(6.0, 4.0)).outcome == "refuted"


def test_bfloat16_stays_open_where_it_is_not_fast() -> None:
    verdict = training.judge_configuration(configured(BETTER | {training.BFLOAT16: "not here"}), learnt(2.0, 2.0))
    assert verdict.outcome == "partly" and "bfloat16 trains faster than float32: not observable here" in verdict.reason


def test_options_are_measured_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labkit.training.variants.has_bf16", lambda device: False)
    policies = training.policies(SIZE, CPU, ["none", "all"], [1, 2])
    configuration = training.configuration(SIZE, CPU)
    assert list(configuration) == [CHOSEN, FOREACH, LOOP, WHOLE, training.BFLOAT16]
    table = training.measure_options(policies | configuration, SIZE, CPU, rounds=1)
    assert set(table["x"]) == {2 * 768} and (table[table["note"] == ""]["seconds"] > 0).all()
    assert (table[table["note"] == ""].groupby("way").size() == 1).all()
    most = table.drop_duplicates("way").set_index("way")["bytes"]
    assert most[f"{RECOMPUTES}, 1 at a time"] < most[f"{KEEPS}, 1 at a time"] < most[f"{KEEPS}, 2 at a time"]
    assert most[CHOSEN] == most[f"{KEEPS}, 1 at a time"] and most[WHOLE] == most[f"{KEEPS}, 2 at a time"]
    found = training.choices(table[table["way"].isin(list(policies))])
    assert {one.policy for one in found} == {CHECKPOINTING_NAMES["none"], CHECKPOINTING_NAMES["all"]}
    shown = framework.policies_table(found, 10 * 2**30, "here").text()
    assert "1 at a time" in shown.replace("\n", " ") and len(framework.frontier_frame(found, 1536)) == 4
    assert "no fast bfloat16" in " ".join(framework.configuration_table(table, "here").rows[-1])


def test_a_higher_rate_learns_more_from_nothing_and_answers_do_not_change() -> None:
    losses = training.learn(SIZE, CPU, steps=14)
    assert training.loss_difference(losses).value > 0.05
    smooth = framework.losses_frame(losses)
    assert set(smooth["name"]) == set(rate_names()) and smooth["tokens"].max() == 15 * 1.536
    first = losses.groupby("way")["loss"].first()
    assert first.iloc[0] == first.iloc[1], "the same weights and the same document"
    serving = run_contests(training.serving_contests(SIZE, CPU, 64), CPU, rounds=2)
    assert set(serving["note"]) == {""}
    assert len(framework.ways_table(serving, "here").rows) == 2


def test_a_trained_model_begins_where_it_ended(tmp_path: Path) -> None:
    network = Network(SIZE.shape, seed=5)
    with torch.no_grad():
        network.model.embed_tokens.weight.mul_(20)  # nothing that random weights would give
    write_model(network, train_tokenizer(), tmp_path)
    first = training.learn(SIZE, CPU, steps=1, model=str(tmp_path)).groupby("way")["loss"].first()
    batch = documents(SIZE, 1, seed=2)[0]
    ids, weights = torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.weights)
    parts = [weighted_loss(network, ids[row : row + 1], weights[row : row + 1]) for row in range(2)]
    right = float(torch.stack(parts).mean().detach())
    assert right > 7.2 and list(first) == pytest.approx([right, right], rel=2e-2)
