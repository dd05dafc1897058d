import copy
import json

import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

from replknet.deploy import fuse, optimize, plain, reparameterize
from replknet.export import FORMATS, VerificationError, export, formats
from replknet.export.verification import sample_images, verify
from replknet.nn import DepthwiseConv2d
from replknet.ops import _binary
from replknet.tasks.classification import Preprocessing

METADATA = {"class_names": ["ant", "bée", "<cat>"], "task": "classification"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, model, images, folder):
    """A report of each format, from the training form, the merged and the fused one."""
    forms = {
        "onnx": model,
        "openvino": reparameterize(model),
        "torch-export": fuse(reparameterize(model)),
    }
    path = folder / f"model{FORMATS[request.param].suffix}"
    return export(forms[request.param], path, request.param, images=images, metadata=METADATA)


def test_the_file_computes_the_network_in_any_engine(exported, model):
    """Straight through the engines' own interfaces, against the unfused network in float64."""
    path, reference = exported.path, copy.deepcopy(model).double()
    runs = {
        "onnx": lambda: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]),
        "openvino": lambda: openvino.Core().compile_model(
            path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        ),
        "torch-export": lambda: torch.export.load(path).module(),
    }
    engine = runs[exported.format]()
    for shape in ((1, 1, 28, 28), (5, 1, 20, 45)):
        batch = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        if exported.format == "onnx":
            [actual] = engine.run(["logits"], {"images": batch.numpy()})
        elif exported.format == "openvino":
            actual = engine({"images": batch.numpy()})["logits"]
        else:
            actual = engine(batch).numpy()
        with torch.no_grad():
            expected = reference(batch.double())
        difference = (torch.from_numpy(actual).double() - expected).abs().max()
        assert difference < 1e-4 * expected.std(correction=0)


def test_the_file_says_what_it_is(exported):
    if exported.format == "onnx":
        [entry] = onnx.load(exported.path).metadata_props
        text = entry.value
    elif exported.format == "openvino":
        text = openvino.Core().read_model(exported.path).get_rt_info("replknet").value
    else:
        found = {"replknet": ""}
        torch.export.load(exported.path, extra_files=found)
        text = found["replknet"]
    stored = json.loads(text)
    assert {key: stored[key] for key in METADATA} == METADATA
    assert stored["form"] == "fused"
    assert stored["version"]


def test_the_report_is_that_of_the_check(exported, folder):
    assert exported.size == sum((folder / name).stat().st_size for name in exported.files)
    assert [check.shape for check in exported.checks] == [
        (3, 1, 28, 28),
        (1, 1, 36, 28),
        (2, 1, 28, 21),
    ]
    assert 0 <= exported.relative <= 1e-4
    assert all(check.agreement == 1 for check in exported.checks)
    assert f"{exported.difference:.1e}" in str(exported)
    assert json.loads(json.dumps(exported.to_dict()))["relative"] == exported.relative
    assert not list(folder.glob(".*"))


def test_onnx_has_standard_operators_and_named_sizes(model, images, folder):
    graph = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    [input] = graph.graph.input
    sizes = [d.dim_param or d.dim_value for d in input.type.tensor_type.shape.dim]
    assert sizes == ["batch", 1, "height", "width"]
    kinds = [node.op_type for node in graph.graph.node]
    assert "BatchNormalization" not in kinds
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in plain(model).modules())
    assert kinds.count("Conv") == convolutions


def test_plain_convolutions_leave_the_model_as_it_is(model):
    network = plain(model)
    assert not any(isinstance(layer, DepthwiseConv2d) for layer in network.modules())
    assert any(isinstance(layer, DepthwiseConv2d) for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Wrong(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


@pytest.mark.parametrize(
    "change",
    [lambda y: y + 1e-3, lambda y: y * float("nan")],
    ids=["shifted", "nan"],
)
def test_a_file_with_other_results_is_not_written(change, model, images, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("older")
    monkeypatch.setattr("replknet.export.pipeline.plain", lambda model: Wrong(plain(model), change))
    with pytest.raises(VerificationError, match=r"model\.pt2 was not written: in torch, logits"):
        export(model, path, "torch-export", images=images)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "older"


def test_a_difference_at_one_size_alone_is_found(model, images):
    def at_28_only(x):
        return model(x) + (0 if x.shape[-1] == 28 else 0.01)

    with pytest.raises(VerificationError, match=r"\(2, 1, 28, 21\)"):
        verify(model, Wrong(nn.Identity(), at_28_only), images, 1e-4)


def test_files_that_belong_together_replace_older_ones(model, images, folder, tmp_path):
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_text("older")
    export(model, tmp_path / "model.xml", "openvino", images=images)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    openvino.Core().read_model(tmp_path / "model.xml")


def test_a_network_of_fixed_size_is_refused(images, tmp_path):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 3))
    with pytest.raises(NotImplementedError, match="any batch and image size"):
        export(flat, tmp_path / "m.onnx", "onnx", images=images)


@pytest.mark.skipif(_binary.library is None, reason="there is no native core")
def test_an_optimized_network_is_refused(model, images, tmp_path):
    with pytest.raises(ValueError, match="optimized for this machine; export the one"):
        export(optimize(model), tmp_path / "m.onnx", "onnx", images=images)


def test_mistakes_of_the_caller(model, images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="one of onnx, openvino, torch-export, got 'tflite'"):
        export(model, tmp_path / "m.onnx", "tflite", images=images)
    with pytest.raises(ValueError, match=r"end in \.xml, got m\.onnx"):
        export(model, tmp_path / "m.onnx", "openvino", images=images)
    with pytest.raises(
        ValueError, match=r"float32 on the CPU, got \(3, 1, 28, 28\) of torch.float64"
    ):
        export(model, tmp_path / "m.onnx", "onnx", images=images.double())
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone to write m\.onnx into"):
        export(model, tmp_path / "gone" / "m.onnx", "onnx", images=images)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs openvino: pip install 'replknet\[export\]'"):
        export(model, tmp_path / "m.xml", "openvino", images=images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (45, 3), (224, 3)])
def test_sample_images_are_normalised_pixels(size, channels):
    preprocessing = Preprocessing(size, (0.2,) * channels, (0.5,) * channels)
    images = sample_images(preprocessing)
    assert images.shape == (4, channels, size, size)
    pixels = images * 0.5 + 0.2
    assert pixels.min() == pytest.approx(0, abs=1e-6)
    assert pixels.max() == pytest.approx(1, abs=1e-2)
    assert len({image.sum().item() for image in images.flatten(0, 1)}) == 4 * channels
