from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from replknet.analysis import tables
from replknet.analysis.catalog import list_variants
from replknet.analysis.tables import (
    TABLE_6,
    ClassificationFigures,
    ClassificationRow,
    count_table_6,
    measure_table_6,
)
from replknet.models import create_model, list_models


@pytest.mark.slow
def test_table_6_is_counted_as_printed():
    figures = count_table_6()
    assert [each.paper for each in figures] == list(TABLE_6)
    for each in figures:
        row = each.paper
        if row.parameters is not None:
            assert int(each.parameters / 1e6) in (row.parameters, row.parameters - 1)
        if row.flops is not None:
            # The paper rounds some rows and truncates others.
            assert abs(each.flops / 1e9 - row.flops) < 0.1
    assert [f"{each.paper_ratio:.2f}" for each in figures if each.paper_ratio] == [
        "1.31",
        "1.43",
        "1.39",
    ]


def test_table_6_compares_rows_that_exist():
    rows = {(row.model, row.size, row.pretraining) for row in TABLE_6}
    assert len(rows) == len(TABLE_6) == 11
    for row in TABLE_6:
        assert row.baseline is None or (row.baseline, row.size, row.pretraining) in rows


def test_throughput_is_measured_once_and_related_to_the_baseline():
    rows = (
        ClassificationRow("ours", "replknet_nano", 32, "a", 1.0, baseline="test_resnet"),
        ClassificationRow("theirs", "test_resnet", 32, "a", 1.0),
        ClassificationRow("ours", "replknet_nano", 32, "b", 1.0, baseline="test_resnet"),
        ClassificationRow("ours", "replknet_nano", 48, "b", 1.0),
    )
    figures = [ClassificationFigures(row, 1, 1, None) for row in rows]
    told: list[str] = []
    ours, theirs, again, alone = measure_table_6(figures, batch=2, rounds=1, progress=told.append)
    assert told == ["replknet_nano and test_resnet at 32", "replknet_nano at 48"]
    assert ours.throughput > 0
    assert ours.ratio == pytest.approx(ours.throughput / theirs.throughput)
    assert theirs.ratio is alone.ratio is None
    assert again.throughput == ours.throughput
    assert alone.throughput != ours.throughput


def test_networks_are_timed_in_evaluation_without_gradients(monkeypatch):
    class Probe(nn.Module):
        def forward(self, x):
            seen.add((self.training, torch.is_grad_enabled(), tuple(x.shape)))
            return x

    seen: set[tuple] = set()
    monkeypatch.setattr(tables, "create_model", lambda name: Probe())
    row = ClassificationRow("ours", "probe", 32, "a", 1.0)
    (figures,) = measure_table_6([ClassificationFigures(row, 1, 1, None)], batch=4, rounds=2)
    assert seen == {(False, False, (4, 3, 32, 32))}
    assert figures.throughput > 0


@pytest.fixture(scope="module")
def variants():
    return list_variants()


def test_every_variant_is_listed_under_a_name_that_builds_it(variants):
    assert {each.name.split(".")[0] for each in variants} == set(list_models())
    for each in variants:
        with torch.device("meta"):
            model = create_model(each.name)
        assert model.pretrained_cfg["input_size"] == each.input_size
        assert model.num_classes == each.classes
        assert sum(parameter.numel() for parameter in model.parameters()) == each.parameters


def test_variants_say_where_they_come_from(variants):
    assert Counter(each.source for each in variants) == {"published": 9, "paper": 4, "ours": 2}
    by_name = {each.name: each for each in variants}
    published = by_name["replknet_31b.in22k_ft_in1k_384"]
    assert published.file == "RepLKNet-31B_ImageNet-22K-to-1K_384.pth"
    assert published.page
    assert published.parameters == 79_864_168
    assert published.deployed_parameters == 79_438_952
    assert by_name["replknet_nano"].paper is by_name["replknet_nano"].file is None
