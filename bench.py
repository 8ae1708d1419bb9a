"""What it costs: every operation, and a training step, timed beside what a user would pick instead.

    python bench.py ops                          # full size on built-in scenes; 3 minutes on two idle CPU cores
    python bench.py step                         # where the time and memory of a step go; 7 minutes, 13 GB
    python bench.py step --preset demo           # the demo's sizes; half a minute
    python bench.py step --task depth            # a step of finetune_depth.py, likewise; 2 minutes
    python bench.py ops --data-root data/kitti --splits train --json ops.jsonl

On a GPU the same commands take 8 frames, time with CUDA events, and run as training does: Triton, bfloat16 autocast.
Clouds and images always come from a data set, never from a random generator: how dense a cloud is decides most of the
times.

How: the sides of a row run once each in float32, and their results are compared; once more to warm up; then they take
turns, A B B A. Times are medians, with the fastest run in brackets: the two far apart say that the machine was busy,
and then not even ratios hold. ratio is peer / ours. saved is what autograd keeps alive for the backward pass, weights
aside; peak, on GPUs, is what the allocator had to add to run a side. moved counts the bytes of every operation's
operands and results once, which no program that fuses nothing can do without; of roofline is the time they take at the
bandwidth of a large copy, measured in the same run, as a share of the stage's time; it may exceed 100 % where operands
stay in a cache. same is the error found: exact, or the norm of the difference relative to the peer's (see `differ` for
indices). A wrong answer ends the program with status 1.

The peers. ops: the torch loop that everybody writes for farthest points; ball query by cdist and topk, and by scipy's
k-d tree; set abstractions that group, then run Conv2d, BatchNorm2d and ReLU over (B, C, M, k); F.grid_sample, image by
image; scipy's assignment of full matrices, one after another. step: the same step with grouped set abstractions, serial
scipy, and grid_sample image by image; its farthest points and balls stay ours, since the usual code has compiled CUDA
operations for them. Where sizes are drawn, the usual code draws one for each image and pads the batch to the largest: a
second row has images that much larger. step --task depth: the same network in the toolbox's way, that is float32 (TF32
where a GPU has it), channels first, an unfused AdamW, a loss that indexes by a mask.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import copy
import functools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import data_depth
import eval as evaluate
import finetune_depth
import ops_triton as ops
import runtime
import simipu
from data import BadInput


@dataclass
class Options:
    data_root: str = "data/synthetic"
    """A folder in KITTI's layout. The default is the demo's scenes, which are written first if they are not there."""
    splits: tuple[str, ...] = ("train",)
    """Names of files in ImageSets/."""
    preset: Literal["kitti", "demo"] = "kitti"
    """Sizes of everything: the paper's with images of 1242 x 375, or those of `simipu.py demo`."""
    samples: int = 0
    """Frames in the batch, each in two views; of `step`, those of one forward pass, all each other's negatives. 0: 8 on
    a GPU, 2 on a CPU.
    """
    repeats: int = 0
    """Timed runs of each side. 0: 20 on a GPU, 3 on a CPU."""
    threads: int = 0
    """Threads of torch. 0: its own choice."""
    workers: int | None = None
    """Loading processes of `step`; 0 for none. By default as many as cores, up to 16, on a GPU, and 1 on a CPU."""
    num_points: int | None = None
    """Another number than the preset's; so the next three."""
    places: int | None = None
    image_encoder: str | None = None
    image_scale: tuple[int, int] | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    json: Path | None = None
    """Write all rows to this file too, one JSON object a line, with the time of every run."""


@dataclass
class Ops(Options):
    """Every operation, at the shapes that the encoders use it with, beside its peers."""


@dataclass
class Step(Options):
    """Time and memory of a training step by stage; then the whole step beside the usual way to write it."""

    task: Literal["pretrain", "depth"] = "pretrain"
    """simipu.py, or finetune_depth.py: with presets of the same names, crops of 704 x 352 or the demo's."""


# -----------------------------------------------------------------------------
# the peers


def fps_loop(points, m):
    B, N, _ = points.shape
    picks = torch.zeros(B, m, dtype=torch.long, device=points.device)
    nearest = torch.full((B, N), 1e10, device=points.device)
    pick, clouds = picks[:, 0], torch.arange(B, device=points.device)
    for i in range(m):
        picks[:, i] = pick
        distance = ((points - points[clouds, pick][:, None]) ** 2).sum(-1)
        nearest = torch.min(nearest, distance)
        pick = nearest.argmax(-1)
    return picks


def ball_topk(xyz, centers, radius, k, min_radius):
    N, out = xyz.shape[1], []
    for points, around in zip(xyz, centers):  # all clouds at once would take 16 bytes for every point and centre
        distance = torch.cdist(around, points, compute_mode="donot_use_mm_for_euclid_dist")  # (M, N)
        outside = (distance >= radius) | ((distance < min_radius) & (distance > 0))
        index = torch.arange(N, device=xyz.device).expand_as(distance).masked_fill(outside, N)
        index = index.topk(k, largest=False, sorted=True).values  # (M, k)
        out.append(torch.where(index == N, index[:, :1] % N, index))
    return torch.stack(out)


def ball_kdtree(xyz, centers, radius, k, min_radius):
    out = np.zeros((len(xyz), centers.shape[1], k), np.int64)
    for points, around, balls in zip(xyz.numpy(), centers.numpy(), out):
        found = cKDTree(points).query_ball_point(around, radius, return_sorted=True, workers=torch.get_num_threads())
        for center, hits, ball in zip(around, found, balls):
            if min_radius:
                distance = np.linalg.norm(points[hits] - center, axis=1)
                hits = np.array(hits)[(distance >= min_radius) | (distance == 0)]
            if len(hits):
                ball[:] = hits[0]
                ball[: len(hits)] = hits[:k]
    return torch.from_numpy(out)


def group(features, idx):
    """features (B, N, C), idx (B, M, k) -> (B, C, M, k)."""
    columns = features.transpose(1, 2)  # (B, C, N)
    return columns.gather(2, idx.flatten(1)[:, None].expand(-1, columns.shape[1], -1)).unflatten(2, idx.shape[1:])


class Grouped(nn.Module):
    """A set abstraction as PointNet++ draws it, on the weights of one of ours."""

    def __init__(self, sa):
        super().__init__()
        self.radii, self.neighbours = sa.radii, sa.neighbours
        self.mlps = nn.ModuleList(nn.Sequential(*(m for layer in mlp for m in (layer.conv, layer.bn, nn.ReLU(inplace=True)))) for mlp in sa.mlps)

    def forward(self, xyz, features, centers):
        out = []
        for mlp, radius, k, inner in zip(self.mlps, self.radii, self.neighbours, (0.0, *self.radii)):
            idx = ops.ball_query(xyz, centers, radius, k, inner)
            out.append(mlp(group(features, idx)).max(3).values.transpose(1, 2))
        return torch.cat(out, -1)


def grid_sample_per_image(feature_map, uv):
    size = uv.new_tensor([feature_map.shape[3] - 1, feature_map.shape[2] - 1])
    samples = [F.grid_sample(m[None].float(), (2 * p / size - 1)[None, None], align_corners=True)[0, :, 0].T for m, p in zip(feature_map, uv)]
    return torch.stack(samples).to(feature_map.dtype)  # (B, N, C)


def serial_scipy(alpha, beta, T, visible, method):
    """In place of simipu.match_in_background: full matrices, one after another, before anything else goes on."""
    partner, distance = [], []
    for a, b, t in zip(*(x.detach().cpu().double().numpy() for x in (alpha, beta, T))):
        cost = cdist(a @ t[:3, :3].T + t[:3, 3], b)
        rows, columns = linear_sum_assignment(cost)
        partner.append(torch.from_numpy(columns))
        distance.append(torch.from_numpy(cost[rows, columns] / np.cbrt(abs(np.linalg.det(t[:3, :3])))))
    result = torch.stack(partner).to(alpha.device), torch.stack(distance).to(alpha.device), visible.flatten().nonzero()[:, 0]
    return lambda: result


# -----------------------------------------------------------------------------
# are they the same answers? `differ` of a row: results of ours and of the peer -> error, 0 for exact


def picks_differ(points):
    """Rounding may break a tie otherwise, and all later picks follow from it. So where two orders part, both picks must
    be equally far from all before; how unequal they are is the error.
    """

    def differ(ours, peer):
        worst = 0.0
        for p, a, b in zip(points.double(), ours, peer):
            for i in (a != b).nonzero()[:1, 0].tolist():
                far = torch.cdist(p[torch.stack([a[i], b[i]])], p[a[:i]]).amin(1)
                worst = max(worst, 1e-9, abs(float(far[0] / far[1]) - 1))
        return worst

    return differ


def share_of_balls(ours, peer):
    """A point may lie on a radius to the last bit, and the peers do not round as we do."""
    return float((ours != peer).any(2).float().mean())


def norms_differ(ours, peer):
    """The worst of outputs and gradients."""
    return max(float((a - b).float().norm() / b.float().norm().clamp(min=1e-30)) for a, b in zip(ours, peer))


def costs_differ(ours, peer):
    """There are several optimal assignments, all of one total distance."""
    return norms_differ([ours[1].sum()], [peer[1].sum()])


# -----------------------------------------------------------------------------
# measuring

WIDTHS = {"op": 22, "shape": 30, "ours, ms": 15, "peer": 17, "peer, ms": 15, "ratio": 5, "same": 5, "stage": 22, "ms": 15, "share": 6, "saved, MB": 9}


class Bench:
    """A model, a batch, and tables that grow row by row."""

    def __init__(self, o):
        for flag in ("samples", "repeats", "threads", "workers"):
            if (getattr(o, flag) or 0) < 0:
                raise BadInput(f"--{flag} {getattr(o, flag)}: cannot be negative")
        if o.json and not o.json.parent.is_dir():
            raise BadInput(f"--json {o.json}: no such folder")
        if o.threads:
            torch.set_num_threads(o.threads)
        self.run = runtime.start_run(o.device)
        self.device, self.cuda = self.run.device, self.run.device.type == "cuda"
        torch.backends.cudnn.allow_tf32 = False  # what is compared in float32 should be float32
        self.dtype = torch.bfloat16 if self.cuda else torch.float32  # of activations while the clock runs, as in training
        self.repeats, self.json, self.table, self.lines = o.repeats or (20 if self.cuda else 3), o.json, Table(WIDTHS), []
        self.clock_runs = False  # until it does, peers must give the same results

        depth = isinstance(o, Step) and o.task == "depth"
        script, frames = (finetune_depth, data_depth.DepthFrames) if depth else (simipu, data.PretrainFrames)
        samples = o.samples or (8 if self.cuda else 2)
        workers = o.workers if o.workers is not None else min(os.cpu_count(), 16) if self.cuda else 1
        sizes = {f: getattr(o, f) for f in ("num_points", "places", "image_encoder", "image_scale") if getattr(o, f)}
        sizes["synthetic_frames"] = simipu.PRESETS["demo"][1].synthetic_frames if o.data_root == Options.data_root else 0
        if depth:
            scenes = sizes["synthetic_frames"] or Path(o.data_root, "training", "depth_2").is_dir()
            sizes["dataset"] = "scenes" if scenes else "kitti_lidar"
            if o.num_points or o.places or o.image_scale:
                raise BadInput("--num-points, --places, --image-scale: of --task pretrain alone")
        self.c = c = replace(
            script.PRESETS[o.preset][1], data_root=(o.data_root,), splits=o.splits, eval_splits=(),
            batch_size=samples, group=samples, workers=workers, **sizes,
        )  # fmt: skip
        script.check_config(c, 1)
        self.frames, _, _ = script.load_frames(c, self.run)
        if samples > len(self.frames):
            raise BadInput(f"--samples {samples}: more than the {len(self.frames)} frames found")

        self.box = None if depth else evaluate.image_box(c)
        self.dataset, start = frames(self.frames, c), time.perf_counter()
        raw = data.collate([self.dataset[(0, i)] for i in range(samples)])
        self.decode_ms = 1e3 * (time.perf_counter() - start)
        self.raw, self.batch = raw, self.augment(raw)
        self.model = (finetune_depth.DepthNet if depth else simipu.SimIPU)(c).to(self.device).train()
        self.weights = list(self.model.parameters())  # which autograd saves, too, but which are there anyway
        # not the points' layers: their peer's Conv2d would lose digits
        (self.model if depth else self.model.img_backbone).to(memory_format=torch.channels_last)

        triton = f", triton {metadata.version('triton')}" if ops.triton else ""
        machine = f"{torch.cuda.get_device_name() if self.cuda else cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}{triton}"
        height, width = self.batch["image"].shape[2:]
        points = "" if depth else f"{c.num_points} points, {c.places} places, "
        batch = f"{samples} frames of {o.data_root}: {points}{c.image_encoder}, images {width} x {height}"
        print(f"python bench.py {' '.join(sys.argv[1:])}\n{machine}\n{batch}\nmedian (fastest) of {self.repeats} runs", flush=True)
        self.lines.append({"machine": machine, "batch": batch, "repeats": self.repeats})

    def augment(self, raw):
        if isinstance(raw, BadInput):
            raise raw
        return data.augment(raw, self.box, self.device) if self.box else data_depth.augment(raw, data_depth.SCALE[self.c.dataset], self.device)

    def autocast(self, dtype):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def batch_for(self, dtype):
        """The batch; but where results are compared in float32, of which bfloat16 takes half the memory, eight of its
        frames.
        """
        return self.batch if dtype == self.dtype else {name: values[:8] for name, values in self.batch.items()}

    def trained(self, function, x, weights=()):
        """Forward and backward of function(x), as a side of a row."""
        inputs = {d: x.detach().to(d).requires_grad_(x.requires_grad) for d in (torch.float32, self.dtype)}

        def side(dtype):
            with self.autocast(dtype):
                out = function(inputs[dtype])
            wanted = [t for t in (inputs[dtype], *weights) if t.requires_grad]
            return out.detach(), *torch.autograd.grad(out, wanted, out.detach())

        return side

    def time(self, function):
        """-> milliseconds, and MB that the allocator had to add, on a GPU."""
        if not self.cuda:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start), None
        before, start, end = torch.cuda.memory_allocated(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / 1e6

    def compare(self, op, shape, ours, peers, differ, limit):
        """One row for each peer that fits into memory. A side is a function of the dtype that activations should have;
        `limit` is on the error.
        """
        sides, results, saved, peak = {"ours": ours}, {}, {}, {}
        for name, side in {**sides, **peers}.items():
            try:
                self.clock_runs = False
                results[name] = side(torch.float32)
                self.clock_runs = True
                with saved_for_backward(self.weights) as size:
                    side(self.dtype)  # which warms up
            except torch.OutOfMemoryError:
                if name == "ours":
                    raise
                print(f"\n{op}, {shape}, {name}: out of memory", flush=True)
                continue
            sides[name], saved[name] = side, size.total() / 1e6
        runs = {name: [] for name in sides}
        for i in range(self.repeats):
            for name, side in list(sides.items())[:: -1 if i % 2 else 1]:
                ms, peak[name] = self.time(lambda: side(self.dtype))
                runs[name].append(ms)
        figures = {"runs": runs, "saved_mb": saved} | ({"peak_mb": peak} if self.cuda else {})
        for peer in list(sides)[1:]:
            row = {f"{role}_{key}": figure[name] for role, name in (("ours", "ours"), ("peer", peer)) for key, figure in figures.items()}
            error = differ(results["ours"], results[peer])
            self.add({"op": op, "shape": shape, "peer": peer, "error": error, "same": error <= limit} | row)

    def add(self, row):
        """A row of `compare`: what follows from its runs, printed and kept."""
        for role in ("ours", "peer"):
            row |= {f"{role}_ms": statistics.median(row[f"{role}_runs"]), f"{role}_min_ms": min(row[f"{role}_runs"])}
        row["ratio"] = row["peer_ms"] / row["ours_ms"]
        cells = {"op": row["op"], "shape": row["shape"], "ours, ms": spread(row["ours_runs"]), "peer": row["peer"]}
        cells |= {"peer, ms": spread(row["peer_runs"]), "ratio": number(row["ratio"])}
        for kind in ("saved", "peak") if self.cuda else ("saved",):
            ours, peer = row[f"ours_{kind}_mb"], row[f"peer_{kind}_mb"]
            cells[f"{kind}, MB: ours / peer"] = f"{number(ours)} / {number(peer)}" if ours else ""
        error = f"{row['error']:.0e}" if row["error"] else "exact"
        self.table.print(cells | {"same": error if row["same"] else f"NO: {error}"})
        self.lines.append(row)

    def copy_gb_per_s(self):
        """What a copy far larger than the caches reads and writes: the memory's roofline."""
        source = torch.zeros(2**30 if self.cuda else 2**27, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return 2 * len(source) / min(self.time(lambda: target.copy_(source))[0] for _ in range(10)) / 1e6

    def write(self):
        if self.json:
            with data.disk_errors(self.json):
                self.json.write_text("".join(json.dumps(line) + "\n" for line in self.lines))


class Table:
    """Rows of cells as they come, columns of at least `widths` {name: characters}; new names of columns begin a new
    table.
    """

    def __init__(self, widths):
        self.widths, self.columns = widths, None

    def print(self, cells):
        width = {name: max(len(name), self.widths.get(name, 0)) for name in cells}
        if list(cells) != self.columns:
            self.columns = list(cells)
            print("\n| " + " | ".join(f"{name:{width[name]}}" for name in cells) + " |")
            print("|" + "|".join("-" * (width[name] + 2) for name in cells) + "|")
        print("| " + " | ".join(f"{text:{width[name]}}" for name, text in cells.items()) + " |", flush=True)


def number(x):
    return f"{x:.0f}" if x >= 99.5 else f"{x:.3g}"


def spread(runs):
    return f"{number(statistics.median(runs))} ({number(min(runs))})"


def cpu_name():
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    load = f" (load {os.getloadavg()[0]:.1f} before the start)" if hasattr(os, "getloadavg") else ""
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores{load}"


@contextlib.contextmanager
def saved_for_backward(weights, stage=lambda: "all"):
    """Yields a Counter: bytes that autograd keeps for the backward pass, by the stage that saved them; each storage
    once.
    """
    seen, size = {p.untyped_storage().data_ptr() for p in weights}, Counter()

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            size[stage()] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield size


class Traffic(TorchDispatchMode):
    """Counts, in `bytes` by stage, what operations read and write: each operand and each result once, whole, views and
    allocations free. Batch norm and convolution's backward pass read some operands twice, a gather reads only a part of
    one. On a CPU, where they are numpy's and scipy's, the point operations are not seen.
    """

    FREE = ("aten::_unsafe_view", "aten::empty", "aten::new_empty")  # besides the views that say so
    UNREAD = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_")  # the first operand

    def __init__(self, stage):
        super().__init__()
        self.stage, self.bytes = stage, Counter()

    def count(self, tensors):
        for t in tensors:
            if isinstance(t, torch.Tensor):
                self.bytes[self.stage()] += t.itemsize * math.prod(size for size, stride in zip(t.shape, t.stride()) if stride)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name, schema = kwargs or {}, function.name(), function._schema
        result = function(*args, **kwargs)
        if function.is_view or name.startswith(self.FREE):
            return result
        given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(schema.arguments)]
        written = [value for a, value in given if a.alias_info and a.alias_info.is_write]
        read = [value for a, value in given if not a.is_out][name.startswith(self.UNREAD) :]
        made = [value for r, value in zip(schema.returns, result if len(schema.returns) > 1 else [result]) if not r.alias_info]
        self.count(tree_leaves((read, written, made)))
        return result

    def __enter__(self):
        launch = ops._launch  # kernels are no operations of torch's
        self.kernels = patch.object(ops, "_launch", lambda kernel, grid, *args, **meta: (self.count(args), launch(kernel, grid, *args, **meta)))
        self.kernels.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.kernels.stop()
        return super().__exit__(*error)


class Timeline:
    """The stages of one step. They nest; time belongs to the innermost. Nothing waits for a GPU before `read`."""

    def __init__(self, device):
        self.cuda, self.stage, self.marks = device.type == "cuda", "", []

    def enter(self, stage):
        stamp = torch.cuda.Event(enable_timing=True) if self.cuda else time.perf_counter()
        if self.cuda:
            stamp.record()
        self.stage = stage
        self.marks.append((stage, stamp))

    def timed(self, stage, function):
        def wrapped(*args):
            outer = self.stage
            self.enter(stage)
            result = function(*args)
            self.enter(outer)
            return result

        return wrapped

    @contextlib.contextmanager
    def watch(self, stages):
        """The stages inside a model's forward, {name: module}, told from outside; and matching, wherever it is done."""
        match, name = simipu.match_in_background, "matching, not hidden"
        with contextlib.ExitStack() as patches:
            for stage, module in stages.items():
                patches.enter_context(patch.object(module, "forward", self.timed(stage, module.forward)))
            patches.enter_context(patch.object(simipu, "match_in_background", lambda *args: self.timed(name, self.timed(name, match)(*args))))
            yield

    def read(self):
        """Milliseconds by stage, a Counter."""
        total = Counter()
        for (stage, start), (_, end) in zip(self.marks, self.marks[1:]):
            total[stage] += start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
        return total


# -----------------------------------------------------------------------------
# python bench.py ops


def bench_ops(b):
    P, batch, encoder, image_encoder = b.c.places, b.batch, b.model.pts_backbone, b.model.img_backbone
    given = []  # to each set abstraction: xyz, features, centers
    hooks = [sa.register_forward_pre_hook(lambda _, args: given.append(args)) for sa in encoder.SA_modules]
    with torch.no_grad():
        places, _ = encoder(torch.cat([batch["alpha"], batch["beta"]]))
        feature_map = image_encoder(batch["image"])[-1].requires_grad_()
    for hook in hooks:
        hook.remove()

    # ============ indices ============
    (xyz, features, centers), (xyz1, features1, _), _ = given
    B, N, M = len(xyz), xyz.shape[1], centers.shape[1]
    ours, peer = lambda _: ops.furthest_point_sample(xyz, M), lambda _: fps_loop(xyz, M)
    b.compare("farthest points", f"{B} x {N} -> {M}", ours, {"torch loop": peer}, picks_differ(xyz), 1e-5)
    rows = torch.cat([xyz1, features1], 2)
    ours, peer = lambda _: ops.furthest_point_sample_features(xyz1, features1, P), lambda _: fps_loop(rows, P)
    b.compare("farthest features", f"{B} x {M} x {rows.shape[2]} -> {P}", ours, {"torch loop": peer}, picks_differ(rows), 1e-5)
    sa = encoder.SA_modules[0]
    peers = {"cdist, topk": ball_topk} if b.cuda else {"cdist, topk": ball_topk, "scipy k-d tree": ball_kdtree}
    for radius, k, inner in zip(sa.radii, sa.neighbours, (0.0, *sa.radii)):
        ball = lambda query: lambda _: query(xyz, centers, radius, k, inner)
        sides = ball(ops.ball_query), {name: ball(peer) for name, peer in peers.items()}
        b.compare(f"ball, {inner} to {radius} m", f"{B} x {M} of {N}, k = {k}", *sides, share_of_balls, 1e-3)

    # ============ forward and backward ============
    with torch.no_grad():
        features = sa.mlps[-1](features).requires_grad_()  # (B, N, 128)
    idx = ops.ball_query(xyz, centers, radius, k, inner)
    ours = b.trained(lambda f: ops.gather_max(f, idx), features)
    peer = b.trained(lambda f: group(f, idx).max(3).values.transpose(1, 2), features)
    b.compare("gather, maximum", f"{B} x {M} x {k}, {features.shape[2]} channels", ours, {"gather, max": peer}, norms_differ, 1e-5)

    uv, depth = data.project(places[: B // 2], batch["lidar2img"])
    at = lambda sample: b.trained(lambda f: sample(f, uv / image_encoder.stride), feature_map)
    shape = f"{B // 2} x {P} of {' x '.join(map(str, feature_map.shape[1:]))}"
    b.compare("bilinear sampling", shape, at(ops.bilinear_sample), {"grid_sample": at(grid_sample_per_image)}, norms_differ, 1e-4)

    parts = []
    for i, (sa, (xyz, features, centers)) in enumerate(zip(encoder.SA_modules, given)):
        # 1e-2: where two points share a maximum but for rounding, the gradient may go to the other
        form = lambda module: b.trained(lambda f: module(xyz, f, centers), features.requires_grad_(i > 0), list(sa.parameters()))
        with patch.object(ops, "ball_query", functools.cache(ops.ball_query)):  # found in the warm-up: timed by itself above
            b.compare(f"set abstraction {i + 1}", f"{B} x {xyz.shape[1]} -> {centers.shape[1]}", form(sa), {"grouped": form(Grouped(sa))}, norms_differ, 1e-2)
        parts.append(b.lines[-1])
    total = {k: [sum(t) for t in zip(*(p[k] for p in parts))] for k in ("ours_runs", "peer_runs")}
    total |= {k: sum(p[k] for p in parts) for k in ("ours_saved_mb", "peer_saved_mb")}
    total |= {k: max(p[k] for p in parts) for k in parts[0] if k == "error" or k.endswith("peak_mb")}
    b.add({"op": "all three", "shape": "", "peer": "grouped", "same": all(p["same"] for p in parts)} | total)

    # ============ matching ============
    visible = data.inside_image(uv, depth, batch["image"].shape[3], batch["image"].shape[2])
    solve = lambda match: lambda _: match(places[: B // 2], places[B // 2 :], batch["T"], visible, "hungarian")()
    b.compare("assignment", f"{B // 2} x {P} x {P}", solve(simipu.match_in_background), {"serial scipy": solve(serial_scipy)}, costs_differ, 1e-4)


# -----------------------------------------------------------------------------
# python bench.py step


def consecutive_steps(b, step, stages, modules, tail):
    """Steps as training runs them, from loading processes, as a table by stage: `stages` before and after those inside
    forward, {stage: module} of which are `modules`; what forward does besides belongs to `tail`. step(batch, dtype,
    enter).
    """
    c, roofline = b.c, b.copy_gb_per_s()
    print(f"{c.workers} loading processes; a copy moves {number(roofline)} GB/s")
    warm_up = 2  # the second still lives on frames that were loaded during the first
    batches = data.Batches(len(b.frames), c.batch_size, c.group, c.seed, steps=warm_up + b.repeats)
    stream, timelines = runtime.stream(b.dataset, batches, data.collate, c.workers, b.run), [Timeline(b.device) for _ in range(len(batches))]
    for timeline in timelines:
        with timeline.watch(modules):
            timeline.enter("waiting for data")
            raw = next(stream)
            timeline.enter("augment")
            step(b.augment(raw), b.dtype, timeline.enter)
    timeline = Timeline(b.device)
    with timeline.watch(modules), saved_for_backward(b.weights, lambda: timeline.stage) as saved, Traffic(lambda: timeline.stage) as traffic:
        timeline.enter("augment")
        step(b.augment(b.raw), b.dtype, timeline.enter)
    if b.cuda:
        torch.cuda.synchronize()
    steps = [timeline.read() for timeline in timelines[warm_up:]]
    whole = [s.total() for s in steps]

    def add(stage, runs, share, saved, moved):
        ms = statistics.median(runs)
        row = {"stage": stage, "ms": ms, "runs": runs, "saved_mb": saved / 1e6, "moved_gb": moved / 1e9, "of_roofline": moved / 1e6 / roofline / ms}
        cells = {"stage": stage, "ms": spread(runs), "share": share, "saved, MB": number(row["saved_mb"]) if saved else ""}
        b.table.print(cells | {"moved, GB": number(row["moved_gb"]) if moved else "", "of roofline": f"{row['of_roofline']:.1%}" if moved else ""})
        b.lines.append(row)

    for stage in ("waiting for data", "augment", *stages, tail, "backward", "optimizers"):
        runs = [s[stage] for s in steps]
        add(stage, runs, f"{statistics.median(runs) / statistics.median(whole):.1%}", saved[stage], traffic.bytes[stage])
    add("all", whole, "", saved.total(), traffic.bytes.total())
    add("decoding, one worker", [b.decode_ms], "", 0, 0)
    return roofline


def images_per_s(b, roofline, peers):
    """What the step comes to: ours, with loading, and the peers' that fitted into memory."""
    stages = {line["stage"]: line for line in b.lines if "stage" in line}
    steps = {line["peer"]: line for line in b.lines if line.get("op") == "step"}
    ms = {"ours": next(iter(steps.values()))["ours_ms"], "with loading and augmentation": stages["all"]["ms"]}
    ms |= {peer: steps[peer]["peer_ms"] for peer in peers if peer in steps}
    speed = {name: 1e3 * b.c.batch_size / t for name, t in ms.items()}
    share = 1e3 * (stages["all"]["moved_gb"] - stages["augment"]["moved_gb"]) / roofline / ms["ours"]
    print(f"\nimages/s: {', '.join(f'{name} {number(s)}' for name, s in speed.items())}; ours at {share:.1%} of the memory's roofline")
    b.lines.append({"images_per_s": speed, "of_roofline": share})


def frozen_step(b, model, optimizers, tail, clip=0.0):
    """step(batch, dtype, enter) -> loss, stats, of a model, with rates of 0: the same work, and every run is the same
    step.
    """
    for parameters in (g for o in optimizers for g in o.param_groups):
        parameters["lr"] = 0.0

    def step(batch, dtype, enter=lambda stage: None):
        enter(tail)  # and all in `forward` that no other stage claims
        with b.autocast(dtype):
            loss, stats = model(batch, False)
        enter("backward")
        loss.backward()
        enter("optimizers")
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        enter("end")
        return loss.detach(), stats

    return step


def padding(sizes, c):
    """How many times the pixels of one drawn size for all images a batch has whose images, (B, 2) (width, height), each
    draw their own and are padded to the largest: the mean over 1000 steps. 1 where nothing is drawn.
    """
    boxes = np.array([[data.random_image_scale(c.image_scale, i, j) for j in range(len(sizes))] for i in range(1000)])  # (1000, B, 2)
    pixels = []
    for box in (boxes, boxes[:, :1]):
        resized = (sizes * (box / sizes).min(2, keepdims=True)).round()  # (1000, B, 2)
        canvas = np.ceil(resized.max(1) / data.SIZE_DIVISOR) * data.SIZE_DIVISOR
        pixels.append(canvas.prod(1).mean())
    return pixels[0] / pixels[1]


def bench_step(b):
    model, c, tail = b.model, b.c, "heads, losses"
    whole_step = frozen_step(b, model, simipu.build_optimizers(model, c), tail)

    def step(*arguments):
        loss, stats = whole_step(*arguments)
        return loss, stats["match_m"]

    modules = {"point encoder": model.pts_backbone, "image encoder": model.img_backbone}
    roofline = consecutive_steps(b, step, ("point encoder", "matching, not hidden", "image encoder"), modules, tail)

    # ============ one batch: beside the usual step, and beside one that need not match ============
    match, seen, grouped = simipu.match_in_background, [], nn.ModuleList(Grouped(sa) for sa in model.pts_backbone.SA_modules)
    known = {}
    for dtype in (torch.float32, b.dtype):
        with patch.object(simipu, "match_in_background", lambda *args: seen.append(args) or match(*args)), torch.no_grad(), b.autocast(dtype):
            model(b.batch_for(dtype), False)
        known[dtype] = match(*seen[-1])()

    def usual_step(dtype, **changed):
        with (
            patch.object(model.pts_backbone, "SA_modules", grouped),
            patch.object(simipu, "match_in_background", serial_scipy),
            patch.object(ops, "bilinear_sample", grid_sample_per_image),
        ):
            return step(b.batch_for(dtype) | changed, dtype)

    usual, waste = {"the usual": usual_step}, padding(b.raw["size"].numpy(), c)
    if waste > 1:
        print(f"\nimages of their own sizes, padded to the largest of {c.batch_size}: {waste:.2f} times the pixels of one size for all")
        # below, where all pixels stay where they are; the few places that project there are visible, too
        image = F.pad(b.batch["image"], (0, 0, 0, round((waste - 1) * b.batch["image"].shape[2])))
        usual["the usual, padded"] = lambda dtype: usual_step(dtype, **({"image": image} if b.clock_runs else {}))

    def step_with_known_pairs(dtype):
        with patch.object(simipu, "match_in_background", lambda *_: lambda: known[dtype]):
            return step(b.batch_for(dtype), dtype)

    # .05: once rounding breaks a tie among the farthest features, other places follow; `ops` holds each part to its own
    # limit
    whole = "step", f"{c.batch_size} frames", lambda dtype: step(b.batch_for(dtype), dtype)
    b.compare(*whole, usual, norms_differ, 0.05)
    b.compare(*whole, {"with known pairs": step_with_known_pairs}, norms_differ, 0.05)
    with_matching = b.lines[-1]
    solve = lambda match: lambda _: match(*seen[-1])()
    b.compare("matching by itself", f"{c.batch_size} x {c.places} x {c.places}", solve(match), {"serial scipy": solve(serial_scipy)}, costs_differ, 1e-4)
    adds = [100 * (ours / peer - 1) for ours, peer in zip(with_matching["ours_runs"], with_matching["peer_runs"])]
    by_itself = 100 * b.lines[-1]["ours_ms"] / with_matching["peer_ms"]
    images_per_s(b, roofline, usual)
    print(f"\nmatching adds {statistics.median(adds):.1f} % to a step (runs: {min(adds):.1f} to {max(adds):.1f}); hidden by nothing it would add {by_itself:.1f} %")
    b.lines.append({"matching_adds_percent": statistics.median(adds), "matching_by_itself_percent": by_itself})


def bench_depth(b):
    model, c, tail = b.model, b.c, "loss"
    torch.backends.cudnn.benchmark = True  # as in training, ours and the toolbox's
    ours = frozen_step(b, model, [finetune_depth.build_optimizer(model, c)], tail, c.clip)
    roofline = consecutive_steps(b, ours, ("encoder", "decoder"), {"encoder": model.backbone, "decoder": model.decode_head}, tail)

    # ============ one batch: beside the toolbox's way ============
    other = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    b.weights += other.parameters()
    usual = frozen_step(b, other, [torch.optim.AdamW(other.parameters(), foreach=False)], tail, c.clip)

    def masked_loss(prediction, truth):
        known = truth > 0
        g = torch.log(prediction[known] + 1e-3) - torch.log(truth[known] + 1e-3)
        return torch.sqrt(g.var() + 0.15 * g.mean() ** 2)

    batch = b.batch | {"image": b.batch["image"].contiguous()}

    def usual_step(dtype):
        tf32 = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=b.clock_runs)
        with patch.object(finetune_depth, "sig_loss", masked_loss), tf32:
            return usual(batch, torch.float32)[:1]

    b.compare("step", f"{c.batch_size} images", lambda dtype: ours(b.batch, dtype)[:1], {"the toolbox's way": usual_step}, norms_differ, 1e-3)
    images_per_s(b, roofline, ["the toolbox's way"])


def main():
    def run(o):
        b = Bench(o)
        try:
            bench_ops(b) if isinstance(o, Ops) else bench_depth(b) if o.task == "depth" else bench_step(b)
        finally:  # minutes of a GPU are dear: what was measured is kept, whatever happened then
            b.write()
        wrong = [line["op"] for line in b.lines if not line.get("same", True)]
        if wrong:
            raise BadInput(f"ours and the peer differ: {', '.join(wrong)}")

    runtime.command_line(lambda: tyro.cli(Ops | Step), run)


if __name__ == "__main__":
    main()
