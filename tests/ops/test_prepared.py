"""Filters that never change: which algorithm they are prepared for."""

import pytest
import torch

from replknet.ops import problem_of, use
from replknet.ops.algorithm import ALGORITHMS
from replknet.ops.choose import _cheapest
from replknet.ops.prepared import SPECTRA_SECONDS, pack_filters, prepare_forward

WEIGHT = torch.ones(16, 1, 13, 13)
PROBLEM = problem_of(torch.ones(1, 16, 20, 20), WEIGHT)
SPECTRA = ALGORITHMS["fft"].spectrum_bytes(PROBLEM)


@pytest.fixture
def spectra_save(monkeypatch):
    """Sets the seconds that the transform is predicted to take less than the direct algorithm."""

    def save(seconds):
        for name in ALGORITHMS:
            cost = {"direct": 1.0, "fft": 1.0 - seconds}.get(name, 2.0)
            monkeypatch.setattr(ALGORITHMS[name], "cost", lambda problem, cost=cost: cost)
        _cheapest.cache_clear()

    yield save
    monkeypatch.undo()
    _cheapest.cache_clear()


@pytest.mark.parametrize(("share", "name"), [(0.9, "direct"), (1.1, "fft")])
def test_spectra_are_kept_where_they_save_enough(spectra_save, share, name):
    spectra_save(share * SPECTRA_SECONDS * SPECTRA)
    prepared = prepare_forward(PROBLEM, pack_filters(WEIGHT))
    assert prepared.algorithm.name == name
    assert (prepared.filters.spectra is not None) == (name == "fft")


def test_spectra_that_are_asked_for_are_kept(spectra_save):
    spectra_save(-1.0)
    with use("fft"):
        prepared = prepare_forward(PROBLEM, pack_filters(WEIGHT))
    assert prepared.filters.spectra.nbytes == SPECTRA
