"""Threads, forks, distributed training, memory."""

import os
import threading
import tracemalloc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from replknet.nn import DepthwiseConv2d
from replknet.ops import depthwise_conv2d
from replknet.ops.algorithm import ALGORITHMS

CPU_ALGORITHMS = [name for name in ALGORITHMS if name != "triton"]


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_eight_threads_at_once_agree(algorithm):
    torch.manual_seed(0)
    input, weight = torch.randn(2, 16, 20, 20), torch.randn(16, 1, 11, 11)
    expected = depthwise_conv2d(input, weight, algorithm=algorithm)
    wrong = []

    def work():
        for _ in range(50):
            if not torch.equal(depthwise_conv2d(input, weight, algorithm=algorithm), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_works_in_a_forked_child(algorithm):
    """Where a data loader's worker would use it: one thread, after the parent used many."""
    torch.manual_seed(0)
    input, weight = torch.randn(2, 16, 20, 20), torch.randn(16, 1, 11, 11)
    expected = depthwise_conv2d(input, weight, algorithm=algorithm)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        result = depthwise_conv2d(input, weight, algorithm=algorithm)
        os._exit(0 if torch.allclose(result, expected, atol=1e-5) else 1)
    assert os.waitpid(child, 0)[1] == 0


def train_replica(rank, file, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(DepthwiseConv2d(4, 4, 7, padding=3))
    torch.manual_seed(rank)
    model(torch.randn(2, 4, 8, 8)).square().sum().backward()
    queue.put((rank, model.module.weight.grad.numpy()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_replicas_share_gradients(tmp_path):
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(train_replica, (str(tmp_path / "store"), queue), nprocs=2)
    grads = dict(queue.get() for _ in range(2))
    assert (grads[0] == grads[1]).all()
    torch.manual_seed(0)
    layer = DepthwiseConv2d(4, 4, 7, padding=3)
    for rank in range(2):
        torch.manual_seed(rank)
        (layer(torch.randn(2, 4, 8, 8)).square().sum() / 2).backward()
    torch.testing.assert_close(torch.from_numpy(grads[0]), layer.weight.grad)


@pytest.mark.parametrize("algorithm", CPU_ALGORITHMS)
def test_memory_does_not_grow(algorithm):
    input = torch.randn(1, 32, 28, 28, requires_grad=True)
    weight = torch.randn(32, 1, 13, 13, requires_grad=True)

    def step():
        output = depthwise_conv2d(input, weight, algorithm=algorithm)
        torch.autograd.grad(output.sum(), [input, weight])

    for _ in range(20):
        step()
    tracemalloc.start()
    before = resident_bytes(), tracemalloc.get_traced_memory()[0]
    for _ in range(100):
        step()
    after = resident_bytes(), tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after[0] - before[0] < 50 * input.numel() * 4  # one tensor left behind a call is 100
    assert after[1] - before[1] < 200_000


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
