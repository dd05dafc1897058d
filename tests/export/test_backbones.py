import copy
import json

import onnxruntime
import openvino
import pytest
import torch
from torch import nn

from replknet.cli.main import main
from replknet.export import FORMATS, VerificationError, export, load_exported
from replknet.export.verification import verify
from replknet.models import create_model, save_checkpoint
from replknet.tasks.classification import Preprocessing

SMALL = {"layers": (1, 1, 1), "channels": (8, 12, 16), "kernels": (9, 7, 5), "small_kernel": 3}
KWARGS = {"num_classes": 3, "in_chans": 1, "norm_intermediate_features": True, **SMALL}
NAMES = ["features_0", "features_1", "features_2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A classifier whose stages have norms, with statistics of images."""
    torch.manual_seed(0)
    model = create_model("replknet_nano", **KWARGS)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(-1.5, 1.5)
            module.momentum = None
    model.train().forward_intermediates(torch.randn(16, 1, 28, 28))
    metadata = {
        "task": "classification",
        "model": {"name": "replknet_nano", "kwargs": KWARGS},
        "preprocessing": Preprocessing(28, (0.3,), (0.4,), crop_pct=1.0).to_dict(),
        "class_names": ["ant", "bee", "cat"],
    }
    path = tmp_path_factory.mktemp("backbone") / "best.safetensors"
    save_checkpoint(path, model, metadata)
    return path


@pytest.fixture(scope="module")
def backbone(checkpoint):
    return create_model(checkpoint=checkpoint, features_only=True).eval()


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_computes_the_features_of_every_stage(format, checkpoint, backbone, capsys):
    path = checkpoint.with_suffix(FORMATS[format].suffix)
    words = ["export", str(checkpoint), "--format", format, "--task", "backbone", "--json"]
    assert main([*words, "--output", str(path), "--overwrite"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["output"] for check in checks] == [name for name in NAMES for _ in range(3)]
    images = torch.randn(2, 1, 40, 23, generator=torch.Generator().manual_seed(2))
    if format == "onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        actual = session.run(NAMES, {"images": images.numpy()})
        facts = session.get_modelmeta().custom_metadata_map["replknet"]
    elif format == "openvino":
        precision = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", precision)
        results = compiled({"images": images.numpy()})
        actual = [results[name] for name in NAMES]
        facts = openvino.Core().read_model(path).get_rt_info("replknet").value
    else:
        found = {"replknet": ""}
        actual = torch.export.load(path, extra_files=found).module()(images)
        facts = found["replknet"]
    with torch.no_grad():
        expected = copy.deepcopy(backbone).double()(images.double())
    for ours, exact in zip(actual, expected, strict=True):
        difference = (torch.as_tensor(ours).double() - exact).abs().max()
        assert difference < 1e-4 * exact.std()
    facts = json.loads(facts)
    assert facts["task"] == "backbone"
    assert "class_names" not in facts
    assert facts["preprocessing"]["mean"] == [0.3]
    assert facts["outputs"] == [
        {"name": name, "channels": channels, "reduction": reduction}
        for name, channels, reduction in zip(
            NAMES, (8, 12, 16), _reductions(images, expected), strict=True
        )
    ]


def _reductions(images, features):
    return [-(-images.shape[2] // feature.shape[2]) for feature in features]


def test_a_backbone_does_not_classify(checkpoint, backbone, tmp_path):
    path = tmp_path / "backbone.onnx"
    facts = {"task": "backbone"}
    images = torch.randn(2, 1, 28, 28)
    export(backbone, path, "onnx", images=images, outputs=NAMES, metadata=facts)
    with pytest.raises(ValueError, match="holds a backbone, no classifier"):
        load_exported(path, "onnxruntime")


def test_every_tensor_needs_a_name(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"returns 3 tensors; outputs names \['logits'\]"):
        export(backbone, tmp_path / "m.onnx", "onnx", images=torch.randn(2, 1, 28, 28))


def test_a_difference_in_one_output_alone_is_found(backbone):
    class Shifted(nn.Module):
        """The smallest difference that matters, in the features of the least spread."""

        def forward(self, images):
            features = backbone(images)
            spreads = [feature.std() for feature in features]
            least = spreads.index(min(spreads))
            features[least] = features[least] + 2e-4 * spreads[least]
            return features

    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    verify(backbone, backbone, images, 1e-4, NAMES)
    with pytest.raises(VerificationError, match=r"features_\d for a batch of \(3, 1, 28, 28\)"):
        verify(backbone, Shifted(), images, 1e-4, NAMES)
