"""The page of `hardmoe status --html`: right words, nothing executed, the same lines as the table."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support import invoke

from hardmoe.report.status import StatusRow, render_status

NOON = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("states", "headline"),
    [
        (["done", "reused", "done"], "All 3 artifacts are done"),
        (["done", "running", "missing"], "1 of 3 artifacts are done, 1 being built"),
        (["done", "stopped", "missing"], "1 of 3 artifacts are done, nothing is being built"),
        (["done", "failed", "running", "damaged"], "2 of 4 artifacts failed"),
    ],
)
def test_headline_says_how_it_stands(states: list[str], headline: str) -> None:
    page = render_status([StatusRow(f"a{i}", state) for i, state in enumerate(states)], "runs/x", NOON)
    assert f'<h1 id="heading">{headline}</h1>' in page
    assert "2026-11-30 12:00:00 UTC" in page and 'http-equiv="refresh"' not in page


def test_users_words_are_text_and_the_page_asks_for_nothing() -> None:
    row = StatusRow("<b>x</b>", "failed", note='<script>alert("x")</script>', percent=42.0, share="42 %")
    page = render_status([row], "runs/<i>", NOON, experts="experts: <u>", refresh_seconds=2)
    assert "<script" not in page and "<b>x" not in page and "<u>" not in page and "<i>" not in page
    assert '<meta http-equiv="refresh" content="2">' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("width: 42.0%") == 2, "among what is of interest now, and among all"


def test_command_writes_the_page_in_place_of_the_one_before(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "status.html"
    page.write_text("before")
    root = str(finished / "runs" / "small")
    result = invoke(tmp_path, "status", "--root", root, "--html", str(page))
    assert result.returncode == 0 and result.stdout == "" and str(page) in result.stderr
    text = page.read_text()
    assert "artifacts are done</h1>" in text and root in text and 'http-equiv="refresh"' not in text
    shown = invoke(tmp_path, "status", "--root", root).stdout
    assert all(f"<code>{line.split()[0]}</code>" in text for line in shown.splitlines()[1:])
    assert [path.name for path in tmp_path.iterdir()] == ["status.html"]


def test_page_and_json_are_two_commands(finished: Path, tmp_path: Path) -> None:
    result = invoke(tmp_path, "status", "--root", str(finished / "runs" / "small"), "--json", "--html", "x.html")
    assert result.returncode == 2 and "--json prints and --html writes" in result.stderr
