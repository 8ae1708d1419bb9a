"""What it costs: every operation and a training step, timed beside what a user would pick instead; every kernel.

    python bench.py ops                          # full size on built-in scenes; 3 minutes on two idle CPU cores
    python bench.py step                         # where the time and memory of a step go; 7 minutes, 13 GB
    python bench.py step --preset demo           # the demo's sizes; half a minute
    python bench.py step --task depth            # a step of finetune_depth.py, likewise; 2 minutes
    python bench.py ops --data-root data/kitti --splits train --json ops.jsonl
    python bench.py kernels                      # seconds; needs Triton, but no GPU, no driver and no data

`ops` and `step`. On a GPU the same commands take 8 frames, time with CUDA events, and run as training does: Triton,
bfloat16 autocast. Clouds and images always come from a data set, never from a random generator: how dense a cloud is
decides most of the times. bench_peers.py holds what ours is compared with.

A row has two sides. Each runs once in float32, and the results are compared; once more to warm up; then they take
turns, A B B A. A wrong answer ends the program with status 1. The columns:

    ms            the median, with the fastest run in brackets. The two far apart say that the machine was busy, and
                  then not even ratios hold.
    ratio         peer / ours
    saved         what autograd keeps alive for the backward pass, weights aside
    peak          on GPUs: what the allocator had to add to run a side
    same          the error found: exact, or the norm of the difference relative to the peer's (for indices see
                  bench_peers.py)
    moved         the bytes of every operation's operands and results, counted once, which no program that fuses nothing
                  can do without
    of roofline   the time that `moved` takes at the bandwidth of a large copy, measured in the same run, as a share of
                  the stage's time. It may exceed 100 % where operands stay in a cache.

`kernels` says what the compiler makes of every Triton kernel, on a laptop as on a GPU: they are compiled for Hopper
(sm_90) and not run. After a change to a kernel, before any time on a GPU: does it compile, how many registers does a
thread need, does it spill, how many warps can a multiprocessor hold. `fused` counts fused multiply-adds in the machine
code: they round once where torch rounds twice, and the sampling kernels' promise of equal indices everywhere holds only
without them.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import copy
import functools
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
import tyro
from torch import nn

import bench_peers as peers
import data
import data_depth
import encoders
import eval_match
import finetune_depth
import ops_triton as ops
import runtime
import simipu
from bench_measure import Meter, Table, Timeline, Traffic, number, saved_for_backward, spread
from files import BadInput
from loop import stream

triton = ops.triton  # None where it is not installed


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
    a GPU, 2 on a CPU."""
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


@dataclass
class Kernels:
    """Registers, spills and fused multiply-adds of every Triton kernel, compiled for Hopper and not run."""

    samples: int = 8
    """Frames in the batch, each in two views."""
    num_points: int = 16384
    places: int = 1024


# -----------------------------------------------------------------------------
# what it is measured on: a model, and a batch as training would make it


class Workload:
    """A model, and batches as its training would make them.

    about: its sizes in words. c: the training's config. dataset: what loading processes read. augment: a collated batch
    -> what the model reads, on the device. raw, batch: the first frames before and after that. decode_ms: what reading
    them took.
    """

    def __init__(self, about, c, dataset, augment, model):
        self.c, self.dataset, self.augment, self.model = c, dataset, augment, model.train()
        start = time.perf_counter()
        self.raw = data.collate([dataset[(0, i)] for i in range(c.batch_size)])
        self.decode_ms = 1e3 * (time.perf_counter() - start)
        if isinstance(self.raw, BadInput):
            raise self.raw
        self.batch = augment(self.raw)
        height, width = self.batch["image"].shape[2:]
        self.about = f"{c.batch_size} frames of {c.data_root[0]}: {about}, images {width} x {height}"


def check_options(o):
    for flag in ("samples", "repeats", "threads", "workers"):
        value = getattr(o, flag)
        if value is not None and value < 0:
            raise BadInput(f"--{flag} {value}: cannot be negative")
    if o.json and not o.json.parent.is_dir():
        raise BadInput(f"--json {o.json}: no such folder")


def changed_fields(o, cuda):
    """What differs from a preset, in either task: fields of its config."""
    samples = o.samples or (8 if cuda else 2)
    workers = o.workers
    if workers is None:
        workers = min(os.cpu_count(), 16) if cuda else 1
    fields = {"data_root": (o.data_root,), "splits": o.splits, "eval_splits": (), "workers": workers}
    fields |= {"batch_size": samples, "group": samples, "synthetic_frames": 0}
    if o.data_root == Options.data_root:
        fields["synthetic_frames"] = simipu.PRESETS["demo"][1].synthetic_frames
    for flag in ("num_points", "places", "image_encoder", "image_scale"):
        if getattr(o, flag) is not None:
            fields[flag] = getattr(o, flag)
    return fields


def checked_frames(script, c, run):
    script.check_config(c, 1)
    frames, _, _ = script.load_frames(c, run)
    if c.batch_size > len(frames):
        raise BadInput(f"--samples {c.batch_size}: more than the {len(frames)} frames found")
    return frames


def pretraining(o, run):
    """The Workload of simipu.py."""
    c = replace(simipu.PRESETS[o.preset][1], **changed_fields(o, run.device.type == "cuda"))
    frames = checked_frames(simipu, c, run)
    box = eval_match.image_box(c, frames[0].rig)
    model = simipu.SimIPU(c).to(run.device)
    # not the points' layers: their peer's Conv2d would lose digits
    model.img_backbone.to(memory_format=torch.channels_last)
    about = f"{c.num_points} points, {c.places} places, {c.image_encoder}"
    return Workload(about, c, data.PretrainFrames(frames, c), lambda raw: data.augment(raw, box, run.device), model)


def depth_training(o, run):
    """The Workload of finetune_depth.py."""
    if any(value is not None for value in (o.num_points, o.places, o.image_scale)):
        raise BadInput("--num-points, --places, --image-scale: of --task pretrain alone")
    fields = changed_fields(o, run.device.type == "cuda")
    scenes = fields["synthetic_frames"] or Path(o.data_root, "training", "depth_2").is_dir()
    fields["dataset"] = "scenes" if scenes else "lidar"
    c = replace(finetune_depth.PRESETS[o.preset][1], **fields)
    pairs = checked_frames(finetune_depth, c, run)
    scale = data_depth.SCALE[c.dataset]
    model = finetune_depth.DepthNet(c).to(run.device, memory_format=torch.channels_last)
    augment = lambda raw: data_depth.augment(raw, scale, run.device)
    return Workload(c.image_encoder, c, data_depth.DepthFrames(pairs, c), augment, model)


def about_machine(cuda):
    name = torch.cuda.get_device_name() if cuda else cpu_name()
    words = [name, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if triton:
        words.append(f"triton {triton.__version__}")
    return ", ".join(words)


def cpu_name():
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    load = f" (load {os.getloadavg()[0]:.1f} before the start)" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores{load}"


def print_command():
    print(f"python bench.py {' '.join(sys.argv[1:])}")


def matching(match, *question):
    """A side of a row: `match`, as simipu.match_in_background, asked and waited for."""
    return lambda dtype: match(*question)()


# -----------------------------------------------------------------------------
# python bench.py ops


def bench_ops(meter, work):
    """The encoders run once; every operation is measured on what it was given there."""
    batch, P = work.batch, work.c.places
    encoder, image_encoder = work.model.pts_backbone, work.model.img_backbone
    given = []  # to each set abstraction: xyz, features, centers
    hooks = [sa.register_forward_pre_hook(lambda _, args: given.append(args)) for sa in encoder.SA_modules]
    with torch.no_grad():
        places, _ = encoder(torch.cat([batch["alpha"], batch["beta"]]))
        feature_map = image_encoder(batch["image"])[-1].requires_grad_()
    for hook in hooks:
        hook.remove()
    alpha, beta = places.chunk(2)
    uv, depth = data.project(alpha, batch["lidar2img"])
    height, width = batch["image"].shape[2:]
    visible = data.inside_image(uv, depth, width, height)

    bench_farthest(meter, given, P)
    bench_balls(meter, encoder.SA_modules[0], *given[0])
    bench_sampling(meter, feature_map, encoders.cells(image_encoder, uv))
    bench_set_abstractions(meter, encoder.SA_modules, given)
    question = alpha, beta, batch["T"], visible, "hungarian"
    ours, usual = matching(simipu.match_in_background, *question), matching(peers.serial_scipy, *question)
    shape = f"{len(alpha)} x {P} x {P}"
    meter.compare("assignment", shape, ours, {"serial scipy": usual}, peers.costs_differ, 1e-4)


def bench_farthest(meter, given, places):
    (xyz, _, centers), (xyz1, features1, _), _ = given
    B, N, M = len(xyz), xyz.shape[1], centers.shape[1]
    ours = lambda _: ops.furthest_point_sample(xyz, M)
    usual = lambda _: peers.fps_loop(xyz, M)
    meter.compare("farthest points", f"{B} x {N} -> {M}", ours, {"torch loop": usual}, peers.picks_differ(xyz), 1e-5)

    rows = torch.cat([xyz1, features1], 2)
    ours = lambda _: ops.furthest_point_sample_features(xyz1, features1, places)
    usual = lambda _: peers.fps_loop(rows, places)
    shape = f"{B} x {M} x {rows.shape[2]} -> {places}"
    meter.compare("farthest features", shape, ours, {"torch loop": usual}, peers.picks_differ(rows), 1e-5)


def bench_balls(meter, sa, xyz, features, centers):
    """The three balls of a set abstraction, and the maximum over the largest of them."""
    clouds = f"{len(xyz)} x {centers.shape[1]}"
    queries = {"cdist, topk": peers.ball_topk}
    if not meter.cuda:
        queries["scipy k-d tree"] = peers.ball_kdtree

    def side(query, radius, k, inner):
        return lambda _: query(xyz, centers, radius, k, inner)

    for radius, k, inner in peers.shells(sa):
        ours = side(ops.ball_query, radius, k, inner)
        usual = {name: side(query, radius, k, inner) for name, query in queries.items()}
        shape = f"{clouds} of {xyz.shape[1]}, k = {k}"
        meter.compare(f"ball, {inner} to {radius} m", shape, ours, usual, peers.share_of_balls, 1e-3)

    radius, k, inner = peers.shells(sa)[-1]
    idx = ops.ball_query(xyz, centers, radius, k, inner)
    with torch.no_grad():
        features = sa.mlps[-1](features).requires_grad_()  # (B, N, 128)
    ours = meter.trained(lambda f: ops.gather_max(f, idx), features)
    usual = meter.trained(lambda f: peers.group_max(f, idx), features)
    shape = f"{clouds} x {k}, {features.shape[2]} channels"
    meter.compare("gather, maximum", shape, ours, {"gather, max": usual}, peers.norms_differ, 1e-5)


def bench_sampling(meter, feature_map, uv):
    ours = meter.trained(lambda f: ops.bilinear_sample(f, uv), feature_map)
    usual = meter.trained(lambda f: peers.grid_sample_per_image(f, uv), feature_map)
    shape = f"{len(uv)} x {uv.shape[1]} of {' x '.join(map(str, feature_map.shape[1:]))}"
    meter.compare("bilinear sampling", shape, ours, {"grid_sample": usual}, peers.norms_differ, 1e-4)


def bench_set_abstractions(meter, modules, given):
    stages = []
    for i, (sa, (xyz, features, centers)) in enumerate(zip(modules, given)):
        features.requires_grad_(i > 0)  # the first one's are reflectances
        stages.append(bench_set_abstraction(meter, f"set abstraction {i + 1}", sa, xyz, features, centers))
    if any("grouped" not in figures for figures in stages):
        return  # it did not fit into memory, and that was said
    rows = meter.lines[-len(stages) :]
    row = {"op": "all three", "shape": "", "peer": "grouped", "error": max(r["error"] for r in rows)}
    row["same"] = all(r["same"] for r in rows)
    ours, usual = (one_after_another([figures[name] for figures in stages]) for name in ("ours", "grouped"))
    meter.add(row, ours, usual)


def bench_set_abstraction(meter, name, sa, xyz, features, centers):
    def side(module):
        return meter.trained(lambda f: module(xyz, f, centers), features, list(sa.parameters()))

    ours, usual = side(sa), side(peers.Grouped(sa))
    shape = f"{len(xyz)} x {xyz.shape[1]} -> {centers.shape[1]}"
    # balls are found in the warm-up: they have rows of their own
    with patch.object(ops, "ball_query", functools.cache(ops.ball_query)):
        # 1e-2: where two points share a maximum but for rounding, the gradient may go to the other
        return meter.compare(name, shape, ours, {"grouped": usual}, peers.norms_differ, 1e-2)


def one_after_another(parts):
    """The figures of a side that consists of these parts, from theirs."""
    runs = [sum(times) for times in zip(*(p["runs"] for p in parts))]
    figures = {"runs": runs, "saved_mb": sum(p["saved_mb"] for p in parts)}
    if "peak_mb" in parts[0]:
        figures["peak_mb"] = max(p["peak_mb"] for p in parts)
    return figures


# -----------------------------------------------------------------------------
# python bench.py step


def frozen_step(meter, model, optimizers, tail, clip=0.0):
    """step(batch, dtype, enter) -> loss, stats, with rates of 0: the same work, and every run is the same step.

    What no other stage claims of a model's forward belongs to the stage `tail`.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0

    def step(batch, dtype, enter=lambda stage: None):
        enter(tail)
        with meter.autocast(dtype):
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


def timed_steps(meter, work, run, step, stages):
    """Consecutive steps as training runs them, fed by loading processes. -> of each, milliseconds by stage."""
    c = work.c
    warm_up = 2  # the second still lives on frames that were loaded during the first
    timelines = [Timeline(meter.cuda) for _ in range(warm_up + meter.repeats)]
    batches = data.Batches(len(work.dataset), c.batch_size, c.group, c.seed, steps=len(timelines))
    loaded = stream(work.dataset, batches, data.collate, c.workers, run)
    for timeline in timelines:
        with timeline.watch(stages):
            timeline.enter("waiting for data")
            raw = next(loaded)
            timeline.enter("augment")
            step(work.augment(raw), meter.dtype, timeline.enter)
    if meter.cuda:
        torch.cuda.synchronize()
    return [timeline.read() for timeline in timelines[warm_up:]]


def counted_step(meter, work, step, stages):
    """-> bytes by stage that a step saves for its backward pass, and that it moves. Counting takes time of its own."""
    timeline = Timeline(meter.cuda)
    stage = lambda: timeline.stage
    with timeline.watch(stages), saved_for_backward(meter.weights, stage) as saved, Traffic(stage) as traffic:
        timeline.enter("augment")
        step(work.augment(work.raw), meter.dtype, timeline.enter)
    return saved, traffic.bytes


def stage_table(meter, work, run, step, stages, tail):
    """Where time and memory of a step go. -> GB/s of a large copy, {stage: its row}.

    step: of `frozen_step`, with this tail. stages: those inside forward, as Timeline.watch has them.
    """
    roofline = meter.copy_gb_per_s()
    print(f"{work.c.workers} loading processes; a copy moves {number(roofline)} GB/s")
    steps = timed_steps(meter, work, run, step, stages)
    saved, moved = counted_step(meter, work, step, stages)
    whole = [times.total() for times in steps]
    rows = {}

    def add(stage, runs, share="", saved=0, moved=0):
        ms = statistics.median(runs)
        row = {"stage": stage, "ms": ms, "runs": runs, "saved_mb": saved / 1e6, "moved_gb": moved / 1e9}
        row["of_roofline"] = 1e3 * row["moved_gb"] / roofline / ms
        cells = {"stage": stage, "ms": spread(runs), "share": share}
        cells["saved, MB"] = number(row["saved_mb"]) if saved else ""
        cells["moved, GB"] = number(row["moved_gb"]) if moved else ""
        cells["of roofline"] = f"{row['of_roofline']:.1%}" if moved else ""
        meter.table.print(cells)
        meter.lines.append(row)
        rows[stage] = row

    for stage in ("waiting for data", "augment", *stages, tail, "backward", "optimizers"):
        runs = [times[stage] for times in steps]
        share = statistics.median(runs) / statistics.median(whole)
        add(stage, runs, f"{share:.1%}", saved[stage], moved[stage])
    add("all", whole, "", saved.total(), moved.total())
    add("decoding, one worker", [work.decode_ms])
    return roofline, rows


def images_per_s(meter, work, roofline, rows, figures):
    """What the step comes to: ours, with loading, and the peers' that fitted into memory.

    roofline, rows: of `stage_table`. figures: of Meter.compare, for a whole step beside the usual ones.
    """
    medians = {name: statistics.median(side["runs"]) for name, side in figures.items()}
    ms = {"ours": medians["ours"], "with loading and augmentation": rows["all"]["ms"]} | medians
    speed = {name: 1e3 * work.c.batch_size / t for name, t in ms.items()}
    moved = rows["all"]["moved_gb"] - rows["augment"]["moved_gb"]
    share = 1e3 * moved / roofline / ms["ours"]
    said = ", ".join(f"{name} {number(s)}" for name, s in speed.items())
    print(f"\nimages/s: {said}; ours at {share:.1%} of the memory's roofline")
    meter.lines.append({"images_per_s": speed, "of_roofline": share})


def bench_pretraining(meter, work, run):
    model, c, tail = work.model, work.c, "heads, losses"
    whole_step = frozen_step(meter, model, simipu.build_optimizers(model, c), tail)

    def step(*arguments):
        loss, stats = whole_step(*arguments)
        return loss, stats["match_m"]

    stages = {
        "point encoder": (model.pts_backbone, "forward"),
        "matching, not hidden": (simipu, "match_in_background"),
        "image encoder": (model.img_backbone, "forward"),
    }
    roofline, rows = stage_table(meter, work, run, step, stages, tail)

    # ============ one batch: beside the usual step, and beside one that need not match ============
    few = {name: values[:8] for name, values in work.batch.items()}
    batches = {torch.float32: few, meter.dtype: work.batch}  # float32, for comparing, takes twice bfloat16's memory
    match = simipu.match_in_background
    questions = asked_of_matching(meter, model, batches)
    known = {dtype: match(*question)() for dtype, question in questions.items()}
    usual = usual_steps(meter, work, step, batches)

    def step_with_known_pairs(dtype):
        with patch.object(simipu, "match_in_background", lambda *_: lambda: known[dtype]):
            return step(batches[dtype], dtype)

    whole = "step", f"{c.batch_size} frames", lambda dtype: step(batches[dtype], dtype)
    # .05: once rounding breaks a tie among the farthest features, other places follow; `ops` is stricter, part by part
    beside_usual = meter.compare(*whole, usual, peers.norms_differ, 0.05)
    beside_known = meter.compare(*whole, {"with known pairs": step_with_known_pairs}, peers.norms_differ, 0.05)
    ours, scipys = (matching(how, *questions[meter.dtype]) for how in (match, peers.serial_scipy))
    shape = f"{c.batch_size} x {c.places} x {c.places}"
    alone = meter.compare("matching by itself", shape, ours, {"serial scipy": scipys}, peers.costs_differ, 1e-4)
    images_per_s(meter, work, roofline, rows, beside_usual)
    what_matching_adds(meter, beside_known["ours"], beside_known["with known pairs"], alone["ours"])


def asked_of_matching(meter, model, batches):
    """What simipu.match_in_background is given in a step on each of the batches {dtype: batch}. -> {dtype: that}."""
    match, asked = simipu.match_in_background, []

    def remember(*arguments):
        asked.append(arguments)
        return match(*arguments)

    for dtype, batch in batches.items():
        with patch.object(simipu, "match_in_background", remember), torch.no_grad(), meter.autocast(dtype):
            model(batch, False)
    return dict(zip(batches, asked))


def usual_steps(meter, work, step, batches):
    """The usual step, and where image sizes are drawn the usual step on padded images. -> {name: side}."""
    encoder = work.model.pts_backbone
    grouped = nn.ModuleList(peers.Grouped(sa) for sa in encoder.SA_modules)

    def usual_step(batch, dtype):
        with (
            patch.object(encoder, "SA_modules", grouped),
            patch.object(simipu, "match_in_background", peers.serial_scipy),
            patch.object(ops, "bilinear_sample", peers.grid_sample_per_image),
        ):
            return step(batch, dtype)

    usual = {"the usual": lambda dtype: usual_step(batches[dtype], dtype)}
    waste = peers.padding(work.raw["size"].numpy(), work.c)
    if waste > 1:
        whose = f"images of their own sizes, padded to the largest of {work.c.batch_size}"
        print(f"\n{whose}: {waste:.2f} times the pixels of one size for all")
        # below, where all pixels stay where they are; the few places that project there are visible, too
        image = work.batch["image"]
        more_rows = round((waste - 1) * image.shape[2])
        padded = {**work.batch, "image": F.pad(image, (0, 0, 0, more_rows))}
        # results are compared on the batch that ours gets
        usual["the usual, padded"] = lambda dtype: usual_step(padded if meter.clock_runs else batches[dtype], dtype)
    return usual


def what_matching_adds(meter, matched, known, alone):
    """matched, known, alone: figures of a step, of one with known pairs, and of matching by itself."""
    adds = [100 * (more / less - 1) for more, less in zip(matched["runs"], known["runs"])]
    median = statistics.median(adds)
    by_itself = 100 * statistics.median(alone["runs"]) / statistics.median(known["runs"])
    runs = f"(runs: {min(adds):.1f} to {max(adds):.1f})"
    print(f"\nmatching adds {median:.1f} % to a step {runs}; hidden by nothing it would add {by_itself:.1f} %")
    meter.lines.append({"matching_adds_percent": median, "matching_by_itself_percent": by_itself})


def bench_depth(meter, work, run):
    model, c, tail = work.model, work.c, "loss"
    torch.backends.cudnn.benchmark = True  # as in training, ours and the toolbox's
    step = frozen_step(meter, model, [finetune_depth.build_optimizer(model, c)], tail, c.clip)
    stages = {"encoder": (model.backbone, "forward"), "decoder": (model.decode_head, "forward")}
    roofline, rows = stage_table(meter, work, run, step, stages, tail)

    # ============ one batch: beside the toolbox's way ============
    other = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    meter.weights += other.parameters()
    adamw = torch.optim.AdamW(other.parameters(), foreach=False)
    toolbox_step = frozen_step(meter, other, [adamw], tail, c.clip)
    batch = {**work.batch, "image": work.batch["image"].contiguous()}

    def usual_step(dtype):
        tf32 = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=meter.clock_runs)
        with patch.object(finetune_depth, "sig_loss", peers.masked_sig_loss), tf32:
            return toolbox_step(batch, torch.float32)[:1]

    our_step = lambda dtype: step(work.batch, dtype)[:1]
    usual, shape = {"the toolbox's way": usual_step}, f"{c.batch_size} images"
    figures = meter.compare("step", shape, our_step, usual, peers.norms_differ, 1e-3)
    images_per_s(meter, work, roofline, rows, figures)


# -----------------------------------------------------------------------------
# python bench.py kernels


class Hopper:
    """As much of a driver as Triton's compiler asks for."""

    get_current_target = staticmethod(lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: -1)  # kernels are kept by device: of no card that is there
    get_current_stream = staticmethod(lambda device: 0)


@contextlib.contextmanager
def launches():
    """Yields a list that fills with launches: (kernel's name, type of activations, constants, compiled kernel).

    In here Triton has Hopper's driver, operations take a GPU's way on tensors of any device, and kernels are compiled
    but not run.
    """
    launched = []
    run = triton.runtime.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **constants):
        half = any(isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 for t in args)
        compiled = run(kernel, *args, grid=grid, warmup=True, **constants)
        launched.append((kernel.__name__, "bfloat16" if half else "float32", constants, compiled))

    driver = triton.runtime.driver
    with (
        patch.dict(vars(driver)),  # as it was, at the end
        patch.object(triton.runtime.JITFunction, "run", compile_only),
        patch.object(ops, "_use_triton", lambda *_: True),
    ):
        driver.set_active(Hopper())
        yield launched


def launch_all(o):
    """The operations of a pre-training step, forward and backward, in bfloat16 and float32, on tensors without memory.

    Raises ValueError, an operation's, for sizes that cannot be.
    """
    tensor = functools.partial(torch.empty, device="meta")
    B, P = 2 * o.samples, o.places
    for n, m in ((o.num_points, 4 * P), (3 * P // 2, P // 2)):
        ops.furthest_point_sample(tensor(B, n, 3), m)
    ops.furthest_point_sample_features(tensor(B, 4 * P, 3), tensor(B, 4 * P, encoders.AGGREGATION[0]), P)
    sizes = (o.num_points, 4 * P), (4 * P, 2 * P), (2 * P, P)
    for (n, m), radii, neighbours, mlps in zip(sizes, encoders.RADII, encoders.NEIGHBOURS, encoders.MLPS):
        for radius, k, widths in zip(radii, neighbours, mlps):
            idx = ops.ball_query(tensor(B, n, 3), tensor(B, m, 3), radius, k)
            for dtype in (torch.bfloat16, torch.float32):
                features = tensor(B, n, widths[-1], dtype=dtype, requires_grad=True)
                ops.gather_max(features, idx).sum().backward()
    for dtype in (torch.bfloat16, torch.float32):
        feature_map = tensor(o.samples, 2048, 12, 39, dtype=dtype, memory_format=torch.channels_last).requires_grad_()
        ops.bilinear_sample(feature_map, tensor(o.samples, P, 2)).sum().backward()


def machine_code(compiled):
    """-> a thread's registers, its bytes in memory for want of registers, the kernel's fused multiply-adds.

    They are cuobjdump's, from Triton's package.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK"))
    return registers, stack, len(re.findall(r"\bFFMA\b", said))


def resident_warps(warps, registers, shared):
    """How many warps a multiprocessor of Hopper holds, of programs of `warps` warps and `shared` bytes.

    It has 64 K registers, given to warps by the 256; 228 KB of shared memory, 1 KB of each program's lost; 64 warps, 32
    programs.
    """
    per_warp = 256 * math.ceil(32 * registers / 256)
    programs = min(65536 // (warps * per_warp), 228 * 1024 // (shared + 1024), 64 // warps, 32)
    return warps * programs


def bench_kernels(o):
    if triton is None:
        raise BadInput("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BadInput("TRITON_INTERPRET=1: kernels would be interpreted, not compiled")
    runtime.check_range(o, "samples num_points places", 1, 1e30, "above 0")
    print_command()
    sizes = f"{o.samples} frames, {o.num_points} points, {o.places} places"
    print(f"triton {triton.__version__} for sm_90; {sizes}")
    with launches() as launched:
        try:
            launch_all(o)
        except ValueError as error:
            raise BadInput(str(error)) from None
    table, rows = Table(), []
    for name, activations, constants, compiled in launched:
        registers, stack, fused = machine_code(compiled)
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        blocks = [str(v) for constant, v in constants.items() if constant.isupper() and not isinstance(v, bool)]
        row = {
            "kernel": name.strip("_"),
            "type": activations,
            "blocks": " ".join(blocks),
            "warps": str(warps),
            "registers": str(registers),
            "stack, bytes": str(stack),
            "shared, bytes": str(shared),
            "resident warps": f"{resident_warps(warps, registers, shared)} of 64",
            "fused": str(fused),
        }
        if row not in rows:
            rows.append(row)
            table.print(row)


# -----------------------------------------------------------------------------
# the front door


def bench(o):
    if isinstance(o, Kernels):
        bench_kernels(o)
    else:
        bench_beside_peers(o)


def bench_beside_peers(o):
    """`ops` and `step`."""
    check_options(o)
    if o.threads:
        torch.set_num_threads(o.threads)
    torch.backends.cudnn.allow_tf32 = False  # what is compared in float32 should be float32
    run = runtime.start_run(o.device)
    cuda = run.device.type == "cuda"
    depth = isinstance(o, Step) and o.task == "depth"
    work = depth_training(o, run) if depth else pretraining(o, run)
    meter = Meter(run.device, o.repeats or (20 if cuda else 3))
    meter.weights += work.model.parameters()

    machine = about_machine(cuda)
    print_command()
    print(f"{machine}\n{work.about}\nmedian (fastest) of {meter.repeats} runs", flush=True)
    meter.lines.append({"machine": machine, "batch": work.about, "repeats": meter.repeats})
    try:
        if isinstance(o, Ops):
            bench_ops(meter, work)
        elif depth:
            bench_depth(meter, work, run)
        else:
            bench_pretraining(meter, work, run)
    finally:  # minutes of a GPU are dear: what was measured is kept, whatever happened then
        if o.json:
            meter.write(o.json)
    wrong = [line["op"] for line in meter.lines if not line.get("same", True)]
    if wrong:
        raise BadInput(f"ours and the peer differ: {', '.join(wrong)}")


def main():
    runtime.command_line(lambda: tyro.cli(Ops | Step | Kernels), bench)


if __name__ == "__main__":
    main()
