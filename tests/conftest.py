"""Fixtures of several files."""

import pytest

from replknet.ops import _binary, native

ISAS = [isa for isa in (native.isas() if _binary.library else ()) if isa in ("amx", "zen4")]


@pytest.fixture(params=ISAS)
def product_isa(request):
    """An instruction set with matrix products of its own, in use."""
    with native.force_isa(request.param):
        yield request.param
