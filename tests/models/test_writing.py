import stat

import pytest
import torch
from safetensors.torch import save_file

from replknet.models.writing import write_whole


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_model_file_is_as_readable_as_any_other_new_file(tmp_path):
    ordinary, model = tmp_path / "ordinary", tmp_path / "model.safetensors"
    ordinary.touch()
    write_whole(model, lambda partial: save_file({"weight": torch.zeros(2)}, partial))
    assert permissions(model) == permissions(ordinary)


def test_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("earlier")

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk gone")

    with pytest.raises(OSError, match=r"cannot write .*file: disk gone"):
        write_whole(path, fail)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]
