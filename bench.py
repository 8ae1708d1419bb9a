"""What it costs: every operation and a training step, timed beside what a user would pick instead; every kernel.

    python bench.py ops                          # full size on built-in scenes; 4 minutes on two idle CPU cores
    python bench.py step                         # where the time and memory of a step go; 7 minutes, 13 GB
    python bench.py step --preset demo           # the demo's sizes; half a minute
    python bench.py step --task depth            # a step of finetune_depth.py, likewise; 2 minutes
    python bench.py step --task det3d            # a step of finetune_det3d.py, likewise; 5 minutes
    python bench.py step --task mono3d           # a step of finetune_mono3d.py, likewise
    python bench.py ops --data-root data/kitti --splits train --json ops.jsonl
    python bench.py kernels                      # seconds; needs Triton, but no GPU, no driver and no data

`ops` and `step`. On a GPU the same commands take 8 frames, time with CUDA events, and run as training does: Triton,
bfloat16 autocast. Clouds and images always come from a data set, never from a random generator: how dense a cloud is
decides most of the times. Rows of `ops` are in bench_ops.py, tasks of `step` in bench_step.py; bench_peers.py holds
what ours is compared with.

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
import functools
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import tyro

import bench_ops
import bench_step
import data
import data_depth
import data_det3d
import data_mono3d
import encoders
import eval_boxes
import eval_match
import finetune_depth
import finetune_det3d
import finetune_mono3d
import ops_sparse
import ops_triton as ops
import runtime
import simipu
from bench_measure import Meter, Table
from files import BadInput

triton = ops.triton  # None where it is not installed


OBJECT_FRAMES = 64  # whose objects are pasted in detection's training: reading all of KITTI's takes minutes


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
    busy: bool = False
    """On a CPU that others use, too: the time that this process computes, not that of the clock. With --threads 1, for
    all threads' times add up; those of loading processes are not in it."""
    json: Path | None = None
    """Write all rows to this file too, one JSON object a line, with the time of every run."""


@dataclass
class Ops(Options):
    """Every operation, at the shapes that the encoders use it with, beside its peers."""


@dataclass
class Step(Options):
    """Time and memory of a training step by stage; then the whole step beside the usual way to write it."""

    task: Literal["pretrain", "depth", "det3d", "mono3d"] = "pretrain"
    """simipu.py, finetune_depth.py, finetune_det3d.py or finetune_mono3d.py: with presets of the same names. Depth's
    crops are 704 x 352 or the demo's, detection's images 1280 x 384 on the full grid or the demo's. mono3d has its
    deformable convolutions in the demo's sizes, too."""


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

    about: its sizes in words. c: the training's config. dataset, collate: what loading processes read, and how they
    make a batch of it. augment: a collated batch -> what the model reads, on the device. prepares: its stages, as
    Timeline.watch has them. raw, batch: the first frames before and after that.
    """

    def __init__(self, about, c, dataset, augment, model, collate=data.collate, prepares=None):
        self.c, self.dataset, self.augment, self.model = c, dataset, augment, model.train()
        self.collate, self.prepares = collate, prepares or {}
        self.raw = self.read()
        if isinstance(self.raw, BadInput):
            raise self.raw
        self.batch = augment(self.raw)
        height, width = self.batch["image"].shape[2:]
        self.about = f"{c.batch_size} frames of {c.data_root[0]}: {about}, images {width} x {height}"

    def read(self):
        """The first frames, as a loading process reads them."""
        return self.collate([self.dataset[(0, i)] for i in range(self.c.batch_size)])


def check_options(o):
    for flag in ("samples", "repeats", "threads", "workers"):
        value = getattr(o, flag)
        if value is not None and value < 0:
            raise BadInput(f"--{flag} {value}: cannot be negative")
    if o.json and not o.json.parent.is_dir():
        raise BadInput(f"--json {o.json}: no such folder")


def changed_fields(o, cuda):
    """What differs from a preset, in every task: fields of its config."""
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


def refuse(o, *flags):
    """Raises BadInput where one of these was given to a task that has no such size."""
    given = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(o, flag) is not None]
    if given:
        raise BadInput(f"{', '.join(given)}: not of --task {o.task}")


def pretraining(o, run, scratch):
    """The Workload of simipu.py."""
    c = replace(simipu.PRESETS[o.preset][1], **changed_fields(o, run.device.type == "cuda"))
    frames = checked_frames(simipu, c, run)
    box = eval_match.image_box(c, frames[0].rig)
    model = simipu.SimIPU(c).to(run.device)
    # not the points' layers: their peer's Conv2d would lose digits
    model.img_backbone.to(memory_format=torch.channels_last)
    about = f"{c.num_points} points, {c.places} places, {c.image_encoder}"
    return Workload(about, c, data.PretrainFrames(frames, c), lambda raw: data.augment(raw, box, run.device), model)


def depth_training(o, run, scratch):
    """The Workload of finetune_depth.py."""
    refuse(o, "num_points", "places", "image_scale")
    fields = changed_fields(o, run.device.type == "cuda")
    scenes = fields["synthetic_frames"] or Path(o.data_root, "training", "depth_2").is_dir()
    fields["dataset"] = "scenes" if scenes else "lidar"
    c = replace(finetune_depth.PRESETS[o.preset][1], **fields)
    pairs = checked_frames(finetune_depth, c, run)
    scale = data_depth.SCALE[c.dataset]
    model = finetune_depth.DepthNet(c).to(run.device, memory_format=torch.channels_last)
    augment = lambda raw: data_depth.augment(raw, scale, run.device)
    return Workload(c.image_encoder, c, data_depth.DepthFrames(pairs, c), augment, model)


def detection_training(o, run, scratch):
    """The Workload of finetune_det3d.py. The objects that are pasted come from a few frames, and lie in `scratch`."""
    refuse(o, "num_points", "places")
    c = replace(finetune_det3d.PRESETS[o.preset][1], **changed_fields(o, run.device.type == "cuda"))
    frames = checked_frames(finetune_det3d, c, run)
    bank = data_det3d.open_bank(data.evenly_spread(frames, OBJECT_FRAMES), scratch, c.keep_rows, run)
    model = finetune_det3d.Detector(c).to(run.device)
    layout, box = model.layout, eval_boxes.judging_box(c)
    augment = lambda raw: data_det3d.augment(raw, box, layout, run.device)
    rows = [(ops_sparse.Table.__dict__[name], "func") for name in ("pairs", "input_rows", "output_rows")]
    prepares = {
        "images": [(data, "warp_images")],
        "sparse tables": [(ops_sparse, "pyramid"), *rows],  # rows are made when a layer first asks for them
    }
    dataset = data_det3d.DetectionFrames(frames, c, layout, bank)
    collate = functools.partial(data_det3d.collate, layout)
    about = f"{c.image_encoder}, voxels {' x '.join(str(n) for n in layout.grid.shape)}"
    return Workload(about, c, dataset, augment, model, collate, prepares)


def mono3d_training(o, run, scratch):
    """The Workload of finetune_mono3d.py."""
    refuse(o, "num_points", "places")
    fields = changed_fields(o, run.device.type == "cuda") | {"deformable": True}
    c = replace(finetune_mono3d.PRESETS[o.preset][1], **fields)
    frames = checked_frames(finetune_mono3d, c, run)
    model = finetune_mono3d.FCOS3D(c).to(run.device)
    augment = lambda raw: data_mono3d.augment(raw, c.image_scale, run.device)
    dataset = data_mono3d.MonoFrames(frames, c)
    return Workload(c.image_encoder, c, dataset, augment, model, data_mono3d.collate)


TASKS = {  # of `step`: what makes the workload, what measures its step
    "pretrain": (pretraining, bench_step.bench_pretraining),
    "depth": (depth_training, bench_step.bench_depth),
    "det3d": (detection_training, bench_step.bench_detection),
    "mono3d": (mono3d_training, bench_step.bench_mono3d),
}


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

    In here Triton has Hopper's driver and an H100's 132 multiprocessors, operations take a GPU's way on tensors of any
    device, and kernels are compiled but not run.
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
        patch.object(ops, "_multiprocessors", lambda device: 132),
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
        balls = ops.ball_shells(tensor(B, n, 3), tensor(B, m, 3), radii, neighbours)
        for idx, widths in zip(balls, mlps):
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
        with tempfile.TemporaryDirectory() as scratch:
            bench_beside_peers(o, Path(scratch))


def bench_beside_peers(o, scratch):
    """`ops` and `step`. scratch: an empty folder."""
    check_options(o)
    if o.threads:
        torch.set_num_threads(o.threads)
    torch.backends.cudnn.allow_tf32 = False  # what is compared in float32 should be float32
    run = runtime.start_run(o.device)
    cuda = run.device.type == "cuda"
    make, measure_step = TASKS[o.task if isinstance(o, Step) else "pretrain"]
    work = make(o, run, scratch)
    meter = Meter(run.device, o.repeats or (20 if cuda else 3), time.process_time if o.busy else time.perf_counter)
    meter.weights += work.model.parameters()

    machine = about_machine(cuda)
    print_command()
    clock = " of computing time" if o.busy and not cuda else ""
    print(f"{machine}\n{work.about}\nmedian (fastest) of {meter.repeats} runs{clock}", flush=True)
    meter.lines.append({"machine": machine, "batch": work.about, "repeats": meter.repeats, "busy": o.busy})
    try:
        if isinstance(o, Ops):
            frames = work.dataset.frames[: work.c.batch_size]
            bench_ops.bench_pretraining(meter, work)
            bench_ops.bench_detection(meter, frames, finetune_det3d.PRESETS[o.preset][1])
            bench_ops.bench_mono3d(meter, work)
        else:
            measure_step(meter, work, run)
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
