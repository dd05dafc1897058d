import gzip
import hashlib
import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torchvision
from PIL import Image
from timm.data import ImageNetInfo

from replknet.tasks.classification import DataConfig, open_dataset
from replknet.tasks.classification.class_names import (
    imagenet_1k_names,
    imagenet_22k_names,
    names_by_count,
    readable_names,
)
from replknet.tasks.classification.datasets import detect_format
from replknet.tasks.classification.decoding import CorruptImageError


def sources(dataset, root):
    return [dataset.source(i).removeprefix(f"{root}/") for i in range(len(dataset))]


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(root, labels, images=None, *, zipped=False):
    root.mkdir(exist_ok=True)
    if images is None:
        shape = (len(labels), 28, 28)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", np.asarray(labels, np.uint8))):
            data = idx(array)
            path = root / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(data) if zipped else data)
    return images


# Image folders


def test_a_folder_is_split_by_class_and_reproducibly(cats_and_dogs, tmp_path):
    config = DataConfig(str(cats_and_dogs), val_fraction=0.3)
    train, val = open_dataset(config, "train"), open_dataset(config, "val")
    assert train.class_names == val.class_names == ("cat", "dog")
    train_names, val_names = sources(train, cats_and_dogs), sources(val, cats_and_dogs)
    assert len(train_names) == 14
    assert len(val_names) == 6
    assert sum(name.startswith("cat/") for name in val_names) == 3
    assert not set(train_names) & set(val_names)
    moved = tmp_path / "elsewhere"
    shutil.move(cats_and_dogs, moved)
    again = open_dataset(DataConfig(str(moved), val_fraction=0.3), "val")
    assert sources(again, moved) == val_names
    other = open_dataset(DataConfig(str(moved), val_fraction=0.3, split_seed=1), "val")
    assert sources(other, moved) != val_names


def test_adding_images_to_one_class_leaves_the_split_of_others(cats_and_dogs, write_images):
    config = DataConfig(str(cats_and_dogs))
    before = [n for n in sources(open_dataset(config, "val"), cats_and_dogs) if "cat" in n]
    write_images(cats_and_dogs, "dog/new1.png", "dog/new2.png", "ant/1.png", "ant/2.png")
    after = [n for n in sources(open_dataset(config, "val"), cats_and_dogs) if "cat" in n]
    assert after == before


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_train_and_validation_folders_are_used_as_they_are(tmp_path, write_images, val):
    write_images(tmp_path, "train/a/1.png", "train/b/deep/2.JPEG", "train/b/3.bmp")
    write_images(tmp_path, f"{val}/a/4.png", f"{val}/b/5.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    train = open_dataset(DataConfig(str(tmp_path)), "train")
    assert sources(train, tmp_path) == ["train/a/1.png", "train/b/3.bmp", "train/b/deep/2.JPEG"]
    assert [train[i][1] for i in range(3)] == [0, 1, 1]
    evaluated = open_dataset(DataConfig(str(tmp_path)), "val")
    assert sources(evaluated, tmp_path) == [f"{val}/a/4.png", f"{val}/b/5.png"]
    with Image.open(tmp_path / val / "b" / "5.png") as image:
        assert np.array_equal(np.asarray(evaluated[1][0]), np.asarray(image))


def test_hidden_files_are_no_images(cats_and_dogs, tmp_path):
    expected = sources(open_dataset(DataConfig(str(cats_and_dogs)), "train"), cats_and_dogs)
    (cats_and_dogs / "cat" / "._0.png").write_bytes(b"macOS")
    (cats_and_dogs / "dog" / ".thumbnails").mkdir()
    shutil.copy(cats_and_dogs / "dog" / "0.png", cats_and_dogs / "dog" / ".thumbnails")
    hidden = tmp_path / ".hidden"
    shutil.move(cats_and_dogs, hidden)
    assert sources(open_dataset(DataConfig(str(hidden)), "train"), hidden) == expected
    (hidden / "ant").mkdir()
    (hidden / "ant" / "._1.png").write_bytes(b"macOS")
    assert "no images in 1 of the 3 class folders" in failure(DataConfig(str(hidden)))


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_may_be_called_like_a_split(tmp_path, write_images, name):
    write_images(tmp_path, *(f"{kind}/{i}.png" for kind in ("bus", "car", name) for i in range(5)))
    train, val = (open_dataset(DataConfig(str(tmp_path)), split) for split in ("train", "val"))
    assert train.class_names == ("bus", "car", name)
    assert (len(train), len(val)) == (12, 3)


def test_train_and_validation_folders_without_classes_are_explained(tmp_path, write_images):
    write_images(tmp_path, "train/1.png", "train/2.png", "val/1.png", "val/2.png")
    assert "train has no class folders (2 images side by side)" in failure(
        DataConfig(str(tmp_path))
    )


def test_images_come_in_the_mode_that_was_asked_for(cats_and_dogs):
    config = DataConfig(str(cats_and_dogs))
    assert open_dataset(config, "train")[0][0].mode == "RGB"
    assert open_dataset(config, "train", mode="L")[0][0].mode == "L"


def test_a_corrupt_file_raises_when_it_is_read(cats_and_dogs):
    (cats_and_dogs / "cat" / "0.png").write_bytes(b"no image")
    config = DataConfig(str(cats_and_dogs))
    broken = 0
    for split in ("train", "val"):
        dataset = open_dataset(config, split)
        for index in range(len(dataset)):
            if dataset.source(index).endswith("cat/0.png"):
                broken += 1
                with pytest.raises(CorruptImageError, match=r"cat/0\.png: UnidentifiedImageError"):
                    dataset[index]
    assert broken == 1


def test_imagenet_folders_are_given_their_names(tmp_path, write_images):
    for split in ("train", "val"):
        write_images(tmp_path, *(f"{split}/{n}/1.png" for n in ("n01440764", "n02012849")))
    names = open_dataset(DataConfig(str(tmp_path)), "val").class_names
    assert names[0].startswith("tench")
    assert names[1].startswith("crane")


def failure(config, split="train"):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what is compared)
        open_dataset(config, split)
    return str(caught.value)


def test_archives_beside_train_and_validation_folders_do_not_count(tmp_path, write_images):
    write_images(tmp_path, *(f"{s}/{c}/1.png" for s in ("train", "val") for c in ("cat", "dog")))
    for split in ("train", "val"):
        write_shard(tmp_path / f"ILSVRC2012_img_{split}.tar", [("n01440764.tar", b"")])
    dataset = open_dataset(DataConfig(str(tmp_path)), "val")
    assert sources(dataset, tmp_path) == ["val/cat/1.png", "val/dog/1.png"]
    shutil.rmtree(tmp_path / "val")
    message = failure(DataConfig(str(tmp_path)), "val")
    assert "hold no samples" in message
    assert "format 'webdataset' was guessed" in message
    assert "--data.format" in message
    assert "--data.format" not in failure(DataConfig(str(tmp_path), format="webdataset"), "val")


def test_an_idx_file_beside_class_folders_is_told_as_a_guess(cats_and_dogs):
    (cats_and_dogs / "old-idx3-ubyte").write_bytes(b"")
    message = failure(DataConfig(str(cats_and_dogs)))
    assert "has neither" in message
    assert "--data.format overrides" in message
    assert len(open_dataset(DataConfig(str(cats_and_dogs), format="folder"), "train")) == 16


def test_a_root_that_cannot_serve_is_explained(tmp_path, write_images):
    with pytest.raises(ValueError, match=r"data\.root is missing"):
        DataConfig()
    assert "not a folder" in failure(DataConfig(str(tmp_path / "nowhere")))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is empty" in failure(DataConfig(str(empty)))
    write_images(tmp_path, "flat/1.png", "flat/2.png")
    assert "no class folders (2 images side by side)" in failure(DataConfig(str(tmp_path / "flat")))
    write_images(tmp_path, "one/cat/1.png", "one/cat/2.png")
    message = failure(DataConfig(str(tmp_path / "one")))
    assert "at least two classes" in message
    assert "'cat'" in message


def test_class_folders_that_cannot_serve_are_explained(tmp_path, write_images):
    write_images(tmp_path, "hole/cat/1.png", "hole/cat/2.png")
    (tmp_path / "hole" / "dog").mkdir()
    assert "no images in 1 of the 2 class folders" in failure(DataConfig(str(tmp_path / "hole")))
    write_images(tmp_path, "lone/cat/1.png", "lone/cat/2.png", "lone/dog/1.png")
    assert "holds a single image" in failure(DataConfig(str(tmp_path / "lone")))
    names = [f"odd/{n}/1.png" for n in ("train/cat", "train/dog", "val/cat", "val/wolf")]
    write_images(tmp_path, *names)
    message = failure(DataConfig(str(tmp_path / "odd")))
    assert "only in the first: 'dog'; only in the second: 'wolf'" in message
    write_images(tmp_path, "half/train/cat/1.png", "half/train/dog/1.png")
    half = DataConfig(str(tmp_path / "half"))
    assert "no folder for the val split; add one of val," in failure(half, "val")


def test_a_validation_folder_is_enough_for_evaluation(tmp_path, write_images):
    write_images(tmp_path, "val/cat/1.png", "val/dog/1.png")
    config = DataConfig(str(tmp_path))
    assert sources(open_dataset(config, "val"), tmp_path) == ["val/cat/1.png", "val/dog/1.png"]
    assert "no folder for the train split" in failure(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"val_fraction": 1.0}, "val_fraction"), ({"max_corrupt_fraction": -1}, "in \\[0, 1\\]")],
)
def test_impossible_configurations_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig("somewhere", **values)


# Fashion-MNIST and other IDX files


def test_the_shipped_subset_is_fashion_mnist():
    config = DataConfig(format="fashion-mnist")
    train, val = (open_dataset(config, split, mode="L") for split in ("train", "val"))
    assert (len(train), len(val)) == (5000, 1000)
    assert train.class_names[9] == "Ankle boot"
    image, target = train[0]
    assert (image.size, image.mode, target) == ((28, 28), "L", 9)
    # sums over the first images and labels of the published files
    assert int(train.images.astype(int).sum()) == 286_031_984
    assert np.bincount(val.targets).tolist() == [107, 105, 111, 93, 115, 87, 97, 95, 95, 95]
    assert open_dataset(config, "train")[0][0].mode == "RGB"


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read(tmp_path, zipped):
    images = write_idx(tmp_path, [2, 0, 1], zipped=zipped)
    assert detect_format(tmp_path) == "idx"
    dataset = open_dataset(DataConfig(str(tmp_path)), "val", mode="L")
    assert dataset.class_names == ("0", "1", "2")
    assert np.array_equal(np.asarray(dataset[1][0]), images[1])
    assert [dataset[i][1] for i in range(3)] == [2, 0, 1]
    named = open_dataset(DataConfig(str(tmp_path), format="fashion-mnist"), "val")
    assert named.class_names[0] == "T-shirt/top"


def test_fashion_mnist_is_recognised_by_its_labels(tmp_path):
    labels = open_dataset(DataConfig(format="fashion-mnist"), "train").targets
    write_idx(tmp_path, labels, np.zeros((len(labels), 28, 28), np.uint8))
    assert detect_format(tmp_path) == "fashion-mnist"


def test_damaged_idx_files_are_named(tmp_path):
    write_idx(tmp_path, [0, 1, 2])
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    assert "damaged" in failure(DataConfig(str(tmp_path)))
    path.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03")[:-6])
    assert "damaged" in failure(DataConfig(str(tmp_path)))
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    assert "has neither" in failure(DataConfig(str(tmp_path)))
    write_idx(tmp_path, [0, 11])
    assert "labels from 0 to 11" in failure(DataConfig(str(tmp_path), format="fashion-mnist"))
    write_idx(tmp_path, [0, 1], np.zeros((3, 28, 28), np.uint8))
    assert "3 images but 2 labels" in failure(DataConfig(str(tmp_path)))


# CIFAR


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A tiny CIFAR-10 whose digests torchvision is told to expect."""
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(labels):
        pixels = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        return {"data": pixels, "labels": labels}

    names = [f"class {i}" for i in range(10)]
    meta_name, digest = write("batches.meta", {"label_names": names})
    meta = {"filename": meta_name, "key": "label_names", "md5": digest}
    monkeypatch.setattr(kind, "meta", meta)
    lists = [write(f"data_batch_{i}", batch([i, 9 - i])) for i in range(1, 6)]
    monkeypatch.setattr(kind, "train_list", lists)
    monkeypatch.setattr(kind, "test_list", [write("test_batch", batch([3, 1, 4]))])
    return tmp_path


def test_cifar_is_found_and_read(cifar):
    assert detect_format(cifar) == "cifar10"
    train, val = (open_dataset(DataConfig(str(cifar)), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (10, 3)
    assert train.class_names[3] == "class 3"
    assert [val[i][1] for i in range(3)] == [3, 1, 4]
    assert (val[0][0].size, val[0][0].mode) == ((32, 32), "RGB")


def test_a_cifar_that_is_not_the_published_one_is_never_unpickled(cifar):
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(b"something else")
    assert "not the published CIFAR10" in failure(DataConfig(str(cifar)), "val")
    assert "cifar-100-python.tar.gz" in failure(DataConfig(str(cifar), format="cifar100"))


# Webdataset shards


def write_shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    for number in range(2):
        pairs = [(f"s{number}{i}", 10 * number + i) for i in range(3)]
        files = [
            file
            for key, value in pairs
            for file in ((f"{key}.cls", str(value % 3).encode()), (f"{key}.png", png(value)))
        ]
        write_shard(tmp_path / f"pets-train-{number:04}.tar", [*files, ("lonely.png", png(0))])
    write_shard(tmp_path / "pets-val-0000.tar", [("x.jpg", b"broken"), ("x.cls", b"2")])
    return tmp_path


def test_shards_are_read_by_position(shards):
    dataset = open_dataset(DataConfig(str(shards)), "train")
    assert len(dataset) == 6
    assert [dataset[i][0].getpixel((0, 0))[0] for i in (5, 0, 3)] == [12, 0, 10]
    assert [dataset[i][1] for i in range(6)] == [0, 1, 2, 1, 2, 0]
    assert dataset.source(4).endswith("pets-train-0001.tar/s11.png")
    assert dataset.class_names == ("0", "1", "2")
    (shards / "._pets-train-0000.tar").write_bytes(b"macOS")
    assert len(open_dataset(DataConfig(str(shards)), "train")) == 6
    with pytest.raises(CorruptImageError, match=r"pets-val-0000\.tar/x\.jpg"):
        open_dataset(DataConfig(str(shards)), "val")[0]


def test_shards_take_class_names_from_a_file(shards):
    (shards / "classes.txt").write_text("ant\nbee\ncat\nunseen\n")
    assert open_dataset(DataConfig(str(shards)), "train").class_names[2:] == ("cat", "unseen")
    (shards / "classes.txt").write_text("ant\nbee\n")
    assert "names 2 classes" in failure(DataConfig(str(shards)))


def test_shards_of_the_first_class_alone_ask_for_the_names(shards):
    write_shard(shards / "pets-val-0000.tar", [("x.png", png(0)), ("x.cls", b"0")])
    assert "has only '0'; name every class in classes.txt" in failure(
        DataConfig(str(shards)), "val"
    )
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    assert len(open_dataset(DataConfig(str(shards)), "val")) == 1


def test_shards_follow_the_description_that_timm_reads(shards):
    pytest.importorskip("webdataset")
    splits = {
        "train": {
            "name": "train",
            "filenames": ["pets-train-0001.tar"],
            "shard_lengths": [3],
            "num_samples": 3,
        }
    }
    (shards / "_info.json").write_text(json.dumps({"splits": splits}))
    dataset = open_dataset(DataConfig(str(shards)), "train")
    assert [dataset[i][0].getpixel((0, 0))[0] for i in range(3)] == [10, 11, 12]
    assert "none of the splits val, validation, test" in failure(DataConfig(str(shards)), "val")


def test_shards_that_cannot_be_read_are_named(shards):
    (shards / "pets-val-0000.tar").write_bytes(b"no tar file" * 100)
    assert "pets-val-0000.tar" in failure(DataConfig(str(shards)), "val")
    (shards / "pets-val-0000.tar").unlink()
    assert "no *.tar file with one of val" in failure(DataConfig(str(shards)), "val")


def test_names_of_published_label_sets():
    assert names_by_count(1000)[0] == "tench"
    assert names_by_count(21841) == imagenet_22k_names()
    assert len(imagenet_22k_names()) == 21841
    assert names_by_count(3) == ("0", "1", "2")


@pytest.mark.parametrize(
    ("label_set", "names"),
    [("imagenet-1k", imagenet_1k_names()), ("imagenet-22k", imagenet_22k_names())],
)
def test_a_folder_of_imagenet_is_called_like_the_output_of_a_published_model(label_set, names):
    folders = ImageNetInfo(label_set).label_names()
    assert len(set(names)) == len(names)
    assert readable_names(folders) == names
    assert readable_names(folders[::100]) == names[::100]
    assert tuple(readable_names([folder])[0] for folder in folders) == names


def test_names_of_imagenet_22k_are_those_of_wordnet():
    names = dict(zip(ImageNetInfo("imagenet-22k").label_names(), imagenet_22k_names(), strict=True))
    assert names["n01440764"] == "tench"  # as in ImageNet-1K
    assert names["n00443803"] == "flip (n00443803)"  # one of two of that name
    assert (names["n02012849"], names["n03126707"]) == ("crane bird", "crane")
    assert readable_names(["n99999999", "n01440764"]) == ("n99999999", "tench")
