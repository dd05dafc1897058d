import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STRIDE = 14  # of about 160 moments; 1 has been run by hand without a difference


@pytest.mark.slow
def test_run_killed_at_any_moment_resumes_bit_for_bit(tmp_path):
    command = [sys.executable, str(HERE / "kill_runs.py"), str(tmp_path), str(STRIDE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=HERE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["moments"] > 100
    assert found["killed"] >= found["moments"] // STRIDE
    assert found["differences"] == []
