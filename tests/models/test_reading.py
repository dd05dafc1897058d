"""Files that are no checkpoints, damaged, or would run code."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch
from layouts import small

from replknet.models import load_checkpoint, read_checkpoint


class Payload:
    """Unpickling this runs a command."""

    def __init__(self, target: os.PathLike) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_never_run(tmp_path, zipped):
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    content = {"model": small().state_dict(), "args": Payload(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil.pth holds objects.*\(\w+\.system\).*refused"):
        load_checkpoint(small(), path)
    assert not proof.exists()


def test_whole_pickled_model_is_refused(tmp_path):
    torch.save(small(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"RepLKNet\).*save only the state dict"):
        read_checkpoint(tmp_path / "model.pth")


def test_old_torch_format(tmp_path):
    state = small().state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pth").state_dict.keys() == state.keys()


@pytest.mark.parametrize("name", ["new.pth", "old.pth", "ours.safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_truncated(write, name, keep):
    state = small().state_dict()
    path = write(state, name)
    if name == "old.pth":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=rf"{name} \([\d,]+ bytes\) is truncated or damaged"):
        read_checkpoint(path)


def test_old_format_truncated_within_its_first_2000_bytes(tmp_path):
    """A file cut within the name of a class may be refused for that class."""
    path = tmp_path / "old.pth"
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for length in range(8, 2000):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"is truncated or damaged|so it is refused"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"<!DOCTYPE html><html>Virus scan warning", r"it is a web page.*download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), r"begins like neither a PyTorch nor a safetensors"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file.pth is .*{message}|file.pth {message}"):
        read_checkpoint(path)


def test_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(ValueError, match=r"photos.zip .* is truncated or damaged"):
        read_checkpoint(tmp_path / "photos.zip")


def test_missing_file_and_directory(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
    write(small().state_dict(), "best.safetensors")
    with pytest.raises(IsADirectoryError, match=r"is a directory.*it holds best.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not named weights"),
        ({"epoch": 3, "lr": 0.1}, r"there are no weights: .*found 'epoch', 'lr'"),
        ({"state_dict": {}}, "there are no weights.*found nothing"),
        ({"model": {"weight": 3.0}}, "there are no weights.*found 'weight'"),
    ],
)
def test_content_without_weights(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(write(content))


@pytest.mark.parametrize(("text", "message"), [("[1", "is not JSON"), ("[1]", "is a list")])
def test_metadata_that_is_not_ours(tmp_path, text, message):
    from safetensors.torch import save_file

    path = tmp_path / "strange.safetensors"
    save_file(small().state_dict(), path, metadata={"replknet": text})
    with pytest.raises(ValueError, match=rf"metadata of .*strange.safetensors {message}"):
        read_checkpoint(path)
