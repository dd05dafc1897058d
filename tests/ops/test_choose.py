"""Choosing and forcing an algorithm, and saying why."""

import asyncio
import threading
from dataclasses import dataclass, replace

import pytest
import torch

from replknet.ops import depthwise_conv2d, explain, library, problem_of, use
from replknet.ops.algorithm import ALGORITHMS, Support
from replknet.ops.choose import (
    RELU_SECONDS,
    _by_environment,
    _cheapest,
    choose,
    pytorch_alone_is_faster,
)
from replknet.ops.depthwise import _without_operator
from replknet.ops.torch_conv import TorchConv

INPUT, WEIGHT = torch.randn(1, 8, 12, 12), torch.randn(8, 1, 7, 7)
PROBLEM = problem_of(INPUT, WEIGHT)


@dataclass
class Recorder(TorchConv):
    """An algorithm that notes its calls and can refuse."""

    name: str = "recorder"
    refusal: str = ""

    def __post_init__(self):
        super().__init__()
        self.calls = []

    def supports(self, problem):
        return Support(not self.refusal, self.refusal)

    def cost(self, problem):
        return 1e9

    def forward(self, problem, *args):
        self.calls.append("forward")
        return super().forward(problem, *args)

    def grad_input(self, problem, *args):
        self.calls.append("grad_input")
        return super().grad_input(problem, *args)

    def grad_weight(self, problem, *args):
        self.calls.append("grad_weight")
        return super().grad_weight(problem, *args)

    __hash__ = object.__hash__


@pytest.fixture
def recorder(monkeypatch):
    algorithm = Recorder()
    monkeypatch.setitem(ALGORITHMS, "recorder", algorithm)
    yield algorithm
    _cheapest.cache_clear()


def backward():
    arguments = INPUT.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    depthwise_conv2d(*arguments).sum().backward()


def test_use_forces_every_pass_in_its_block_only(recorder):
    with use("recorder"):
        backward()
        with use("auto"):
            backward()
    backward()
    assert sorted(recorder.calls) == ["forward", "grad_input", "grad_weight"]


def test_a_backward_pass_in_a_thread_of_pytorch_goes_by_its_forward_pass(recorder, monkeypatch):
    """As on GPUs: the thread that runs it knows nothing of the block."""
    monkeypatch.setattr(library, "leaves_thread", lambda tensor: True)
    with use("recorder"):
        output = depthwise_conv2d(INPUT.clone().requires_grad_(), WEIGHT.clone().requires_grad_())
        thread = threading.Thread(target=output.sum().backward)
        thread.start()
        thread.join()
    assert sorted(recorder.calls) == ["forward", "grad_input", "grad_weight"]


@pytest.fixture
def environment(monkeypatch):
    """Sets REPLKNET_ALGORITHM as if the process had started with it."""

    def set_to(algorithm):
        monkeypatch.setenv("REPLKNET_ALGORITHM", algorithm)
        _by_environment.cache_clear()

    yield set_to
    monkeypatch.undo()
    _by_environment.cache_clear()


def test_the_argument_outranks_use_and_use_outranks_the_environment(recorder, environment):
    environment("recorder")
    depthwise_conv2d(INPUT, WEIGHT)
    with use("torch"):
        depthwise_conv2d(INPUT, WEIGHT)
        assert recorder.calls == ["forward"]
        depthwise_conv2d(INPUT, WEIGHT, algorithm="recorder")
    assert recorder.calls == ["forward", "forward"]


def test_other_threads_and_tasks_do_not_see_a_use_block(recorder):
    with use("recorder"):
        thread = threading.Thread(target=depthwise_conv2d, args=(INPUT, WEIGHT))
        thread.start()
        thread.join()

    async def forced():
        with use("recorder"):
            await asyncio.sleep(0)

    async def free():
        depthwise_conv2d(INPUT, WEIGHT)

    async def both():
        await asyncio.gather(forced(), free())

    asyncio.run(both())
    assert recorder.calls == []


def test_unknown_names_are_refused_with_the_known_ones(environment):
    with pytest.raises(ValueError, match=r"auto, .*torch.*'cudnn'"), use("cudnn"):
        pass
    environment("cudnn")
    with pytest.raises(ValueError, match=r"REPLKNET_ALGORITHM .*'cudnn'"):
        depthwise_conv2d(INPUT, WEIGHT)


def test_a_forced_algorithm_that_cannot_run_says_why(recorder):
    recorder.refusal = "only on Sundays"
    with pytest.raises(NotImplementedError, match=r"recorder.*only on Sundays.*torch"):
        depthwise_conv2d(INPUT, WEIGHT, algorithm="recorder")
    text = str(explain(PROBLEM))
    assert "recorder   no   only on Sundays" in text
    with use("recorder"):
        assert explain(PROBLEM).choice is None


def test_auto_takes_the_least_cost_among_those_that_can(recorder, monkeypatch):
    monkeypatch.setattr(Recorder, "cost", lambda self, problem: 0.0)
    _cheapest.cache_clear()
    assert choose(PROBLEM) is recorder
    recorder.refusal = "no"
    _cheapest.cache_clear()
    assert choose(PROBLEM) is not recorder


def test_a_relu_costs_a_pass_of_its_own_unless_it_is_folded(recorder, monkeypatch):
    others = min(ALGORITHMS[name].cost(PROBLEM) for name in ALGORITHMS if name != "recorder")
    for name in set(ALGORITHMS) - {"recorder"}:
        monkeypatch.setattr(ALGORITHMS[name], "cost", lambda problem: others)
        monkeypatch.setattr(ALGORITHMS[name], "folds_relu", True)
    less = RELU_SECONDS * PROBLEM.channels  # than a pass over the output, which has 144 pixels
    monkeypatch.setattr(Recorder, "cost", lambda self, problem: others - less)
    _cheapest.cache_clear()
    assert choose(PROBLEM) is recorder
    assert choose(PROBLEM, relu=True) is not recorder
    assert explain(PROBLEM).choice == "recorder" != explain(PROBLEM, relu=True).choice
    monkeypatch.setattr(recorder, "folds_relu", True)
    _cheapest.cache_clear()
    assert choose(PROBLEM, relu=True) is recorder


def test_explanation_lists_every_algorithm_and_marks_the_choice():
    explanation = explain(PROBLEM)
    assert {candidate.name for candidate in explanation.candidates} == set(ALGORITHMS)
    able = [candidate for candidate in explanation.candidates if candidate.ok]
    assert explanation.choice == min(able, key=lambda candidate: candidate.seconds).name
    text = str(explanation)
    assert f"-> {explanation.choice}" in text
    assert "7x7" in text
    assert text.count("ms predicted") == len(able)


def test_explanation_tells_of_trimmed_taps():
    small = problem_of(torch.zeros(1, 4, 7, 7), torch.zeros(4, 1, 31, 31))
    assert "only 13x13 of its taps ever meet the map" in str(explain(small))


def test_other_devices_take_pytorch_unless_forced():
    elsewhere = replace(PROBLEM, device="xpu")
    assert choose(elsewhere).name == "torch"
    assert choose(elsewhere, "torch_fft").name == "torch_fft"
    assert "predicted" not in str(explain(elsewhere))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_answers_for_any_problem(algorithm):
    """``supports`` never raises, and the cost is a positive number where it says yes."""
    for change in (
        {},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"layout": "NHWC"},
        {"stride": (2, 3), "dilation": (2, 1), "padding": (9, 0, 2, 30)},
        {"pass_": "grad_input"},
        {"pass_": "grad_weight", "height": 1, "width": 400, "kernel_size": (1, 300)},
        {"batch": 100, "channels": 1, "height": 3000, "width": 2000},
        {"device": "mps"},
    ):
        problem = replace(PROBLEM, **change)
        support = ALGORITHMS[algorithm].supports(problem)
        assert support.ok or support.reason
        if support.ok and problem.device == "cpu":
            assert ALGORITHMS[algorithm].cost(problem) > 0


@pytest.fixture
def cheap_pytorch(monkeypatch):
    """A machine on which PyTorch is predicted to take no time."""
    monkeypatch.setattr(TorchConv, "cost", lambda self, problem: 0.0)
    for cache in (_cheapest, _without_operator):
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in (_cheapest, _without_operator):
        cache.cache_clear()


def test_what_pytorch_does_faster_goes_to_it_whole(cheap_pytorch):
    def on_operator(input=INPUT, **options):
        weight = WEIGHT.clone().requires_grad_()
        output = depthwise_conv2d(input, weight, **options)
        return "Depthwise" in output.grad_fn.name()

    assert not on_operator()
    assert not on_operator(stride=2, padding=3)
    assert on_operator(algorithm="torch")
    with use("torch"):
        assert on_operator()
    assert on_operator(padding=(3, 3, 3, 2))  # F.conv2d has no uneven padding
    assert on_operator(INPUT[..., :3])  # where F.conv2d would compute with idle taps
    assert on_operator(INPUT[:0])


def test_what_is_asked_for_does_not_decide_what_is_faster():
    """Calls remember the answer, which must not depend on the block that asks first."""
    input = torch.zeros(1, 32, 56, 56).contiguous(memory_format=torch.channels_last)
    problem = problem_of(input, torch.zeros(32, 1, 31, 31))
    with use("torch"):
        assert not pytorch_alone_is_faster([problem])


def test_pytorch_is_left_out_when_the_operator_is_faster():
    """A large kernel, whose weight gradient takes PyTorch a thousand times longer."""
    problems = [
        problem_of(torch.zeros(1, 32, 56, 56), torch.zeros(32, 1, 31, 31), pass_=pass_)
        for pass_ in ("forward", "grad_input", "grad_weight")
    ]
    assert not pytorch_alone_is_faster(problems)
