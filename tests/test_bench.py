"""The bench runs, its rows are there and add up, and ours gives the peers' answers. Never how fast: that is for an idle machine."""

import json
import statistics

import numpy as np
import pytest
import torch
from conftest import needs_gpu, needs_triton

import bench as benchmark
import data
import ops_triton as ops
import simipu

SMALL = ["--samples", 2, "--repeats", 2, "--threads", 1, "--num-points", 1024, "--places", 32, "--image-encoder", "resnet18", "--image-scale", 160, 64]
PEERS = {
    "farthest points": ["torch loop"],
    "farthest features": ["torch loop"],
    **{f"ball, {a} to {b} m": ["cdist, topk", "scipy k-d tree"] for a, b in ((0.0, 0.2), (0.2, 0.4), (0.4, 0.8))},
    "gather, maximum": ["gather, max"],
    "bilinear sampling": ["grid_sample"],
    **{f"set abstraction {i}": ["grouped"] for i in (1, 2, 3)},
    "all three": ["grouped"],
    "assignment": ["serial scipy"],
}


ON_GPU = pytest.param("cuda", marks=needs_gpu)


def bench(run_script, tmp_path, scenes, command, device, *more):
    """-> standard output, cells of its table rows, lines of its JSON."""
    done = run_script("bench.py", command, "--device", device, "--data-root", scenes, *SMALL, "--json", "rows.jsonl", *more)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("| ")]
    return done.stdout, cells, [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


def check(row):
    """Figures are positive, follow from each other, and belong to one answer."""
    assert row["same"] is True and row["error"] < 0.05
    for side in ("ours", "peer"):
        runs = row[f"{side}_runs"]
        assert len(runs) == 2 and min(runs) == row[f"{side}_min_ms"] > 0 and statistics.median(runs) == row[f"{side}_ms"]
    assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_ops(run_script, tmp_path, scenes, device):
    out, cells, (machine, *rows) = bench(run_script, tmp_path, scenes, "ops", device)
    assert "1024 points, 32 places, resnet18, images 160 x 64" in out and "torch" in machine["machine"]
    peers = {}
    for row in rows:
        check(row)
        peers.setdefault(row["op"], []).append(row["peer"])
    assert peers == {op: names if device == "cpu" else names[:1] for op, names in PEERS.items()}
    assert [(r[0], r[3]) for r in cells[1:]] == [(row["op"], row["peer"]) for row in rows]
    assert all(cell[-1] == "exact" or float(cell[-1]) < 0.01 for cell in cells[1:])
    by_op = {row["op"]: row for row in rows}
    if device == "cpu":
        assert all(by_op[op]["error"] == 0 for op in PEERS if op.startswith(("farthest points", "ball", "gather")))
    for op in PEERS:  # the memory of one side of a row, unlike its time, is the same on every machine
        saves = op in ("gather, maximum", "bilinear sampling", "all three") or op.startswith("set abstraction")
        assert (by_op[op]["peer_saved_mb"] > by_op[op]["ours_saved_mb"] > 0) if saves else by_op[op]["ours_saved_mb"] == 0
    stages = [by_op[f"set abstraction {i}"] for i in (1, 2, 3)]
    for side in ("ours", "peer"):
        assert by_op["all three"][f"{side}_saved_mb"] == pytest.approx(sum(s[f"{side}_saved_mb"] for s in stages))
        assert by_op["all three"][f"{side}_runs"] == pytest.approx([sum(t) for t in zip(*(s[f"{side}_runs"] for s in stages))])


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_step(run_script, tmp_path, scenes, device):
    out, _, (_, *rows) = bench(run_script, tmp_path, scenes, "step", device, "--preset", "demo")
    stages = {row["stage"]: row for row in rows if "stage" in row}
    assert list(stages) == [
        "waiting for data", "augment", "point encoder", "matching, not hidden", "image encoder", "heads, losses", "backward", "optimizers",
        "all", "decoding, one worker",
    ]  # fmt: skip
    assert all(row["ms"] > 0 for row in stages.values())
    parts = [row for stage, row in stages.items() if stage not in ("all", "decoding, one worker")]
    assert [sum(t) for t in zip(*(row["runs"] for row in parts))] == pytest.approx(stages["all"]["runs"])
    for figure in ("saved_mb", "moved_gb"):
        assert sum(row[figure] for row in parts) == pytest.approx(stages["all"][figure])
    unmoved = {"waiting for data", "matching, not hidden", "decoding, one worker"}
    assert {stage for stage, row in stages.items() if row["moved_gb"] < 1e-4} == unmoved
    assert stages["backward"]["moved_gb"] > stages["image encoder"]["moved_gb"] > stages["image encoder"]["saved_mb"] / 1e3  # what is saved was written
    assert {stage for stage, row in stages.items() if row["saved_mb"]} == {"point encoder", "image encoder", "heads, losses", "all"}
    pairs = [row for row in rows if "op" in row]
    assert [(row["op"], row["peer"]) for row in pairs] == [("step", "the usual"), ("step", "with known pairs"), ("matching by itself", "serial scipy")]
    for row in pairs:
        check(row)
    assert pairs[0]["ours_saved_mb"] == pytest.approx(stages["all"]["saved_mb"])
    assert pairs[0]["ours_saved_mb"] < pairs[0]["peer_saved_mb"]
    adds = [100 * (a / b - 1) for a, b in zip(pairs[1]["ours_runs"], pairs[1]["peer_runs"])]
    assert rows[-1]["matching_adds_percent"] == pytest.approx(statistics.median(adds)) and "matching adds" in out
    speed = {"ours": pairs[0]["ours_ms"], "with loading and augmentation": stages["all"]["ms"], "the usual": pairs[0]["peer_ms"]}
    (found,) = (row for row in rows if "images_per_s" in row)
    assert found["images_per_s"] == pytest.approx({name: 2e3 / ms for name, ms in speed.items()})
    per_gb = stages["all"]["of_roofline"] * stages["all"]["ms"] / stages["all"]["moved_gb"]
    moved = stages["all"]["moved_gb"] - stages["augment"]["moved_gb"]
    assert found["of_roofline"] == pytest.approx(moved * per_gb / pairs[0]["ours_ms"])


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_depth_step(run_script, tmp_path, scenes, device):
    arguments = ["--task", "depth", "--preset", "demo", "--device", device, "--data-root", scenes, "--samples", 2, "--repeats", 2, "--workers", 0]
    done = run_script("bench.py", "step", *arguments, "--json", "rows.jsonl")
    assert done.returncode == 0, done.stderr
    _, *rows = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    stages = {row["stage"]: row for row in rows if "stage" in row}
    assert list(stages) == ["waiting for data", "augment", "encoder", "decoder", "loss", "backward", "optimizers", "all", "decoding, one worker"]
    (pair,) = (row for row in rows if "op" in row)
    check(pair)
    assert pair["ours_saved_mb"] == pytest.approx(stages["all"]["saved_mb"]) and stages["decoder"]["saved_mb"] > 0
    assert rows[-1]["images_per_s"]["ours"] == pytest.approx(2e3 / pair["ours_ms"]) and "the toolbox's way" in rows[-1]["images_per_s"]


def test_traffic_counts_operands_and_results_once():
    stage, a, b = "x", torch.ones(10, 4), torch.ones(1, 4)
    with benchmark.Traffic(lambda: stage) as traffic:
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
        with benchmark.Traffic(lambda: "") as traffic:
            operation()
        assert traffic.bytes == {"": of}
    x, y = torch.ones(10, 4, requires_grad=True), torch.ones(10, 4)
    with benchmark.Traffic(lambda: "both") as traffic:
        (x * y).backward(y)  # 320 -> 160, and the gradient of x: 320 -> 160
    assert traffic.bytes == {"both": 960}


@needs_triton
def test_traffic_of_kernels(monkeypatch):
    xyz, launched = torch.rand(2, 50, 3), []
    monkeypatch.setattr(ops, "_launch", launch := lambda kernel, *_, **__: launched.append(kernel))  # the interpreter itself would be counted
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with benchmark.Traffic(lambda: "") as traffic:
        ops.ball_query(xyz, xyz, 0.3, 4, impl="triton")
    assert traffic.bytes == {"": 2 * xyz.nbytes + 8 * 2 * 50 * 4} and len(launched) == 1 and ops._launch is launch


def test_padding():
    c, sizes = simipu.PRESETS["kitti"][1], np.array([[1242, 375], [1224, 370], [1242, 375]])

    def pixels(boxes):
        whole, flip = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([False])
        resized = [data.image_affine(torch.tensor(size[None]), box, flip, whole)[1] for size, box in zip(sizes, boxes)]
        width, height = (-(-edge // 32) * 32 for edge in torch.cat(resized).amax(0).tolist())
        return width * height

    draws = [[data.random_image_scale(c.image_scale, step, i) for i in range(3)] for step in range(1000)]
    ratio = sum(pixels(boxes) for boxes in draws) / sum(pixels(boxes[:1] * 3) for boxes in draws)
    assert benchmark.padding(sizes, c) == pytest.approx(ratio, rel=1e-3) and ratio > 1.2
    assert benchmark.padding(sizes, simipu.PRESETS["demo"][1]) == benchmark.padding(sizes[:1], c) == 1


@pytest.fixture
def b(scenes):
    return benchmark.Bench(benchmark.Ops(data_root=str(scenes), preset="demo", repeats=3, threads=1, num_points=1024, places=32))


def test_peers_may_take_their_own_way_only_while_the_clock_runs(b):
    """Results are compared before; what a peer saves is what it saves while timed."""
    x = torch.ones(8, requires_grad=True)

    def peer(dtype):
        wide = x.repeat(1 + b.clock_runs) * 2.0
        return [(wide * wide).sum().detach()]

    b.compare("op", "", lambda dtype: [((x * 2.0) * (x * 2.0)).sum().detach()], {"wider": peer}, benchmark.norms_differ, 1e-6)
    row = b.lines[-1]
    assert row["same"] and row["error"] == 0 and row["peer_saved_mb"] == 64e-6 and len(row["peer_runs"]) == 3


def test_a_peer_that_does_not_fit_is_left_out(b, capsys):
    def too_large(dtype):
        raise torch.OutOfMemoryError

    ours = lambda dtype: [torch.ones(2)]
    b.compare("op", "2", ours, {"large": too_large, "small": ours}, benchmark.norms_differ, 0)
    assert [line["peer"] for line in b.lines if "op" in line] == ["small"] and "\nop, 2, large: out of memory\n" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        b.compare("op", "2", too_large, {"small": ours}, benchmark.norms_differ, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["step", "--task", "depth", "--places", 8], "error: --num-points, --places, --image-scale: of --task pretrain alone"),
        (["ops", "--data-root", "nowhere"], "error: nowhere: no such folder"),
        (["ops", "--samples", 99], "error: --samples 99: more than the 6 frames found"),
        (["ops", "--repeats", -1], "error: --repeats -1: cannot be negative"),
        (["step", "--json", "no/rows.jsonl"], "error: --json no/rows.jsonl: no such folder"),
    ],
)
def test_wrong_input_is_one_line(run_script, scenes, tmp_path, arguments, message):
    root = [] if "--data-root" in arguments else ["--data-root", scenes]
    done = run_script("bench.py", *arguments, *root)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.jsonl"))
