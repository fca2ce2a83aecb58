"""Methods with parts outside of the delegates: what they may hold, change and refuse."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from executorch.exir import to_edge
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)
from torch.export import Dim, export

from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import InputError, Method, Program, Runtime, State, UnsupportedError
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import device
from tests.partitioner.test_partitioner import CONFIG, load, lower


def method_of(module: torch.nn.Module, inputs: tuple[Any, ...], shapes: Any = None, whole: bool = True) -> Method:
    """A module's method; not `whole`: by the route on which caches that are outputs stay outside."""
    program = export(module.eval(), inputs, dynamic_shapes=shapes)
    if whole:
        return load(lower(program)).load_method("forward")
    edge = to_edge(program, compile_config=CONFIG).to_backend(WebGPUPartitioner())
    return load(edge.to_executorch()).load_method("forward")


class TwoCaches(torch.nn.Module):
    """A cache of 20 rows and a counter, then (with an operator without a kernel between) one of 10 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(1, 20, 1, 4))
        self.register_buffer("b", torch.zeros(1, 10, 1, 4))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start = position[0].item()
        torch.ops.llama.update_cache(x, self.a, start)
        self.calls.add_(1)
        y = torch.special.bessel_j0(x + self.a.sum() * 0)
        torch.ops.llama.update_cache(y, self.b, start)
        return self.a * 1, self.b * 1, self.calls * 1


def test_a_later_delegate_refuses_before_an_earlier_one_has_changed_its_state() -> None:
    x = torch.ones(1, 1, 1, 4)
    method = method_of(TwoCaches(), (x, torch.tensor([0])))
    assert len(method.delegates) == 2
    method.execute([x, torch.tensor([3])])
    before = method.device.counters.copy()
    for position in (15, 10, 20, -1, 2**40):  # fits none, the first cache only, no integer of the GPU
        with pytest.raises(InputError):
            method.execute([x, torch.tensor([position])])
    assert method.device.counters.copy().since(before).submits == 0
    a, b, calls = method.execute([x, torch.tensor([4])])
    assert calls.item() == 2
    for cache in (a, b):
        assert cache.abs().sum((0, 2, 3)).nonzero().flatten().tolist() == [3, 4]


class CountsOutside(torch.nn.Module):
    """A buffer that an operator outside changes before the delegate checks its position."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("cache", torch.zeros(1, 10, 1, 4))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls.add_(1)
        torch.ops.llama.update_cache(torch.special.bessel_j0(x), self.cache, position[0].item())
        return self.calls * 1, self.cache * 1


def test_a_buffer_outside_keeps_its_value_when_the_delegate_refuses() -> None:
    x = torch.ones(1, 1, 1, 4)
    method = method_of(CountsOutside(), (x, torch.tensor([0])))
    method.execute([x, torch.tensor([3])])
    with pytest.raises(InputError, match=r"start_pos position\[0\]: 10 is outside \[0, 9\]"):
        method.execute([x, torch.tensor([10])])
    assert method.execute([x, torch.tensor([4])])[0].item() == 2


def test_a_method_of_one_delegate_foresees_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Delegate] = []
    monkeypatch.setattr(Delegate, "rehearse", lambda self, *_: seen.append(self))
    method = method_of(torch.nn.Linear(4, 3), (torch.randn(2, 4),))
    method.execute([torch.randn(2, 4)])
    assert seen == []


class Numbered(torch.nn.Module):
    """The delegate's inputs are in another order than the method's, and one of them is computed outside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(9, 4)
        self.register_buffer("cache", torch.zeros(1, 20, 1, 4))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        torch.ops.llama.update_cache(torch.special.bessel_j0(x), self.cache, position.item())
        return self.table(ids) + self.cache[0, 0]


@pytest.mark.parametrize(
    ("ids", "position", "message"),
    [
        (9, 0, r"^input 1 \(ids\): token id .*: 9 is outside \[0, 8\]"),
        (0, 20, r"at start_pos position\[0\]: 20 is outside \[0, 19\]"),
        (2**40, 0, r"^input 1 \(ids\): values from 1099511627776"),
        (0, 2**40, r"^input 2 \(position\): values from 1099511627776"),
    ],
)
def test_messages_number_inputs_as_the_method_does(ids: int, position: int, message: str) -> None:
    x = torch.ones(1, 1, 1, 4)
    method = method_of(Numbered(), (x, torch.zeros(1, 1, dtype=torch.int64), torch.tensor(0)))
    (delegate,) = method.delegates
    assert [delegate.labels.of(i).partition(" ")[0] for i in range(3)].count("tensor") == 1
    with pytest.raises(InputError, match=message):
        method.execute([x, torch.tensor([[ids]]), torch.tensor(position)])


class Attends(torch.nn.Module):
    """Attention that stays outside because its cache is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(2, 8, 2, 4))
        self.register_buffer("v", torch.zeros(2, 8, 2, 4))

    def forward(self, q: torch.Tensor, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start = position[0].item()
        y = torch.ops.llama.sdpa_with_kv_cache(q, x, x, self.k, self.v, start, x.shape[1], None, 0.0, True)
        return y * 2, self.k


def test_a_kernel_of_executorch_runs_outside_with_sizes_below_the_bounds() -> None:
    def made(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, rows, 4, 4), torch.randn(2, rows, 2, 4)

    rows = {1: Dim("rows", min=1, max=7)}
    method = method_of(Attends(), (*made(4), torch.tensor([0])), (rows, rows, None), whole=False)
    assert "llama::sdpa_with_kv_cache.out" in method.outside()
    eager = Attends()
    for count, position in ((3, 0), (1, 3), (4, 4)):
        given = (*made(count), torch.tensor([position]))
        for found, wanted in zip(method.execute(list(given)), eager(*given), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


class Projects(torch.nn.Module):
    """As `Attends`, behind products: the delegate reads the position on the host alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.attention = torch.nn.Linear(8, 16), torch.nn.Linear(8, 8), Attends()

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, kv = self.q(x).view(*x.shape[:2], 4, 4), self.kv(x).view(*x.shape[:2], 2, 4)
        return self.attention(q, kv, position)


def test_a_position_that_no_kernel_reads_does_not_share_a_buffer_with_another_input() -> None:
    torch.manual_seed(0)
    module, x = Projects(), torch.randn(2, 3, 8)
    method = method_of(module, (x, torch.tensor([0, 7, 7])), whole=False)
    found = method.execute([x, torch.tensor([2, 7, 7])])
    for have, wanted in zip(found, module(x, torch.tensor([2, 7, 7])), strict=True):
        torch.testing.assert_close(have, wanted, atol=1e-5, rtol=1e-4)


class Turns(torch.nn.Module):
    """Rotation by complex numbers, one of them stored."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.reshape(4, 2)) * self.turns) * 2


def test_torch_holds_complex_tensors_between_operators_outside() -> None:
    module, x = Turns(), torch.randn(8)
    method = method_of(module, (x,))
    for _ in range(2):
        torch.testing.assert_close(method.execute([x])[0], module(x))
    assert method.execute([x.numpy()])[0].shape == (4, 2)


class GivesComplex(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x * 2)


def test_a_complex_output_is_refused_at_load_with_the_remedy() -> None:
    with pytest.raises(UnsupportedError, match=r"output 0 of method forward is of type COMPLEX64.*view_as_real"):
        method_of(GivesComplex(), (torch.randn(4, 2),))


class AddsToInput(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2


@pytest.mark.parametrize("as_torch", [True, False])
def test_an_input_that_an_operator_outside_changes_stays_as_it_was(as_torch: bool) -> None:
    method = method_of(AddsToInput(), (torch.ones(3),))
    assert "aten::copy_" in method.outside()
    x = torch.ones(3)
    outputs = method.execute([x if as_torch else x.numpy()])
    assert [float(output[0]) for output in outputs] == [2.0, 4.0]
    assert x.tolist() == [1.0, 1.0, 1.0]


class Branches(torch.nn.Module):
    """A branch between two delegates, on a bool tensor."""

    def forward(self, flag: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        found = torch.cond(flag, lambda t: t + 1, lambda t: t * 2.0, (torch.cos(x),))
        return torch.sin(found)


def test_a_branch_follows_a_tensor() -> None:
    module, x = Branches(), torch.randn(3)
    method = method_of(module, (torch.tensor(True), x))
    assert len(method.delegates) == 2
    for flag in (torch.tensor(True), torch.tensor(False)):
        torch.testing.assert_close(method.execute([flag, x])[0], module(flag, x))


@pytest.fixture
def stateful() -> Program:
    exported = lower(export(TwoCaches().eval(), (torch.ones(1, 1, 1, 4), torch.tensor([0]))))
    return Runtime(device("full")).load_program(bytes(exported.buffer))


def test_a_method_that_nobody_holds_frees_its_memory(stateful: Program) -> None:
    """In whatever thread that is noticed, while another one holds the device."""
    memory, inputs = device("full").memory, [torch.ones(1, 1, 1, 4), torch.tensor([3])]
    gc.collect()
    before = memory.by_purpose
    held = stateful.load_method()
    one = memory.by_purpose["state"] - before.get("state", 0)
    assert one > 0

    def use(shared: State) -> None:
        dropped = [stateful.load_method() for _ in range(3)] + [stateful.load_method(state=shared)]
        for method in dropped:
            method.execute(inputs)
        assert memory.by_purpose["state"] - before.get("state", 0) == 4 * one
        dropped.append(dropped)  # type: ignore[arg-type]  # a cycle: only the collector finds it

    use(held.state)
    with device("full").lock:
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert memory.by_purpose["state"] - before.get("state", 0) == one  # of the method that is held
    assert held.execute(inputs)[2].item() == 2  # the state that it lent is alive
    shared = held.state
    del held
    gc.collect()
    assert memory.by_purpose["state"] - before.get("state", 0) == one  # `shared` is held still
    del shared
    gc.collect()
    left = memory.by_purpose
    for purpose in ("state", "activations", "read-back"):
        assert left.get(purpose, 0) == before.get(purpose, 0)
    stateful.close()
    assert memory.by_purpose.get("weights", 0) == before.get("weights", 0)
