import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # toy.py and runs.py, also for subprocesses


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Sums in one order, so that runs, also of fixtures, can be compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
