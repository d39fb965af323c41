"""The bar is for people at terminals."""

from __future__ import annotations

import sys

from quire.core.engine.progress import ProgressBar


def test_progress_on_a_terminal_counts_requests_and_speed(monkeypatch, capsys):
    """A long batch on a terminal shows how far it is."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar(5, is_wanted=True) as progress:
        for _ in range(5):
            progress.advance(10)
    assert "5/5" in capsys.readouterr().err


def test_progress_off_a_terminal_or_unwanted_is_silent(monkeypatch, capsys):
    """Logs and short batches stay clean."""
    for is_terminal, count, is_wanted in ((False, 9, True), (True, 9, False), (True, 2, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=is_terminal: shown, raising=False)
        with ProgressBar(count, is_wanted=is_wanted) as progress:
            progress.advance(10)
    assert capsys.readouterr().err == ""
