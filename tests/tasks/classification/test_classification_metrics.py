import json
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from replknet.tasks.classification.metrics import EXAMPLES, ClassificationEvaluator

NAMES = tuple(f"class {i}" for i in range(7))


class Recorded(nn.Module):
    """A model whose input is its output."""

    def forward(self, image):
        return image


def batches(count, sizes, classes=7):
    """Batches of random logits, as the eval loader would make them of ``count`` images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator) * 3
    targets = torch.randint(0, classes - 1, (count,), generator=generator)  # none of the last class
    places = torch.arange(count)
    return [
        {"image": a, "target": b, "index": c, "skipped": torch.tensor(0)}
        for a, b, c in zip(*(x.split(sizes) for x in (logits, targets, places)), strict=True)
    ]


@torch.inference_mode()
def evaluate(parts, names=NAMES):
    evaluator = ClassificationEvaluator(names, lambda index: f"image {index}")
    for part in parts:
        evaluator.update(Recorded(), part)
    return evaluator.compute()


def joined(parts):
    return (torch.cat([part[key] for part in parts]).double() for key in ("image", "target"))


def test_scores_equal_their_definitions():
    parts = batches(101, 8)
    logits, targets = joined(parts)
    result = evaluate(parts)
    order = logits.argsort(dim=1, descending=True)
    hits = order == targets[:, None]
    assert result["top1"] == pytest.approx(100 * hits[:, 0].double().mean().item(), abs=1e-12)
    assert result["top5"] == pytest.approx(
        100 * hits[:, :5].any(1).double().mean().item(), abs=1e-12
    )
    negative = -logits.log_softmax(1).gather(1, targets.long()[:, None])
    assert result["loss"] == pytest.approx(negative.mean().item(), rel=1e-5)
    assert (result["images"], result["skipped"]) == (101, 0)
    matrix = np.zeros((7, 7), int)
    np.add.at(matrix, (targets.long().numpy(), order[:, 0].numpy()), 1)
    assert result["confusion_matrix"] == matrix.tolist()
    for number, row in enumerate(result["per_class"]):
        true = matrix[number, number]
        precision, recall = true / matrix[:, number].sum(), true / max(matrix[number].sum(), 1)
        assert row["name"] == NAMES[number]
        assert row["images"] == matrix[number].sum()
        assert row["precision"] == pytest.approx(precision)
        assert row["recall"] == (pytest.approx(recall) if row["images"] else None)
        total = matrix[number].sum() + matrix[:, number].sum()
        assert row["f1"] == pytest.approx(2 * true / total)
    assert json.loads(json.dumps(result)) == result


def test_best_and_worst_predictions_are_those_of_the_true_class():
    parts = batches(101, 8)
    logits, targets = joined(parts)
    result = evaluate(parts)
    true = logits.softmax(1).gather(1, targets.long()[:, None]).squeeze(1)
    assert [e["index"] for e in result["worst"]] == true.argsort()[:EXAMPLES].tolist()
    assert [e["index"] for e in result["best"]] == true.argsort(descending=True)[:EXAMPLES].tolist()
    worst = result["worst"][0]
    assert worst["source"] == f"image {worst['index']}"
    assert worst["target"] == targets[worst["index"]]
    assert worst["prediction"] == logits[worst["index"]].argmax()
    assert worst["probability"] == pytest.approx(logits[worst["index"]].softmax(0).max().item())
    assert worst["true_probability"] < 0.01 < worst["probability"]


def test_two_classes_have_a_top_2():
    result = evaluate(batches(20, 6, classes=2), ("a", "b"))
    assert result["top5"] == 100
    assert result["top1"] < 100


def test_skipped_images_and_empty_batches():
    parts = batches(9, 4)
    empty = {"image": torch.empty(0), "target": torch.empty(0, dtype=torch.int64)}
    empty |= {"index": torch.empty(0, dtype=torch.int64), "skipped": torch.tensor(4)}
    parts[0]["skipped"] = torch.tensor(2)
    result = evaluate([*parts, empty])
    assert (result["images"], result["skipped"]) == (9, 6)
    assert result["top1"] == evaluate(batches(9, 4))["top1"]
    with pytest.raises(ValueError, match="nothing was evaluated"):
        evaluate([empty])


def test_many_classes_have_no_confusion_matrix():
    result = evaluate(batches(5, 5, classes=300), tuple(map(str, range(300))))
    assert "confusion_matrix" not in result
    assert len(result["per_class"]) == 300


def test_half_precision_logits():
    parts = [{**part, "image": part["image"].bfloat16()} for part in batches(40, 8)]
    exact = [{**part, "image": part["image"].bfloat16().float()} for part in batches(40, 8)]
    assert evaluate(parts) == evaluate(exact)


def evaluate_shard(rank, world_size, port, path):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    result = evaluate(batches(23, 1)[rank::world_size])
    torch.save(result, f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*use of fork")  # three small children that start no threads
def test_processes_agree_on_the_scores_of_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (3, port, str(tmp_path))
    mp.start_processes(evaluate_shard, arguments, nprocs=3, start_method="fork")
    expected = evaluate(batches(23, 1))
    for rank in range(3):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result.pop("loss") == pytest.approx(expected["loss"], rel=1e-6)
        assert result == {key: value for key, value in expected.items() if key != "loss"}


def test_a_loss_that_is_no_number_is_not_left_out():
    parts = batches(10, 5)
    parts[0]["image"][0] = torch.nan
    assert np.isnan(evaluate(parts)["loss"])
