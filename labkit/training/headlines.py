"""Headlines about a symbol, each with the one label that its wording carries.

A headline is a phrase (which decides the label) and a setting (which never does). One combination in eight is held out:
training never shows it, problems of held-out seeds show nothing else.
"""

from __future__ import annotations

import random
import zlib

LABELS = ("positive", "negative", "neutral")

_PHRASES = {
    "positive": (
        "beats forecasts",
        "raises dividend",
        "wins record order",
        "lifts profit",
        "gains market share",
        "posts strong growth",
        "expands margin",
        "reports record sales",
        "earns upgrade",
        "cuts debt early",
        "surges",
        "rallies",
    ),
    "negative": (
        "misses forecasts",
        "cuts dividend",
        "loses record order",
        "warns on profit",
        "loses market share",
        "posts weak growth",
        "faces probe",
        "reports falling sales",
        "earns downgrade",
        "delays debt payment",
        "slumps",
        "tumbles",
    ),
    "neutral": (
        "names new auditor",
        "holds annual meeting",
        "moves office",
        "confirms calendar",
        "changes logo",
        "opens archive",
        "keeps dividend",
        "repeats forecasts",
        "publishes agenda",
        "renews lease",
        "updates website",
        "hosts visitors",
    ),
}
_SETTINGS = (
    "",
    "in Tokyo",
    "in London",
    "on Monday",
    "on Friday",
    "this quarter",
    "this year",
    "after review",
    "before holiday",
    "at home",
    "abroad",
    "in spring",
    "in autumn",
    "says paper",
    "as planned",
    "today",
)


def make_headline(rng: random.Random, symbol: str, held_out: bool) -> tuple[str, str, str]:
    """Returns (headline, the phrase that decides, label): labels equally often, combinations held out or not."""
    label = LABELS[int(rng.random() * 3)]
    while True:
        phrase = _PHRASES[label][int(rng.random() * len(_PHRASES[label]))]
        setting = _SETTINGS[int(rng.random() * len(_SETTINGS))]
        if (zlib.crc32(f"{phrase}|{setting}".encode()) % 8 == 0) == held_out:
            return " ".join(part for part in (symbol, phrase, setting) if part), phrase, label


def combinations(label: str, held_out: bool) -> int:
    """How many (phrase, setting) pairs of ``label`` are held out, or are not."""
    pairs = (f"{phrase}|{setting}" for phrase in _PHRASES[label] for setting in _SETTINGS)
    return sum((zlib.crc32(pair.encode()) % 8 == 0) == held_out for pair in pairs)
