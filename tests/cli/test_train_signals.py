"""``replknet train`` stopped from outside, with data-loading processes that hear the signal too."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def photos(tmp_path):
    for name, level in (("dark", 0), ("bright", 250)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.full((16, 16, 3), level + number % 5, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.slow
def test_signal_to_all_processes_saves_the_step_that_was_reached(photos, tmp_path):
    command = [sys.executable, "-m", "replknet.cli.main", "train", "--data.root", str(photos)]
    command += ["--model.name", "replknet_nano", "--model.kwargs", '{"channels": [8, 8, 8]}']
    command += ["--preprocessing.input_size", "16", "--batch.total", "8", "--run.workers", "2"]
    command += ["--schedule.epochs", "100000", "--run.directory", str(tmp_path / "run")]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 2000):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    state = torch.load(tmp_path / "run" / "checkpoints" / "state.pt", weights_only=True)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert state["step"] == steps[-1] == len(steps)
    assert f"stopped after step {state['step']}; the same command continues" in output
