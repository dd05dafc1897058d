"""Calls that take turns."""

import time

from replknet.analysis import timing
from replknet.analysis.timing import interleave


def test_samples_are_interleaved_and_slow_calls_stop_early():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    samples = interleave(
        {"slow": lambda: call("slow", 0.03), "fast": lambda: call("fast", 0.006)},
        rounds=4,
        max_seconds=0.08,
    )
    assert len(samples["fast"]) == 4
    assert 1 <= len(samples["slow"]) < 4
    assert min(samples["slow"]) >= 0.03
    assert order[4:8] == ["slow", "slow", "fast", "fast"]


def test_long_calls_do_not_warm_up(monkeypatch):
    monkeypatch.setattr(timing, "LONG_SECONDS", 0.02)
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)

    samples = interleave(
        {"long": lambda: call("long", 0.03), "short": lambda: call("short", 0.006)}, rounds=2
    )
    assert order == ["long", "short", "short", *["long", "short", "short"] * 2]
    assert [len(times) for times in samples.values()] == [2, 2]
