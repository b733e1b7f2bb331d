"""The ledger task: a blotter of trades and questions about it, each with a chain of thought and one right answer.

A row of the blotter is ``T0412,ACME3,alpine2,B47@385,f35``: trade T0412 is the third trade of symbol ACME and the
second of account alpine, buys 47 lots at 385, and costs a fee of 35. The rows stand in order of their trade ids. A
control line after them says how many trades every symbol and every account has (``ACME=5``), so that all trades of
one symbol are the keys ACME1 to ACME5. In a chain of thought, sums are written units first ("740" is 47), the way one
adds on paper.

Pure Python and seeded: the same arguments give the same problem on every machine and Python version. Training draws
from seeds of ``FIRST_TRAINING_SEED`` and above; every smaller seed is unseen by the shipped model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from labkit.training.headlines import make_headline

FAMILIES = ("lookup", "net", "notional", "fees", "largest", "count", "limit", "headline")
BUCKETS = ("short", "medium", "long")
BUCKET_TOKENS = {"short": (60, 511), "medium": (512, 2047), "long": (2048, 4096)}
FIRST_TRAINING_SEED = 2**32

SYMBOLS = (
    "ACME", "BOLT", "CRUX", "DELT", "EPIC", "FERN", "GALA", "HALO", "IRIS", "JADE", "KITE", "LYNX", "MICA", "NOVA",
    "ONYX", "PALM", "QUAD", "RUBY", "SAGE", "TUSK", "UNIO", "VEGA", "WREN", "XENO", "YARN", "ZINC", "ATOM", "BRIO",
    "CEDR", "DUNE", "ECHO", "FLUX", "GLEN", "HERN", "IBEX", "JOLT", "KELP", "LUMA", "MESA", "NEON",
)  # fmt: skip
ACCOUNTS = (
    "alpine", "birch", "cobalt", "delta", "ember", "fjord", "grove", "harbor", "indigo", "jasper", "kelvin", "lagoon",
    "maple", "nectar", "ocean", "pearl", "quartz", "river", "summit", "tundra", "umber", "valley", "willow", "xenon",
    "yonder", "zephyr", "amber", "basin", "canyon", "dawn", "elm", "falcon", "granite", "heron", "island", "juniper",
    "karst", "lotus", "meadow", "north",
)  # fmt: skip
HEADER = "id,symbol,account,side lots@price,fee"
MOST_TRADES = 8
ROW_TOKENS = 24
_KEY_TOKENS = 4
# chat template, header, "counts", newlines; and the longest question with every word that the tokenizer splits
_FRAME_TOKENS = 24
_QUESTION_TOKENS = (12, 46)


class Trade(NamedTuple):
    """One row: ``symbol_number`` counts the trades of the symbol so far from 1, ``account_number`` the account's."""

    trade_id: str
    symbol: str
    symbol_number: int
    account: str
    account_number: int
    side: str
    lots: int
    price: int
    fee: int


@dataclass(frozen=True)
class Blotter:
    """Trades in order, and their positions by symbol and by account."""

    trades: tuple[Trade, ...]
    by_symbol: dict[str, list[Trade]]
    by_account: dict[str, list[Trade]]
    text: str


class Question(NamedTuple):
    """``key`` names what is asked, so that no document asks it twice."""

    key: str
    text: str
    thought: str
    answer: str


@dataclass(frozen=True)
class Problem:
    """``prompt`` is the whole user message; a right completion is ``<think>thought</think>answer``."""

    seed: int
    index: int
    bucket: str
    family: str
    prompt: str
    thought: str
    answer: str


def make_problem(seed: int, index: int, bucket: str, family: str | None = None) -> Problem:
    """Problem ``index`` of the series ``seed``; ``family`` None draws one of the eight, each as likely as the next.

    The prompt with the shipped model's chat template has the bucket's number of tokens. Raises ValueError for an
    unknown bucket or family.
    """
    if bucket not in BUCKETS:
        raise ValueError(f"bucket must be one of {', '.join(BUCKETS)}, got {bucket!r}")
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    rng = random.Random(f"problem/{seed}/{index}/{bucket}/{family}")
    drawn = family or FAMILIES[int(rng.random() * len(FAMILIES))]
    blotter = make_blotter(rng, bucket)
    question = ask(rng, blotter, drawn, held_out=seed < FIRST_TRAINING_SEED)
    return Problem(seed, index, bucket, drawn, f"{blotter.text}\n{question.text}", question.thought, question.answer)


def is_correct(problem_answer: str, text: str) -> bool:
    """True if what follows the chain of thought in ``text`` is exactly the answer, surrounding white space aside."""
    thought, closed, answer = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return False
    return answer.strip() == problem_answer


def make_blotter(rng: random.Random, bucket: str) -> Blotter:
    """A blotter that, with any one question, fills a prompt of the bucket's length, every length about as likely."""
    low, high = BUCKET_TOKENS[bucket]
    slack = _QUESTION_TOKENS[1] - _QUESTION_TOKENS[0]
    least = _FRAME_TOKENS + _QUESTION_TOKENS[1] + ROW_TOKENS + 2 * _KEY_TOKENS
    target = int(max(least, low + ROW_TOKENS + slack) + rng.random() * (high - max(least, low + ROW_TOKENS + slack)))
    symbol_share, account_share = 0.2 + 0.25 * rng.random(), 0.2 + 0.25 * rng.random()
    room = target - _FRAME_TOKENS - _QUESTION_TOKENS[1]
    rows = int(room / (ROW_TOKENS + _KEY_TOKENS * (symbol_share + account_share)))
    while (
        rows > 1 and rows * ROW_TOKENS + _KEY_TOKENS * (_keys(rows, symbol_share) + _keys(rows, account_share)) > room
    ):
        rows -= 1
    while (rows + 1) * ROW_TOKENS + _KEY_TOKENS * (
        _keys(rows + 1, symbol_share) + _keys(rows + 1, account_share)
    ) <= room:
        rows += 1
    rows = max(rows, 1)
    return _draw_blotter(rng, rows, _keys(rows, symbol_share), _keys(rows, account_share))


def _keys(rows: int, share: float) -> int:
    """How many symbols (or accounts) a blotter of ``rows`` has, so that none needs more than MOST_TRADES trades."""
    return min(len(SYMBOLS), max(-(-rows // (MOST_TRADES - 1)), int(rows * share), 1))


def _draw_blotter(rng: random.Random, rows: int, symbol_count: int, account_count: int) -> Blotter:
    symbols = _spread(rng, rng.sample(SYMBOLS, symbol_count), rows)
    accounts = _spread(rng, rng.sample(ACCOUNTS, account_count), rows)
    by_symbol: dict[str, list[Trade]] = {}
    by_account: dict[str, list[Trade]] = {}
    trades, lines = [], [HEADER]
    draw = rng.random
    for number, symbol, account in zip(sorted(rng.sample(range(10000), rows)), symbols, accounts, strict=True):
        of_symbol, of_account = by_symbol.setdefault(symbol, []), by_account.setdefault(account, [])
        lots = 1 + int(draw() * 99)
        while any(trade.lots == lots for trade in of_symbol):
            lots = 1 + int(draw() * 99)
        side = "B" if draw() < 0.5 else "S"
        trade = Trade(f"T{number:04d}", symbol, len(of_symbol) + 1, account, len(of_account) + 1, side, lots,
                      100 + int(draw() * 900), 1 + int(draw() * 99))  # fmt: skip
        of_symbol.append(trade)
        of_account.append(trade)
        trades.append(trade)
        lines.append(row_text(trade))
    counts = [f"{key}={len(by_symbol[key])}" for key in sorted(by_symbol)]
    counts += [f"{key}={len(by_account[key])}" for key in sorted(by_account)]
    lines.append("counts " + " ".join(counts))
    return Blotter(tuple(trades), by_symbol, by_account, "\n".join(lines))


def _spread(rng: random.Random, keys: list[str], rows: int) -> list[str]:
    """One key a row: every key at least once, none more than MOST_TRADES times, in random order."""
    drawn = list(keys)
    room = dict.fromkeys(keys, MOST_TRADES - 1)
    while len(drawn) < rows:
        key = keys[int(rng.random() * len(keys))]
        if room[key]:
            room[key] -= 1
            drawn.append(key)
    rng.shuffle(drawn)
    return drawn


def row_text(trade: Trade) -> str:
    """The trade as a row of the blotter."""
    return (
        f"{trade.trade_id},{trade.symbol}{trade.symbol_number},{trade.account}{trade.account_number},"
        f"{trade.side}{trade.lots:02d}@{trade.price},f{trade.fee:02d}"
    )


def ask(rng: random.Random, blotter: Blotter, family: str, held_out: bool) -> Question:
    """A question of ``family`` about ``blotter``; ``held_out`` chooses the half of the headlines."""
    if family == "headline":
        return _ask_headline(rng, blotter, held_out)
    return _ASK[family](rng, blotter)


def _pick(rng: random.Random, choices: tuple[str, ...] | list[str]) -> str:
    return choices[int(rng.random() * len(choices))]


def _pick_trade(rng: random.Random, blotter: Blotter) -> Trade:
    return blotter.trades[int(rng.random() * len(blotter.trades))]


_FIELDS: dict[str, Callable[[Trade], str]] = {
    "price": lambda trade: str(trade.price),
    "quantity": lambda trade: str(trade.lots),
    "fee": lambda trade: str(trade.fee),
    "account": lambda trade: trade.account,
    "symbol": lambda trade: trade.symbol,
    "side": lambda trade: "buy" if trade.side == "B" else "sell",
}


def _ask_lookup(rng: random.Random, blotter: Blotter) -> Question:
    trade, field = _pick_trade(rng, blotter), _pick(rng, tuple(_FIELDS))
    text = _pick(rng, ("What is the {f} of trade {t}?", "Look up the {f} of {t}.", "Which {f} does {t} have?"))
    key = f"lookup/{trade.trade_id}/{field}"
    return Question(key, text.format(f=field, t=trade.trade_id), row_text(trade), _FIELDS[field](trade))


def _ask_net(rng: random.Random, blotter: Blotter) -> Question:
    symbol = _pick(rng, list(blotter.by_symbol))
    text = _pick(
        rng, ("What is the net position in {s}?", "Net position in {s}, please.", "How many lots of {s} are held net?")
    )
    bought = sold = 0
    lines = [f"{symbol}={len(blotter.by_symbol[symbol])}"]
    for trade in blotter.by_symbol[symbol]:
        bought, sold = (bought + trade.lots, sold) if trade.side == "B" else (bought, sold + trade.lots)
        lines.append(
            f"{symbol}{trade.symbol_number}{trade.side}{trade.lots:02d}:{_units_first(bought)},{_units_first(sold)}"
        )
    sign = ">" if bought > sold else "<" if bought < sold else "="
    lines.append(sign + _units_first(abs(bought - sold)))
    return Question(f"net/{symbol}", text.format(s=symbol), "\n".join(lines), str(bought - sold))


def _ask_notional(rng: random.Random, blotter: Blotter) -> Question:
    trade = _pick_trade(rng, blotter)
    text = _pick(
        rng, ("What is the notional of trade {t}?", "Work out the notional of {t}.", "Price times quantity of {t}?")
    )
    key = f"notional/{trade.trade_id}"
    return Question(key, text.format(t=trade.trade_id), _work_out(trade), str(trade.price * trade.lots))


def _ask_fees(rng: random.Random, blotter: Blotter) -> Question:
    account = _pick(rng, list(blotter.by_account))
    text = _pick(
        rng, ("What are the total fees of account {a}?", "Add up the fees of {a}.", "How much does {a} pay in fees?")
    )
    total = 0
    lines = [f"{account}={len(blotter.by_account[account])}"]
    for trade in blotter.by_account[account]:
        total += trade.fee
        lines.append(f"{account}{trade.account_number}f{trade.fee:02d}:{_units_first(total)}")
    return Question(f"fees/{account}", text.format(a=account), "\n".join(lines), str(total))


def _ask_largest(rng: random.Random, blotter: Blotter) -> Question:
    symbol = _pick(rng, list(blotter.by_symbol))
    text = _pick(
        rng,
        ("Which is the largest trade of {s}?", "Find the largest trade in {s}.", "Which trade of {s} has most lots?"),
    )
    best = blotter.by_symbol[symbol][0]
    lines = [f"{symbol}={len(blotter.by_symbol[symbol])}"]
    for trade in blotter.by_symbol[symbol]:
        best = max(best, trade, key=lambda candidate: candidate.lots)
        lines.append(f"{symbol}{trade.symbol_number},{trade.lots:02d}:{best.symbol_number},{best.lots:02d}")
    lines.append(f"{symbol}{best.symbol_number}{best.trade_id}")
    return Question(f"largest/{symbol}", text.format(s=symbol), "\n".join(lines), best.trade_id)


def _ask_count(rng: random.Random, blotter: Blotter) -> Question:
    of_symbol, side = rng.random() < 0.5, "B" if rng.random() < 0.5 else "S"
    name = _pick(rng, list(blotter.by_symbol if of_symbol else blotter.by_account))
    trades = (blotter.by_symbol if of_symbol else blotter.by_account)[name]
    text = _pick(rng, ("How many {w} of {n} are there?", "Count the {w} of {n}.", "How often does {n} show {w}?"))
    found = 0
    lines = [f"{name}={len(trades)}"]
    for number, trade in enumerate(trades, start=1):
        found += trade.side == side
        lines.append(f"{name}{number}{trade.side}:{found}")
    sides = "buys" if side == "B" else "sells"
    return Question(f"count/{name}/{side}", text.format(w=sides, n=name), "\n".join(lines), str(found))


def _ask_limit(rng: random.Random, blotter: Blotter) -> Question:
    trade = _pick_trade(rng, blotter)
    notional, breaks = trade.price * trade.lots, rng.random() < 0.5
    below, above = (notional - 1) // 500, notional // 500 + 1
    # a notional of 500 and less breaks no limit there is
    breaks = breaks and below > 0
    limit = 500 * (
        1 + int(rng.random() * below) if breaks else above + int(rng.random() * max(1, min(above, 199 - above)))
    )
    text = _pick(
        rng, ("Does {t} break the {l:,} limit?", "Is {t} over the limit of {l:,}?", "Limit {l:,}: does {t} break it?")
    )
    thought = f"{_work_out(trade)}\n{notional:05d} {limit:05d}{'>' if breaks else '<'}"
    key = f"limit/{trade.trade_id}"
    return Question(key, text.format(t=trade.trade_id, l=limit), thought, "yes" if breaks else "no")


def _ask_headline(rng: random.Random, blotter: Blotter, held_out: bool) -> Question:
    symbol = _pick(rng, list(blotter.by_symbol))
    headline, phrase, label = make_headline(rng, symbol, held_out)
    text = _pick(
        rng, ("Headline: {h}. Positive, negative or neutral?", "Label this headline: {h}.", "{h}. What is the label?")
    )
    return Question(f"headline/{headline}", text.format(h=headline), f"{phrase}:{label}", label)


def _units_first(number: int) -> str:
    return f"{number:03d}"[::-1]


def _work_out(trade: Trade) -> str:
    """Price times lots on paper: a line of products with carries for each digit of lots, then the columns added up."""
    price = [int(digit) for digit in reversed(str(trade.price))]
    lines = [f"{trade.trade_id}{trade.side}{trade.lots:02d}@{trade.price}"]
    parts: list[list[int]] = []
    for factor in (trade.lots % 10, trade.lots // 10):
        carry, steps = 0, []
        for digit in price:
            step = digit * factor + carry
            steps.append(step)
            carry = step // 10
        lines.append(f"{factor}:" + " ".join(f"{step:02d}" for step in steps))
        parts.append([step % 10 for step in steps] + [steps[-1] // 10])
    carry, columns = 0, []
    for unit, ten in zip([*parts[0], 0], [0, *parts[1]], strict=True):
        column = unit + ten + carry
        columns.append(column)
        carry = column // 10
    lines.append("+:" + " ".join(f"{column:02d}" for column in columns))
    return "\n".join(lines)


_ASK: dict[str, Callable[[random.Random, Blotter], Question]] = {
    "lookup": _ask_lookup,
    "net": _ask_net,
    "notional": _ask_notional,
    "fees": _ask_fees,
    "largest": _ask_largest,
    "count": _ask_count,
    "limit": _ask_limit,
}
