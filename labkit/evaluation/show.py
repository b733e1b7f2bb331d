"""An account of an evaluation as tables for a terminal: a header and rows of cells each."""

from __future__ import annotations

from typing import Any

from labkit.training.evaluate import share_text, table_rows

Table = list[tuple[str, ...]]


def tables(account: dict[str, Any]) -> list[Table]:
    """Exact match by family and bucket, right completions by bucket, the paired test, the text: what there is."""
    found = []
    if "buckets" in account:
        found.append(table_rows(account))
    if "completions" in account:
        found.append(_scores(account["completions"], "right completions"))
    if account.get("paired"):
        found.append(_paired(account))
    if "text" in account:
        text = account["text"]
        found.append(_scores({text["file"]: text}, f"text, {text['window']:,} tokens at a time"))
    return found


def _scores(columns: dict[str, dict[str, Any]], title: str) -> Table:
    rows: Table = [
        (title, *columns),
        ("tokens", *(f"{each['tokens']:,}" for each in columns.values())),
        ("loss, nats a token", *(f"{each['loss']:.3g}" for each in columns.values())),
        ("perplexity", *(_number(each["perplexity"]) for each in columns.values())),
    ]
    if all("agreement" in each for each in columns.values()):
        rows += [
            ("loss of the reference", *(f"{each['reference_loss']:.3g}" for each in columns.values())),
            ("same first choice", *(f"{100 * each['agreement']:.2f} %" for each in columns.values())),
            ("KL(reference to model), nats", *(f"{each['divergence']:.3g}" for each in columns.values())),
        ]
    return rows


def _paired(account: dict[str, Any]) -> Table:
    pairs, reference = account["paired"], account["reference"]
    rows: Table = [(f"against {reference['model']}", *pairs)]
    shares = [share_text(reference["buckets"].get(bucket)) for bucket in pairs if bucket != "all"]
    rows.append(("its exact match", *shares, "")[: len(pairs) + 1])
    for key, label in (
        ("both", "both right"),
        ("model_only", "this one alone"),
        ("reference_only", "the reference alone"),
        ("neither", "neither"),
    ):
        rows.append((label, *(str(each[key]) for each in pairs.values())))
    rows.append(("difference, points", *(_difference(each) for each in pairs.values())))
    rows.append(("McNemar, exact p", *(f"{each['p']:.3g}" for each in pairs.values())))
    return rows


def _difference(pair: dict[str, float]) -> str:
    return f"{100 * pair['difference']:+.2f} ({100 * pair['low']:+.2f} to {100 * pair['high']:+.2f})"


def _number(value: float) -> str:
    return f"{value:.5f}" if value < 1.1 else f"{value:,.4g}"
