"""The allocator's events against hand-made cases; every expected number is done in the comments."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import torch
from torch import Tensor, nn

from fxhybrid.errors import InvalidArgument, ProfileError
from fxhybrid.profiling.allocator import measure_step, memory_rise, memory_rises

MIB = 1 << 20
SCALARS = 64  # a sum, its gradient, a Python number made a tensor (12 B): always below this


def mib(n: float) -> Tensor:
    return torch.empty(int(n * MIB), dtype=torch.uint8)


def staircase() -> Tensor:
    a = mib(1)  # 1
    b = mib(2)  # 1 + 2 = 3
    del a  # 2
    c = mib(4)  # 2 + 4 = 6, the peak
    del b  # 4
    d = mib(1.5)  # 5.5
    del d
    return c  # 4 retained


class TestMemoryRise:
    def test_peak_and_retained(self) -> None:
        rise = memory_rise(staircase)
        assert rise.peak_rise_bytes == 6 * MIB
        assert rise.retained_bytes == 4 * MIB
        assert isinstance(rise.result, Tensor)
        assert rise.result.nbytes == 4 * MIB

    def test_blocks_born_before_are_left_out(self) -> None:
        held = [mib(8)]

        def swap() -> None:
            held.clear()  # not ours: 0, not -8
            held.append(mib(3))

        rise = memory_rise(swap)
        assert (rise.peak_rise_bytes, rise.retained_bytes) == (3 * MIB, 3 * MIB)

    def test_address_used_in_an_earlier_recording(self) -> None:
        # The profiler still knows the first block as 4 MiB; it died unseen, and a smaller one mostly
        # gets its address. The free of that one must count as nothing, not as -4 MiB.
        for n_bytes in (4 * MIB - 4096, 4 * MIB - 64, 4 * MIB):
            address = memory_rise(lambda: mib(4)).result.data_ptr()
            held = [torch.empty(n_bytes, dtype=torch.uint8)]
            again = held[0].data_ptr() == address

            def free_then_allocate(held: list[Tensor] = held) -> Tensor:
                held.clear()
                return mib(2)

            rise = memory_rise(free_then_allocate)
            assert (rise.peak_rise_bytes, rise.retained_bytes) == (2 * MIB, 2 * MIB), again

    def test_views_and_in_place_ops_cost_nothing(self) -> None:
        x = torch.zeros(MIB)
        rise = memory_rise(lambda: x.view(2, -1).t().relu_())
        assert (rise.peak_rise_bytes, rise.retained_bytes) == (0, 0)

    def test_convolution_workspace_is_counted(self) -> None:
        # oneDNN reorders input, weight or output into its own layout and frees that again:
        # more than the output's 8 * 32 * 32 * 32 * 4 B = 1 MiB at the peak, exactly that after it.
        conv, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(8, 16, 32, 32)
        if not torch.backends.mkldnn.is_available():
            pytest.skip("no oneDNN on this processor")
        with torch.no_grad():
            rise = memory_rise(lambda: conv(x))
        assert rise.retained_bytes == MIB
        assert rise.peak_rise_bytes > MIB

    def test_backward_is_counted(self) -> None:
        # x * w, both 1 MiB and both needing gradients. Forward: output 1 MiB + its sum (4 B).
        # Backward: the sum's gradient is a scalar (4 B) expanded without a copy; two gradients of 1 MiB.
        x = torch.ones(MIB // 4, requires_grad=True)
        w = torch.ones(MIB // 4, requires_grad=True)
        rise = memory_rise(lambda: (x * w).sum().backward())
        assert rise.retained_bytes == 2 * MIB
        assert 0 <= rise.peak_rise_bytes - 2 * MIB <= MIB + 64

    def test_cycles_count_as_live(self) -> None:
        def cycle() -> None:
            knot: list[object] = [mib(1)]
            knot.append(knot)

        rise = memory_rise(lambda: [cycle() for _ in range(5)])
        assert rise.peak_rise_bytes == 5 * MIB
        assert gc.isenabled()

    def test_other_threads_are_not_seen(self) -> None:
        def in_thread() -> None:
            thread = threading.Thread(target=mib, args=(4,))
            thread.start()
            thread.join()

        assert memory_rise(in_thread).peak_rise_bytes == 0

    def test_error_of_the_call_stops_the_recording(self) -> None:
        with pytest.raises(ZeroDivisionError):
            memory_rise(lambda: 1 // 0)
        assert memory_rise(staircase).peak_rise_bytes == 6 * MIB

    def test_refuses_inside_a_profiler(self) -> None:
        with torch.profiler.profile(), pytest.raises(ProfileError, match="already running"):
            memory_rise(staircase)


class TestMemoryRises:
    def test_calls_are_told_apart(self) -> None:
        rises = memory_rises([staircase, lambda: mib(3), lambda: None, staircase])
        assert [rise.peak_rise_bytes for rise in rises] == [6 * MIB, 3 * MIB, 0, 6 * MIB]
        assert [rise.retained_bytes for rise in rises] == [4 * MIB, 3 * MIB, 0, 4 * MIB]
        assert all(rise.result is None for rise in rises)

    def test_blocks_of_an_earlier_call_are_left_out(self) -> None:
        held: list[Tensor] = []
        rises = memory_rises([lambda: held.append(mib(5)), held.clear, lambda: mib(1)])
        assert [rise.peak_rise_bytes for rise in rises] == [5 * MIB, 0, MIB]
        assert [rise.retained_bytes for rise in rises] == [5 * MIB, 0, MIB]

    def test_many_agree_with_one_by_one(self) -> None:
        fns = [lambda n=n: torch.ones(n, 64).softmax(-1) for n in range(1, 30)]
        assert memory_rises(fns) == [
            type(one)(one.peak_rise_bytes, one.retained_bytes) for one in map(memory_rise, fns)
        ]

    def test_none(self) -> None:
        assert memory_rises([]) == []


class TestMeasureStep:
    def test_fresh_gradients(self) -> None:
        # Base: w 2 MiB + x 1 MiB (once, though given twice) + the warm-up's gradient 2 MiB = 5 MiB.
        # Rise: zero_grad frees that gradient (-2), y = w * 3 appears (0), y's gradient is a scalar
        # expanded without a copy, w's new gradient appears while y still has its name (+2).
        w, x = nn.Parameter(torch.ones(MIB // 2)), torch.ones(MIB // 4)
        module = nn.ParameterList([w])

        def step() -> None:
            module.zero_grad()
            y = w * 3
            y.sum().backward()

        measured = measure_step(step, modules=[module], tensors=[x, x.view(-1, 1)])
        assert measured.base_bytes == 5 * MIB
        assert 0 <= measured.rise_bytes - 2 * MIB < SCALARS
        assert measured.peak_bytes == measured.base_bytes + measured.rise_bytes
        assert measured.seconds > 0
        assert measured.stray_bytes == 0

    def test_accumulation_makes_a_second_set(self) -> None:
        # The old gradient (2 MiB, in the base) stays while y (2 MiB) and the new one (2 MiB) appear.
        w = nn.Parameter(torch.ones(MIB // 2))

        def step() -> None:
            y = w * 3
            y.sum().backward()

        measured = measure_step(step, modules=nn.ParameterList([w]), repeats=0)
        assert measured.base_bytes == 4 * MIB
        assert 0 <= measured.rise_bytes - 4 * MIB < SCALARS
        assert math.isnan(measured.seconds)

    def test_base_counts_a_storage_once(self) -> None:
        # Tied weights of 1 MiB, a 4 B buffer, a momentum of 1 MiB, an input of 0.5 MiB in a dict.
        tied = nn.Linear(512, 512, bias=False)
        model = nn.Sequential(tied, nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512, affine=False))
        model[1].weight = tied.weight
        x = torch.randn(256, 512)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step() -> None:
            sgd.zero_grad()
            model(x).square().sum().backward()
            sgd.step()

        measured = measure_step(step, modules=[model], tensors={"x": x}, optimizer=sgd)
        statistics_bytes = 2 * 512 * 4 + 8  # running mean, running variance, num_batches_tracked (int64)
        assert measured.base_bytes == 3 * MIB + MIB // 2 + statistics_bytes

    def test_stray_bytes(self) -> None:
        kept: list[Tensor] = []

        def step() -> None:
            new = mib(3)
            kept[:] = [new]  # the last one dies after the new one came: rise 3, then back to 0

        measured = measure_step(step)
        assert (measured.base_bytes, measured.rise_bytes, measured.stray_bytes) == (0, 3 * MIB, 3 * MIB)

    def test_sparse_gradients(self) -> None:
        table = nn.Embedding(1000, 64, sparse=True)
        index = torch.arange(10)
        measured = measure_step(lambda: table(index).sum().backward(), modules=table, tensors=index)
        assert measured.base_bytes > table.weight.nbytes + index.nbytes

    def test_repeats_itself(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
        x = torch.randn(4, 3, 16, 16)
        readings = [
            measure_step(lambda: model(x).sum().backward(), modules=[model], tensors=x).peak_bytes for _ in range(3)
        ]
        assert len(set(readings)) == 1

    @pytest.mark.parametrize("repeats", [-1, True, 1.5])
    def test_bad_repeats(self, repeats: object) -> None:
        with pytest.raises(InvalidArgument, match="repeats"):
            measure_step(lambda: None, repeats=repeats)  # type: ignore[arg-type]

    def test_other_devices_are_refused(self) -> None:
        with pytest.raises(InvalidArgument, match="meta"):
            measure_step(lambda: None, tensors=torch.empty(2, device="meta"))


@pytest.mark.gpu
def test_cuda() -> None:
    def up_down() -> Tensor:
        a = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        b = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        del a
        return b

    rise = memory_rise(up_down, device="cuda")
    assert (rise.peak_rise_bytes, rise.retained_bytes) == (12 * MIB, 4 * MIB)
    assert [r.peak_rise_bytes for r in memory_rises([up_down] * 3, device="cuda")] == [12 * MIB] * 3

    w = nn.Parameter(torch.ones(MIB // 2, device="cuda"))
    measured = measure_step(lambda: (w * 3).sum().backward(), modules=nn.ParameterList([w]))
    assert measured.base_bytes == 4 * MIB
    assert 4 * MIB <= measured.rise_bytes <= 4 * MIB + 4096
