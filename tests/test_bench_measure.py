"""What bench.py counts, and how it takes turns. Never how fast."""

import pytest
import torch
from conftest import needs_triton

import bench_measure as measure
import bench_peers as peers
import ops_triton as ops


def test_traffic_counts_operands_and_results_once():
    stage, a, b = "x", torch.ones(10, 4), torch.ones(1, 4)
    with measure.Traffic(lambda: stage) as traffic:
        c = a.T.T + b.expand(10, 4)  # 160 + 16 -> 160; no view is copied
        stage = "y"
        c.add_(torch.empty(10, 4))  # 160 + 160 -> 160
        stage = "z"
        torch.stack([a, a])  # 2 x 160 -> 320
        stage = "backward"
    assert traffic.bytes == {"x": 336, "y": 480, "z": 640}
    for of, operation in {
        320: lambda: c.copy_(a),  # read one, write one
        160: lambda: (c.zero_(), torch.ops.aten._unsafe_view(c, [4, 10]), torch.empty_like(a)),
        161: lambda: torch.zeros_like(a, dtype=torch.float32).numel() and torch.zeros(1, dtype=torch.uint8),
        480: lambda: torch.sub(a, a, out=c),
        640: lambda: torch._foreach_mul_([a, c], 1.0),
    }.items():
        with measure.Traffic(lambda: "") as traffic:
            operation()
        assert traffic.bytes == {"": of}
    x, y = torch.ones(10, 4, requires_grad=True), torch.ones(10, 4)
    with measure.Traffic(lambda: "both") as traffic:
        (x * y).backward(y)  # 320 -> 160, and the gradient of x: 320 -> 160
    assert traffic.bytes == {"both": 960}


@needs_triton
def test_traffic_of_kernels(monkeypatch):
    xyz, launched = torch.rand(2, 50, 3), []
    launch = lambda kernel, *_, **__: launched.append(kernel)
    monkeypatch.setattr(ops, "_launch", launch)  # the interpreter itself would be counted
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with measure.Traffic(lambda: "") as traffic:
        ops.ball_query(xyz, xyz, 0.3, 4, impl="triton")
    planes = 4 * 2 * 3 * 256  # the points, padded: written by torch, read by the kernel
    assert traffic.bytes == {"": xyz.nbytes + 2 * planes + xyz.nbytes + 8 * 2 * 50 * 4}
    assert len(launched) == 1 and ops._launch is launch


@pytest.fixture
def meter():
    return measure.Meter(torch.device("cpu"), repeats=3)


def test_peers_may_take_their_own_way_only_while_the_clock_runs(meter):
    """Results are compared before; what a peer saves is what it saves while timed."""
    x = torch.ones(8, requires_grad=True)

    def ours(dtype):
        return [((x * 2.0) * (x * 2.0)).sum().detach()]

    def peer(dtype):
        wide = x.repeat(1 + meter.clock_runs) * 2.0
        return [(wide * wide).sum().detach()]

    meter.compare("op", "", ours, {"wider": peer}, peers.norms_differ, 1e-6)
    row = meter.lines[-1]
    assert row["same"] and row["error"] == 0 and row["peer_saved_mb"] == 64e-6 and len(row["peer_runs"]) == 3


def test_a_peer_that_does_not_fit_is_left_out(meter, capsys):
    def too_large(dtype):
        raise torch.OutOfMemoryError

    ours = lambda dtype: [torch.ones(2)]
    figures = meter.compare("op", "2", ours, {"large": too_large, "small": ours}, peers.norms_differ, 0)
    assert [line["peer"] for line in meter.lines] == ["small"] and list(figures) == ["ours", "small"]
    assert "\nop, 2, large: out of memory\n" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        meter.compare("op", "2", too_large, {"small": ours}, peers.norms_differ, 0)


def test_a_wrong_answer_is_said(meter, capsys):
    one, two = lambda _: [torch.ones(2)], lambda _: [torch.full((2,), 2.0)]
    meter.compare("op", "2", one, {"peer": two}, peers.norms_differ, 0.4)
    assert meter.lines[0]["error"] == 0.5 and meter.lines[0]["same"] is False
    assert "| NO: 5e-01 |" in capsys.readouterr().out


def test_stages_nest_and_add_up(meter, monkeypatch):
    """Time belongs to the innermost stage, and so does that of a function that a stage returns to be called later."""

    class Model:
        def encode(self):
            return self.wait()()

        def wait(self):
            return lambda: "found"

    now = iter(range(100))
    monkeypatch.setattr(measure, "stamp", lambda clock: float(next(now)))
    model, timeline = Model(), measure.Timeline(meter.clock)
    with timeline.watch({"encoder": [(model, "encode")], "matching": [(model, "wait")]}):
        timeline.enter("rest")
        assert model.encode() == "found"
        timeline.enter("end")
    # rest 0, encoder 1, matching 2, encoder 3, matching 4, encoder 5, rest 6, end 7
    assert timeline.read() == {"rest": 2e3, "encoder": 3e3, "matching": 2e3}
    assert "encode" not in vars(model)
