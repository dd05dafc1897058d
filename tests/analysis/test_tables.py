from __future__ import annotations

import pytest

from replknet.analysis.tables import (
    TABLE_6,
    ClassificationFigures,
    ClassificationRow,
    count_table_6,
    measure_table_6,
)


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
