"""The bench runs, its rows are there and add up, and ours gives the peers' answers.

Never how fast: that is for an idle machine.
"""

import json
import statistics

import pytest
import torch
from conftest import needs_gpu
from test_finetune_det3d import C as SMALL_DETECTOR
from test_finetune_mono3d import C as SMALL_MONO

import bench as benchmark
import bench_measure
import bench_ops
import bench_peers
import encoders
import finetune_det3d
import finetune_mono3d

SMALL = "--samples 2 --repeats 2 --threads 1"
SIZES = "--num-points 1024 --places 32 --image-encoder resnet18 --image-scale 160 64"
PEERS = {
    "farthest points": ["torch loop"],
    "farthest features": ["torch loop"],
    "balls to 0.2, 0.4, 0.8 m": ["cdist, topk", "scipy k-d tree"],
    "gather, maximum": ["gather, max"],
    "bilinear sampling": ["grid_sample"],
    "set abstraction 1": ["grouped"],
    "set abstraction 2": ["grouped"],
    "set abstraction 3": ["grouped"],
    "all three": ["grouped"],
    "assignment": ["serial scipy"],
    "sparse tables": ["search per cell"],
    "sparse encoder": ["dense tables"],
    "forward, with tables": ["dense tables", *(["spconv"] if bench_peers.spconv else [])],
    "rotated overlap": ["polygon clipping"],
    "NMS": ["greedy", "greedy, polygons"],
    "deformable convolution": ["gather"],
}
SAVE = ("gather", "bilinear", "set abstraction", "all three", "sparse encoder", "deformable")
SAVING = [op for op in PEERS if op.startswith(SAVE)]
ONLY_CPU = {"scipy k-d tree", "spconv"}
ON_GPU = pytest.param("cuda", marks=needs_gpu)


@pytest.fixture
def bench(run_here, tmp_path, scenes, monkeypatch):
    """bench(command, device, flags) -> standard output, lines of the JSON. Few boxes, and a small detector."""
    monkeypatch.setattr(bench_ops, "BOXES", 100)
    monkeypatch.setitem(finetune_det3d.PRESETS, "demo", ("small", SMALL_DETECTOR))

    def run(command, device, flags):
        shared = ["--device", device, "--data-root", scenes, "--json", "rows.jsonl"]
        status, said, error = run_here(benchmark, command, *shared, *flags.split())
        assert status == 0, error
        return said, [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return run


def check(row):
    """Figures are positive, follow from each other, and belong to one answer."""
    assert row["same"] is True and row["error"] < 0.05
    for side in ("ours", "peer"):
        runs = row[f"{side}_runs"]
        assert len(runs) == 2
        assert min(runs) == row[f"{side}_min_ms"] > 0
        assert statistics.median(runs) == row[f"{side}_ms"]
    assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])


def sums_of_runs(rows, key="runs"):
    return pytest.approx([sum(times) for times in zip(*(row[key] for row in rows))])


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_ops(bench, device):
    out, (machine, *rows) = bench("ops", device, f"{SMALL} {SIZES} --preset demo")
    assert "1024 points, 32 places, resnet18, images 160 x 64" in out and "torch" in machine["machine"]
    peers = {}
    for row in rows:
        check(row)
        peers.setdefault(row["op"], []).append(row["peer"])
    there = lambda names: [name for name in names if device == "cpu" or name not in ONLY_CPU]
    assert peers == {op: there(names) for op, names in PEERS.items()}

    printed = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("| ")]
    printed = [[cell.strip() for cell in line] for line in printed[1:]]
    assert [(cells[0], cells[3]) for cells in printed] == [(row["op"], row["peer"]) for row in rows]
    assert all(cells[-1] == "exact" or float(cells[-1]) < 0.01 for cells in printed)

    by_op = {row["op"]: row for row in rows}
    if device == "cpu":
        exact = ("farthest points", "ball", "gather", "sparse tables")
        assert all(by_op[op]["error"] == 0 for op in PEERS if op.startswith(exact))
    for op, row in by_op.items():  # the memory of one side of a row, unlike its time, is the same on every machine
        if op in SAVING:
            assert row["peer_saved_mb"] > row["ours_saved_mb"] > 0
        else:
            assert row["ours_saved_mb"] == 0
    stages = [by_op[f"set abstraction {i}"] for i in (1, 2, 3)]
    whole = by_op["all three"]
    for side in ("ours", "peer"):
        assert whole[f"{side}_saved_mb"] == pytest.approx(sum(s[f"{side}_saved_mb"] for s in stages))
        assert whole[f"{side}_runs"] == sums_of_runs(stages, f"{side}_runs")


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_step(bench, device):
    out, (_, *rows) = bench("step", device, f"{SMALL} {SIZES} --preset demo")
    stages = {row["stage"]: row for row in rows if "stage" in row}
    inside = ["point encoder", "matching, not hidden", "image encoder", "heads, losses"]
    parts = ["waiting for data", "augment", *inside, "backward", "optimizers"]
    assert list(stages) == [*parts, "all", "decoding, one worker"]
    assert all(row["ms"] > 0 for row in stages.values())
    whole = stages["all"]
    assert sums_of_runs([stages[part] for part in parts]) == whole["runs"]
    for figure in ("saved_mb", "moved_gb"):
        assert sum(stages[part][figure] for part in parts) == pytest.approx(whole[figure])
    unmoved = {"waiting for data", "matching, not hidden", "decoding, one worker"}
    assert {stage for stage, row in stages.items() if row["moved_gb"] < 1e-4} == unmoved
    encoder = stages["image encoder"]
    assert stages["backward"]["moved_gb"] > encoder["moved_gb"] > encoder["saved_mb"] / 1e3  # what is saved was written
    saving = {"point encoder", "image encoder", "heads, losses", "all"}
    assert {stage for stage, row in stages.items() if row["saved_mb"]} == saving

    beside_usual, beside_known, alone = pairs = [row for row in rows if "op" in row]
    assert (beside_usual["op"], beside_usual["peer"]) == ("step", "the usual")
    assert (beside_known["op"], beside_known["peer"]) == ("step", "with known pairs")
    assert (alone["op"], alone["peer"]) == ("matching by itself", "serial scipy")
    for row in pairs:
        check(row)
    assert beside_usual["ours_saved_mb"] == pytest.approx(whole["saved_mb"])
    assert beside_usual["ours_saved_mb"] < beside_usual["peer_saved_mb"]
    adds = [100 * (a / b - 1) for a, b in zip(beside_known["ours_runs"], beside_known["peer_runs"])]
    assert rows[-1]["matching_adds_percent"] == pytest.approx(statistics.median(adds)) and "matching adds" in out
    by_itself = 100 * alone["ours_ms"] / beside_known["peer_ms"]
    assert rows[-1]["matching_by_itself_percent"] == pytest.approx(by_itself)

    (found,) = (row for row in rows if "images_per_s" in row)
    ms = {"ours": beside_usual["ours_ms"], "the usual": beside_usual["peer_ms"]}
    ms["with loading and augmentation"] = whole["ms"]
    assert found["images_per_s"] == pytest.approx({name: 2e3 / t for name, t in ms.items()})
    per_gb = whole["of_roofline"] * whole["ms"] / whole["moved_gb"]
    moved = whole["moved_gb"] - stages["augment"]["moved_gb"]
    assert found["of_roofline"] == pytest.approx(moved * per_gb / ms["ours"])


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_depth_step(bench, device):
    _, (_, *rows) = bench("step", device, f"{SMALL} --task depth --preset demo --workers 0")
    stages = {row["stage"]: row for row in rows if "stage" in row}
    parts = ["waiting for data", "augment", "encoder", "decoder", "loss", "backward", "optimizers"]
    assert list(stages) == [*parts, "all", "decoding, one worker"]
    (pair,) = (row for row in rows if "op" in row)
    check(pair)
    assert pair["ours_saved_mb"] == pytest.approx(stages["all"]["saved_mb"]) and stages["decoder"]["saved_mb"] > 0
    speed = rows[-1]["images_per_s"]
    assert speed["ours"] == pytest.approx(2e3 / pair["ours_ms"]) and "the toolbox's way" in speed


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_detection_step(bench, device):
    out, (machine, *rows) = bench("step", device, f"{SMALL} --task det3d --preset demo --workers 0 --busy")
    assert machine["busy"] and ("of computing time" in out) == (device == "cpu")
    stages = {row["stage"]: row for row in rows if "stage" in row}
    prepares = ["waiting for data", "augment", "images", "sparse tables"]
    forward = ["image encoder, pyramid", "points, voxels", "fusion", "fusion's sampling", "sparse encoder"]
    forward += ["BEV blocks, head", "targets", "losses"]
    assert list(stages) == [*prepares, *forward, "backward", "optimizers", "all", "decoding, one worker"]
    assert all(row["ms"] > 0 for row in stages.values())
    assert {stage for stage, row in stages.items() if row["saved_mb"]} == {*forward, "all"} - {"targets"}
    whole, parts = stages["all"], [*prepares, *forward, "backward", "optimizers"]
    assert sums_of_runs([stages[part] for part in parts]) == whole["runs"]

    step, selection = (row for row in rows if "op" in row)
    check(step)
    check(selection)
    assert (step["op"], step["peer"]) == ("step", "the usual")
    assert (selection["op"], selection["peer"]) == ("decoding, NMS", "greedy, polygons")
    assert step["error"] < 1e-3 and step["ours_saved_mb"] < step["peer_saved_mb"]
    assert step["ours_saved_mb"] == pytest.approx(whole["saved_mb"])
    per_gb = whole["of_roofline"] * whole["ms"] / whole["moved_gb"]
    moved = whole["moved_gb"] - sum(stages[stage]["moved_gb"] for stage in prepares)
    assert rows[-1]["of_roofline"] == pytest.approx(moved * per_gb / step["ours_ms"])


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
def test_mono3d_step(bench, device, monkeypatch):
    monkeypatch.setitem(finetune_mono3d.PRESETS, "demo", ("small", SMALL_MONO))
    _, (_, *rows) = bench("step", device, f"{SMALL} --task mono3d --preset demo --workers 0")
    stages = {row["stage"]: row for row in rows if "stage" in row}
    forward = ["image encoder, pyramid", "head", "deformable layers", "targets", "losses"]
    parts = ["waiting for data", "augment", *forward, "backward", "optimizers"]
    assert list(stages) == [*parts, "all", "decoding, one worker"]
    assert all(row["ms"] > 0 for row in stages.values())
    (pair,) = (row for row in rows if "op" in row)
    check(pair)
    assert (pair["op"], pair["peer"]) == ("step", "gather") and pair["error"] < 1e-3
    assert pair["ours_saved_mb"] == pytest.approx(stages["all"]["saved_mb"])
    assert pair["ours_saved_mb"] < pair["peer_saved_mb"]
    assert rows[-1]["images_per_s"]["gather"] == pytest.approx(2e3 / pair["peer_ms"])


@pytest.mark.parametrize("fits", [True, False])
def test_the_sum_of_set_abstractions_needs_all_of_them(monkeypatch, fits):
    def too_large(*_):
        raise torch.OutOfMemoryError

    if not fits:
        monkeypatch.setattr(bench_peers.Grouped, "forward", too_large)
    meter, xyz = bench_measure.Meter(torch.device("cpu"), repeats=1), torch.rand(2, 64, 3)
    modules = [encoders.SetAbstraction(2, (0.2, 0.4, 0.8), (4, 4, 4), ((8,), (8,), (8,)), False) for _ in range(2)]
    bench_ops.bench_set_abstractions(meter, modules, [(xyz, torch.rand(2, 64, 2), xyz[:, :16])] * 2)
    rows = ["set abstraction 1", "set abstraction 2", "all three"] if fits else []
    assert [line["op"] for line in meter.lines] == rows


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("step --task depth --places 0", "error: --places: not of --task depth"),
        ("step --task det3d --places 0 --num-points 9", "--num-points, --places: not of --task det3d"),
        ("step --task mono3d --places 0", "error: --places: not of --task mono3d"),
        ("ops --data-root nowhere", "nowhere: no such folder"),
        ("ops --samples 99", "--samples 99: more than the 6 frames found"),
        ("ops --repeats -1", "--repeats -1: cannot be negative"),
        ("ops --places 0", "--places 0: must be 1 or more"),
        ("step --json no/rows.jsonl", "--json no/rows.jsonl: no such folder"),
    ],
)
def test_wrong_input_is_one_line(run_here, scenes, tmp_path, arguments, message):
    arguments = arguments.split()
    if "--data-root" not in arguments:
        arguments += ["--data-root", scenes]
    status, said, error = run_here(benchmark, *arguments)
    assert (status, said) == (1, "")
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*.jsonl"))
