"""The experts on several nodes: virtual ones, which differ from real ones in where memory lies and nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_k2.experts import open_experts
from hybrid_k2.experts.cpu import NativeExperts
from hybrid_k2.host.binding import warn_unbound
from hybrid_k2.host.threads import NodeThreads, virtual_nodes
from tests.conftest import REPO
from tests.unit.experts_common import (
    error,
    float64_layer,
    load_random_experts,
    native_runtime,
    random_expert,
    random_routing,
)

SHAPE = (160, 160, 8, 3)  # five groups of channels: two nodes get two and three


def layer_on(nodes: Sequence[NodeThreads], shape: tuple[int, int, int, int] = SHAPE) -> NativeExperts:
    native_runtime().close()  # skips where there is no extension
    layer = open_experts("exact", sum(node.threads for node in nodes), nodes=nodes).make_layer(*shape)
    assert isinstance(layer, NativeExperts)
    return layer


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(tokens, SHAPE[0]), *random_routing(tokens, SHAPE[2], SHAPE[3]))


@pytest.mark.parametrize("nodes", [2, 3, 5, 7])
def test_nodes_are_as_exact_as_one(nodes: int) -> None:
    layer, oracle = layer_on(virtual_nodes(nodes, nodes)), float64_layer(*SHAPE)
    load_random_experts(layer, oracle)
    for tokens in (1, 3, 65):
        arguments = batch(tokens)
        assert error(layer.forward(*arguments), oracle.forward(*arguments)) < 2e-4


def test_bits_depend_on_the_number_of_nodes_alone() -> None:
    layers = [layer_on(virtual_nodes(threads, 2)) for threads in (2, 3, 5)]
    layers.append(layer_on((NodeThreads(4), NodeThreads(1))))
    load_random_experts(*layers)
    hidden, ids, weights = batch(50)
    whole = layers[0].forward(hidden, ids, weights)
    for layer in layers[1:]:
        assert torch.equal(layer.forward(hidden, ids, weights), whole)
    some = torch.randperm(50)[:7]
    assert torch.equal(layers[1].forward(hidden[some], ids[some], weights[some]), whole[some])
    order = torch.randperm(SHAPE[3])
    assert torch.equal(layers[2].forward(hidden, ids[:, order].contiguous(), weights[:, order].contiguous()), whole)


def test_weights_come_back_whole_from_their_slices() -> None:
    one, three = layer_on(virtual_nodes(1, 1)), layer_on(virtual_nodes(3, 3))
    experts = load_random_experts(one, three)
    assert three.nbytes == one.nbytes
    for number, expert in enumerate(experts):
        for name in ("gate", "up", "down"):
            got, loaded = getattr(three.read_expert(number), name), getattr(expert, name)
            assert torch.equal(got.packed, loaded.packed)
            assert torch.equal(got.scale, loaded.scale)
        for whole, sliced in zip(one.read_l32(number), three.read_l32(number), strict=True):
            assert (whole == sliced).all()
        assert three.checksum(number) == one.checksum(number)
        three.verify(number)


def test_a_token_without_a_number_stays_alone() -> None:
    layer = layer_on(virtual_nodes(2, 2))
    load_random_experts(layer)
    hidden, ids, weights = batch(6)
    expected = layer.forward(hidden, ids, weights)
    hidden[2, 5] = torch.nan
    hidden[4, 0] = torch.inf
    got = layer.forward(hidden, ids, weights)
    assert bool(got[[2, 4]].isnan().all())
    assert torch.equal(got[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


def test_an_intermediate_value_out_of_range_on_one_node_ends_the_row() -> None:
    layer = layer_on(virtual_nodes(2, 2), (64, 64, 2, 1))
    for number in range(2):
        expert = random_expert(64, 64)
        if number == 0:  # silu(gate) * up of the second node's channels goes beyond 3.7e22
            expert.gate.scale[32:] = 255.0
            expert.up.scale[32:] = 255.0
        layer.load_expert(number, expert)
    hidden = torch.full((2, 64), 1e20)
    ids, weights = torch.tensor([[0], [1]], dtype=torch.int32), torch.ones(2, 1)
    hidden[1] = torch.randn(64)
    got = layer.forward(hidden, ids, weights)
    assert bool(got[0].isnan().all())
    assert bool(got[1].isfinite().all())


def test_slots_and_empty_batches() -> None:
    layer = layer_on(virtual_nodes(4, 2))
    load_random_experts(layer)
    first, second = batch(9), batch(1)
    layer.submit(0, *first)
    layer.submit(1, *second)
    assert torch.equal(layer.wait(0), layer.forward(*first))
    assert torch.equal(layer.wait(1), layer.forward(*second))
    assert layer.forward(*batch(0)).shape == (0, SHAPE[0])
    layer.submit(0, *first)
    layer.close()


def allowed_cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def test_threads_run_where_they_are_put() -> None:
    native_runtime().close()
    from hybrid_k2 import _native

    cpu = random.choice(allowed_cpus())
    others = set(Path("/proc/self/task").iterdir())
    runtime = _native.Runtime("portable", 3, "exact", [(1, None, [[cpu]]), (2, None, [])])
    assert (runtime.nodes, runtime.threads, runtime.pinned_threads) == (2, 3, 1)
    status = [(path / "status").read_text() for path in set(Path("/proc/self/task").iterdir()) - others]
    of_worker = next(text for text in status if text.startswith("Name:\tk2-expert-0\n"))
    assert f"Cpus_allowed_list:\t{cpu}\n" in of_worker
    runtime.close()
    with pytest.raises(ValueError, match="nodes: expected 3 threads in all, got 2"):
        _native.Runtime("portable", 3, "exact", [(1, None, []), (1, None, [])])
    with pytest.raises(ValueError, match="cpus: expected none or a list for each of 2 threads, got 1"):
        _native.Runtime("portable", 2, "exact", [(2, None, [[0]])])


def test_a_node_that_memory_cannot_be_bound_to_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    nodes = (NodeThreads(1, 90_000), NodeThreads(1, 90_001))  # no such nodes: the kernel refuses
    native_runtime().close()  # skips where there is no extension
    warn_unbound.cache_clear()
    runtime = open_experts("exact", 2, nodes=nodes)
    for _ in range(2):
        layer = runtime.make_layer(*SHAPE)
        assert isinstance(layer, NativeExperts)
        assert not layer.bound
        load_random_experts(layer)
        assert bool(layer.forward(*batch(2)).isfinite().all())
    assert len([record for record in caplog.records if "mbind" in record.message]) == 1
    assert layer_on(virtual_nodes(2, 2)).bound


def test_the_share_on_huge_pages_is_what_the_system_says() -> None:
    """In a process of its own, whose only memory that asks for huge pages is the layer's."""
    native_runtime().close()  # skips where there is no extension
    script = (
        "import ctypes, re\n"
        "from pathlib import Path\n"
        "from hybrid_k2.host.threads import virtual_nodes\n"
        "from tests.unit.experts_common import load_random_experts\n"
        "from tests.unit.test_experts_numa import layer_on\n"
        "def forbid_huge_pages(yes):\n"
        "    assert ctypes.CDLL(None).prctl(41, yes, 0, 0, 0) == 0  # PR_SET_THP_DISABLE\n"
        "def loaded():\n"
        "    layer = layer_on(virtual_nodes(2, 2), (512, 512, 16, 2))\n"
        "    assert layer.huge_page_share is None  # nothing is in memory yet\n"
        "    load_random_experts(layer)\n"
        "    return layer\n"
        "forbid_huge_pages(1)\n"
        "layer = loaded()\n"
        "assert layer.huge_page_share == 0, layer.huge_page_share\n"
        "layer.close()\n"
        "forbid_huge_pages(0)\n"
        "layer = loaded()\n"
        "mappings = re.split(r'(?m)^(?=[0-9a-f]+-)', Path('/proc/self/smaps').read_text())\n"
        "asked = [text for text in mappings if re.search(r'(?m)^VmFlags:.* hg', text)]\n"
        "resident, huge = (sum(int(re.search(rf'(?m)^{key}: +(\\d+) kB', text)[1]) for text in asked)\n"
        "                  for key in ('Rss', 'AnonHugePages'))\n"
        "assert resident * 1024 >= layer.nbytes\n"
        "assert abs(layer.huge_page_share - huge / resident) < 0.01, (layer.huge_page_share, huge, resident)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_under_taskset_with_any_number_of_threads(threads: int) -> None:
    """One allowed CPU: the threads take turns on it, and none of them is put elsewhere."""
    script = (
        "import os\n"
        "os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])\n"  # before torch starts threads, as taskset does
        "import torch\n"
        "from pathlib import Path\n"
        "from hybrid_k2.experts import open_experts\n"
        "from hybrid_k2.host.threads import spread_threads\n"
        "from hybrid_k2.placement import Machine\n"
        "from tests.unit.experts_common import load_random_experts, random_routing\n"
        "machine = Machine.probe()\n"
        f"nodes = spread_threads({threads}, machine.core_cpus, machine.nodes, own=True)\n"
        f"layer = open_experts('exact', {threads}, nodes=nodes).make_layer(96, 64, 4, 2)\n"
        "load_random_experts(layer)\n"
        "for tokens in (1, 7): layer.forward(torch.randn(tokens, 96), *random_routing(tokens, 4, 2))\n"
        "masks = [line for path in Path('/proc/self/task').glob('*/status')\n"
        "         for line in path.read_text().splitlines() if line.startswith('Cpus_allowed_list')]\n"
        "assert len(set(masks)) == 1, masks\n"
    )
    native_runtime().close()
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
