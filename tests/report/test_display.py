from __future__ import annotations

from pathlib import Path

import pytest

from labkit.experiments.claims import VERDICTS_VARIABLE, Evidence, Verdict, read_verdicts
from labkit.report.display import environment_table, show_verdict, show_verdicts, takeaway

VERDICT = Verdict("C34", "partly", "A gain of <2×>.", (Evidence("before", 0.93, 0.85, 1.02, 96, "s"),))


def test_a_verdict_that_is_shown_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VERDICTS_VARIABLE, str(tmp_path / "v.json"))
    shown = show_verdict(VERDICT)
    assert read_verdicts(tmp_path / "v.json") == [VERDICT]
    page = shown._repr_html_()
    assert "partly" in page and "A gain of &lt;2×&gt;." in page and "P95 latency falls" in page
    assert "before: 930\u00a0ms (95 % interval 850 to 1020, n = 96)" in page and "before: 930" in repr(shown)


def test_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VERDICTS_VARIABLE, str(tmp_path / "v.json"))
    shown = show_verdicts([VERDICT, Verdict("C35", "refuted", "No.")])
    assert len(read_verdicts(tmp_path / "v.json")) == 2 and repr(shown).index("C34") < repr(shown).index("C35")


def test_a_takeaway_is_markdown_in_a_box() -> None:
    assert "<strong>fast</strong>" in takeaway("It is **fast**.")._repr_html_()
    assert repr(takeaway("It is **fast**.")) == "Takeaway: It is **fast**."


def test_the_first_cell_names_what_was_measured_with() -> None:
    text = repr(environment_table("quick", workload="60/30/10"))
    for word in ("profile", "quick", "cores of", "torch", "commit", "60/30/10"):
        assert word in text
