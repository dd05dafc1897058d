"""docs/models.md says what the variants are."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from replknet.models import create_model, list_models

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_table_of_variants():
    rows = re.findall(r"^\| (replknet_\w+) \|(.*)\|$", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == list_models()
    for name, row in rows:
        kernels, layers, channels, training, merged, _ = (cell.strip() for cell in row.split("|"))
        with torch.device("meta"):
            models = create_model(name), create_model(name, form="merged")
        assert [f"{sum(p.numel() for p in m.parameters()):,}" for m in models] == [training, merged]
        stages = models[1].stages
        found = [
            (s.blocks[0].large_kernel.kernel_size, len(s.blocks) // 2, i["num_chs"])
            for s, i in zip(stages, models[1].feature_info, strict=True)
        ]
        written = [[int(v) for v in text.split(",")] for text in (kernels, layers, channels)]
        assert found == list(zip(*written, strict=True)), name
