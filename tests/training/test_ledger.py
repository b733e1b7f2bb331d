from __future__ import annotations

import re
import subprocess
import sys

import pytest

from labkit.training.headlines import LABELS, combinations
from labkit.training.ledger import (
    BUCKETS,
    FAMILIES,
    FIRST_TRAINING_SEED,
    MOST_TRADES,
    Problem,
    is_correct,
    make_problem,
)

ROW = re.compile(r"^(T\d{4}),([A-Z]{4})(\d),([a-z]+)(\d),([BS])(\d\d)@(\d{3}),f(\d\d)$")
PROBLEMS = [make_problem(5, index, bucket) for bucket in BUCKETS for index in range(400)]
WORDS = {
    "positive": "beats|raises|wins|lifts|gains|strong|expands|record sales|upgrade|debt early|surges|rallies",
    "negative": "misses|cuts dividend|loses|warns|weak|probe|falling|downgrade|delays|slumps|tumbles",
}


def rows_of(problem: Problem) -> list[tuple[str, ...]]:
    return [match.groups() for line in problem.prompt.splitlines() if (match := ROW.match(line))]


def solve(problem: Problem) -> str:
    """The answer from the text of the prompt alone, by other means than the generator's."""
    question = problem.prompt.splitlines()[-1]
    rows = rows_of(problem)
    if named := re.search(r"T\d{4}", question):
        trade, symbol, _, account, _, side, lots, price, fee = next(row for row in rows if row[0] == named[0])
        if problem.family == "limit":
            limit = int(re.search(r"\d[\d,]*\d", question.replace(trade, ""))[0].replace(",", ""))  # type: ignore[index]
            return "yes" if int(lots) * int(price) > limit else "no"
        if problem.family == "notional":
            return str(int(lots) * int(price))
        fields = {"price": price, "quantity": lots, "fee": fee}
        texts = {"account": account, "symbol": symbol, "side": {"B": "buy", "S": "sell"}[side]}
        field = next(name for name in (*fields, *texts) if name in question)
        return str(int(fields[field])) if field in fields else texts[field]
    if problem.family == "headline":
        return next((label for label, words in WORDS.items() if re.search(words, question)), "neutral")
    names = {row[1] for row in rows} | {row[3] for row in rows}
    name = next(word for word in re.findall(r"[A-Za-z]+", question) if word in names)
    mine = [row for row in rows if name in (row[1], row[3])]
    if problem.family == "net":
        return str(sum(int(row[6]) * (1 if row[5] == "B" else -1) for row in mine))
    if problem.family == "fees":
        return str(sum(int(row[8]) for row in mine))
    if problem.family == "largest":
        return sorted(mine, key=lambda row: int(row[6]))[-1][0]
    return str(sum(row[5] == ("B" if "buys" in question else "S") for row in mine))


def test_every_answer_is_what_an_independent_solver_finds() -> None:
    for problem in PROBLEMS:
        assert problem.answer == solve(problem), problem.prompt[-200:]
    assert {problem.family for problem in PROBLEMS} == set(FAMILIES)


def test_blotters_keep_their_own_rules() -> None:
    for problem in PROBLEMS:
        rows = rows_of(problem)
        assert [row[0] for row in rows] == sorted({row[0] for row in rows})
        counts = dict(
            re.findall(r"(\w+)=(\d)", next(line for line in problem.prompt.splitlines() if line.startswith("counts")))
        )
        for key, number in ((1, 2), (3, 4)):
            for name in {row[key] for row in rows}:
                numbers = [int(row[number]) for row in rows if row[key] == name]
                assert numbers == list(range(1, int(counts.pop(name)) + 1)) and len(numbers) <= MOST_TRADES
                if key == 1:
                    assert len({row[6] for row in rows if row[1] == name}) == len(numbers), (
                        "a tie for the largest trade"
                    )
        assert not counts


def units_first(digits: str) -> int:
    return int(digits[::-1])


@pytest.mark.parametrize("family", ["notional", "limit"])
def test_products_are_worked_out_right_digit_by_digit(family: str) -> None:
    for index in range(300):
        problem = make_problem(6, index, "short", family)
        lines = problem.thought.splitlines()
        trade, lots, price = re.match(r"^(T\d{4})[BS](\d\d)@(\d{3})$", lines[0]).groups()  # type: ignore[union-attr]
        assert any(row[0] == trade and (row[6], row[7]) == (lots, price) for row in rows_of(problem))
        parts = []
        for line, factor in zip(lines[1:3], reversed(lots), strict=True):
            head, steps = line.split(":")
            assert head == factor
            carry = 0
            for digit, step in zip(reversed(price), steps.split(), strict=True):
                assert int(step) == int(digit) * int(factor) + carry
                carry = int(step) // 10
            part = units_first("".join(step[1] for step in steps.split()) + steps[-2])
            assert part == int(price) * int(factor)
            parts.append(str(part * 10 ** len(parts)).zfill(5)[::-1])
        carry = 0
        columns = lines[3].removeprefix("+:").split()
        for column, one, two in zip(columns, *parts, strict=True):
            assert int(column) == int(one) + int(two) + carry
            carry = int(column) // 10
        total = units_first("".join(column[1] for column in columns))
        assert total == int(price) * int(lots)
        if family == "notional":
            assert problem.answer == str(total)
        else:
            notional, limit, sign = re.match(r"^(\d{5}) (\d{5})([<>])$", lines[4]).groups()  # type: ignore[union-attr]
            assert int(notional) == total and (sign == ">") == (total > int(limit)) == (problem.answer == "yes")
            assert f"{int(limit):,}" in problem.prompt.splitlines()[-1]


@pytest.mark.parametrize("family", ["net", "fees", "largest", "count"])
def test_enumerations_visit_every_row_and_keep_right_running_values(family: str) -> None:
    for index in range(300):
        problem = make_problem(6, index, "medium", family)
        lines = problem.thought.splitlines()
        name, count = lines[0].split("=")
        mine = [row for row in rows_of(problem) if name in (row[1], row[3])]
        assert len(mine) == int(count)
        bought = sold = fees = found = 0
        best: tuple[str, ...] = mine[0]
        for number, (row, line) in enumerate(zip(mine, lines[1:], strict=False), start=1):
            bought, sold = bought + int(row[6]) * (row[5] == "B"), sold + int(row[6]) * (row[5] == "S")
            fees += int(row[8])
            found += row[5] == ("B" if "buys" in problem.prompt.splitlines()[-1] else "S")
            best = row if int(row[6]) > int(best[6]) else best
            sums = f"{str(bought).zfill(3)[::-1]},{str(sold).zfill(3)[::-1]}"
            expected = {
                "net": f"{name}{number}{row[5]}{row[6]}:{sums}",
                "fees": f"{name}{number}f{row[8]}:{str(fees).zfill(3)[::-1]}",
                "largest": f"{name}{number},{row[6]}:{best[2]},{best[6]}",
                "count": f"{name}{number}{row[5]}:{found}",
            }
            assert line == expected[family]
        last = lines[len(mine) + 1 :]
        if family == "net":
            difference = bought - sold
            sign = ">" if difference > 0 else "<" if difference < 0 else "="
            assert last == [sign + str(abs(difference)).zfill(3)[::-1]]
        elif family == "largest":
            assert last == [f"{name}{best[2]}{best[0]}"]
        else:
            assert last == []


def test_lookups_and_headlines_quote_the_prompt() -> None:
    for index in range(100):
        assert (
            make_problem(6, index, "medium", "lookup").thought
            in make_problem(6, index, "medium", "lookup").prompt.splitlines()
        )
        headline = make_problem(6, index, "medium", "headline")
        phrase, label = headline.thought.split(":")
        assert phrase in headline.prompt.splitlines()[-1] and label == headline.answer in LABELS


def test_yes_and_no_are_balanced_and_families_uniform() -> None:
    answers = [make_problem(9, index, "short", "limit").answer for index in range(600)]
    assert 0.42 < answers.count("yes") / 600 < 0.58
    families = [make_problem(9, index, "short").family for index in range(1600)]
    assert all(140 < families.count(family) < 260 for family in FAMILIES)


def test_held_out_headlines_are_never_trained_on() -> None:
    def settings(seed: int) -> set[str]:
        texts = (make_problem(seed, index, "short", "headline").prompt.splitlines()[-1] for index in range(1500))
        return {re.sub(r".*[A-Z]{4} (.*?)[.].*", r"\1", text) for text in texts}

    assert not settings(3) & settings(FIRST_TRAINING_SEED + 3)
    assert all(combinations(label, held_out=True) >= 8 for label in LABELS)


def test_problems_are_the_same_in_another_process() -> None:
    code = "from labkit.training.ledger import make_problem as m; print(repr([m(3, i, 'medium') for i in range(5)]))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert said == repr([make_problem(3, index, "medium") for index in range(5)])


def test_answers_are_judged_by_what_follows_the_thought() -> None:
    assert is_correct("12", "<think>1 2</think>12") and is_correct("12", " 12\n")
    assert (
        not is_correct("12", "<think>12</think>13")
        and not is_correct("12", "<think>12")
        and not is_correct("12", "012")
    )


def test_unknown_buckets_and_families_are_refused() -> None:
    with pytest.raises(ValueError, match="bucket"):
        make_problem(1, 1, "tiny")
    with pytest.raises(ValueError, match="family"):
        make_problem(1, 1, "short", "poem")
