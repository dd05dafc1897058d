"""Fixtures of several files."""

import pytest

from replknet.ops import _binary, native

ISAS = [isa for isa in (native.isas() if _binary.library else ()) if isa != "baseline"]


@pytest.fixture(params=ISAS)
def product_isa(request):
    """An instruction set whose 1x1 convolutions train by native products, in use."""
    with native.force_isa(request.param):
        yield request.param
