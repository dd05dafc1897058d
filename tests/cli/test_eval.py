import json
import math

import pytest

from replknet.cli.main import main

METRICS = {
    "top1": 50.0,
    "top5": 100.0,
    "loss": math.nan,
    "images": 2,
    "skipped": 0,
    "per_class": [
        {"name": name, "images": 1, "recall": 0.5, "precision": None, "f1": 0.5}
        for name in ("cats [old]", ":dog:")
    ],
    "worst": [{"true_probability": math.inf}],
}


@pytest.fixture
def evaluated(monkeypatch):
    """Words of a command whose evaluation gives ``METRICS``."""
    monkeypatch.setattr("replknet.cli.eval.evaluate_classifier", lambda config: METRICS)
    return ["eval", "model.safetensors", "--data.root", "pets"]


def test_table_shows_names_as_they_are(evaluated, capsys):
    assert main(evaluated) == 0
    out = capsys.readouterr().out
    assert "cats [old]" in out
    assert ":dog:" in out
    assert "loss nan" in out


def test_numbers_that_are_not_finite_are_null_in_json(evaluated, capsys):
    assert main([*evaluated, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert metrics == {**METRICS, "loss": None, "worst": [{"true_probability": None}]}
