"""A disk that fills up, by an error from the system call and by a real limit of file size."""

import contextlib
import errno
import resource
import signal

import pytest
import torch
from runs import differences, toy_config

from replknet.engine.checkpoint import read_state, save_state
from replknet.engine.config import EmaConfig
from replknet.engine.train import main


def test_disk_full_is_told_and_the_run_can_go_on(tmp_path, monkeypatch):
    main(toy_config(tmp_path / "whole"))
    calls = []
    save = torch.save

    def failing_save(content, file):
        calls.append(None)
        if len(calls) == 3:
            file.write(b"a part of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing_save)
        with pytest.raises(OSError, match=r"cannot write .*state.*No space left on device"):
            main(toy_config(tmp_path / "cut"))
    checkpoints = tmp_path / "cut" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {
        *("state.pt", "state.previous.pt", "last.safetensors", "best.safetensors")
    }
    assert read_state(checkpoints)["step"] == 6
    main(toy_config(tmp_path / "cut"))
    assert differences(tmp_path / "cut", tmp_path / "whole") == []


@contextlib.contextmanager
def limited_file_size(size):
    """A limit in bytes for this process, lifted before pytest writes to what may be a long log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_real_failure_of_the_system_leaves_the_earlier_state(tmp_path):
    save_state(tmp_path, {"step": 1})
    save_state(tmp_path, {"step": 2})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with limited_file_size(50_000), pytest.raises(OSError, match=r"cannot write .*state"):
        save_state(tmp_path, {"step": 3, "weights": torch.zeros(100_000)})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_state(tmp_path, {"step": 3, "weights": torch.zeros(100_000)})
    assert read_state(tmp_path)["step"] == 3


def test_real_failure_while_a_model_file_is_written_keeps_the_run(tmp_path):
    config = toy_config(tmp_path, ema=EmaConfig(), run={"log_every": 100, "eval_every": 0})
    main(config)
    model = tmp_path / "checkpoints" / "last.safetensors"
    before = model.read_bytes()
    (tmp_path / "checkpoints" / "state.pt").unlink()  # step 16 of 18 is the newest state now
    with (
        limited_file_size(len(before) - 100),
        pytest.raises(OSError, match=r"cannot write .*safetensors"),
    ):
        main(config)
    assert model.read_bytes() == before


# TensorBoard's writer thread meets the limit too
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_real_failure_while_metrics_are_written_is_told(tmp_path):
    main(toy_config(tmp_path / "whole"))
    with limited_file_size(1000), pytest.raises(OSError, match=r"cannot write .*metrics.jsonl"):
        main(toy_config(tmp_path / "cut", run={"checkpoint_steps": None, "eval_every": 0}))
    main(toy_config(tmp_path / "cut"))
    assert differences(tmp_path / "cut", tmp_path / "whole") == []
