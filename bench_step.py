"""`bench.py step`: where the time and memory of a training step go, and the step beside the usual way to write it.

A task is a function (meter, work, run) below, and a line of TASKS in bench.py. It needs the step, with the task's own
optimisers (`frozen_step`); the stages of the model's forward, told from outside; and the usual ways, as bench_peers.py
has them (`beside_usual`).
"""

import copy
import statistics
import time
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import anchors
import bench_peers as peers
import data
import finetune_depth
import finetune_det3d
import finetune_mono3d
import ops_boxes
import ops_deform
import ops_sparse
import ops_triton as ops
import simipu
from bench_measure import Timeline, Traffic, number, saved_for_backward, spread
from loop import stream

# -----------------------------------------------------------------------------
# any task


def frozen_step(meter, model, optimizers, tail, clip=0.0):
    """step(batch, dtype, enter) -> loss, stats, with rates of 0: the same work, and every run is the same step.

    What no other stage claims of a model's forward belongs to the stage `tail`. With a clip, stats hold "grad_norm".
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
            stats = stats | {"grad_norm": nn.utils.clip_grad_norm_(model.parameters(), clip)}
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
    timelines = [Timeline(meter.clock) for _ in range(warm_up + meter.repeats)]
    batches = data.Batches(len(work.dataset), c.batch_size, c.group, c.seed, steps=len(timelines))
    loaded = stream(work.dataset, batches, work.collate, c.workers, run)
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
    timeline = Timeline(meter.clock)
    stage = lambda: timeline.stage
    with timeline.watch(stages), saved_for_backward(meter.weights, stage) as saved, Traffic(stage) as traffic:
        timeline.enter("augment")
        step(work.augment(work.raw), meter.dtype, timeline.enter)
    return saved, traffic.bytes


def stage_table(meter, work, run, step, stages, tail):
    """Where time and memory of a step go. -> GB/s of a large copy, {stage: its row}.

    step: of `frozen_step`, with this tail. stages: those inside forward, as Timeline.watch has them.
    """
    stages = work.prepares | stages
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
    add("decoding, one worker", [reading_ms(meter, work)])
    return roofline, rows


def reading_ms(meter, work):
    clock = meter.clock or time.perf_counter
    start = clock()
    work.read()
    return 1e3 * (clock() - start)


def images_per_s(meter, work, roofline, rows, figures):
    """What the step comes to: ours, with loading, and the peers' that fitted into memory.

    roofline, rows: of `stage_table`. figures: of Meter.compare, for a whole step beside the usual ones.
    """
    medians = {name: statistics.median(side["runs"]) for name, side in figures.items()}
    ms = {"ours": medians["ours"], "with loading and augmentation": rows["all"]["ms"]} | medians
    speed = {name: 1e3 * work.c.batch_size / t for name, t in ms.items()}
    moved = rows["all"]["moved_gb"] - sum(rows[stage]["moved_gb"] for stage in ("augment", *work.prepares))
    share = 1e3 * moved / roofline / ms["ours"]
    said = ", ".join(f"{name} {number(s)}" for name, s in speed.items())
    print(f"\nimages/s: {said}; ours at {share:.1%} of the memory's roofline")
    meter.lines.append({"images_per_s": speed, "of_roofline": share})


def beside_usual(meter, work, step, usual):
    """A step with a clip beside the usual ways {name: side} to write it. -> as Meter.compare."""
    ours = lambda dtype: loss_and_norm(step(work.batch, dtype))
    return meter.compare("step", f"{work.c.batch_size} frames", ours, usual, peers.norms_differ, 1e-3)


def loss_and_norm(result):
    """Of a step: what two ways to write it are compared by."""
    loss, stats = result
    return loss, stats["grad_norm"]


# -----------------------------------------------------------------------------
# simipu.py


def bench_pretraining(meter, work, run):
    model, c, tail = work.model, work.c, "heads, losses"
    whole_step = frozen_step(meter, model, simipu.build_optimizers(model, c), tail)

    def step(*arguments):
        loss, stats = whole_step(*arguments)
        return loss, stats["match_m"]

    stages = {
        "point encoder": [(model.pts_backbone, "place"), (model.pts_backbone, "describe")],
        "matching, not hidden": [(simipu, "match_in_background")],
        "image encoder": [(model.img_backbone, "forward")],
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
    ours, scipys = (peers.matching(how, *questions[meter.dtype]) for how in (match, peers.serial_scipy))
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


# -----------------------------------------------------------------------------
# finetune_depth.py


def bench_depth(meter, work, run):
    model, c, tail = work.model, work.c, "loss"
    torch.backends.cudnn.benchmark = True  # as in training, ours and the toolbox's
    step = frozen_step(meter, model, [finetune_depth.build_optimizer(model, c)], tail, c.clip)
    stages = {"encoder": [(model.backbone, "forward")], "decoder": [(model.decode_head, "forward")]}

    other = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    meter.weights += other.parameters()
    adamw = torch.optim.AdamW(other.parameters(), foreach=False)
    toolbox_step = frozen_step(meter, other, [adamw], tail, c.clip)
    batch = {**work.batch, "image": work.batch["image"].contiguous()}

    def usual_step(dtype):
        tf32 = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=meter.clock_runs)
        with patch.object(finetune_depth, "sig_loss", peers.masked_sig_loss), tf32:
            return loss_and_norm(toolbox_step(batch, torch.float32))

    roofline, rows = stage_table(meter, work, run, step, stages, tail)
    figures = beside_usual(meter, work, step, {"the toolbox's way": usual_step})
    images_per_s(meter, work, roofline, rows, figures)


# -----------------------------------------------------------------------------
# finetune_det3d.py


def bench_detection(meter, work, run):
    model, c, batch, tail = work.model, work.c, work.batch, "losses"
    voxels, boxes = len(batch["levels"][0].keys), model.anchors[..., 0].numel()
    print(f"{len(batch['points'])} points, {voxels} voxels, {boxes} anchors a frame")
    meter.weights += peers.rows_of_tables(batch["levels"])
    step = frozen_step(meter, model, finetune_det3d.build_optimizers(model, c), tail, c.clip)
    points = model.pts_voxel_encoder
    stages = {
        "image encoder, pyramid": [(part, "forward") for part in (model.img_backbone, model.img_neck)],
        "points, voxels": [(points, "forward")],
        "fusion": [(points.fusion_layer, "forward")],
        "fusion's sampling": [(model, "pixels"), (ops, "bilinear_sample")],
        "sparse encoder": [(model.pts_middle_encoder, "forward")],
        "BEV blocks, head": [(part, "forward") for part in (model.pts_backbone, model.pts_neck, model.pts_bbox_head)],
        "targets": [(finetune_det3d, "assign")],
    }

    def usual_step(dtype):
        with (
            patch.object(ops_sparse, "sparse_conv", peers.dense_table_conv),
            patch.object(ops, "bilinear_sample", peers.grid_sample_per_image),
        ):
            return loss_and_norm(step(batch, dtype))

    roofline, rows = stage_table(meter, work, run, step, stages, tail)
    figures = beside_usual(meter, work, step, {"the usual": usual_step})
    bench_selection(meter, model, batch)
    images_per_s(meter, work, roofline, rows, figures)


def bench_selection(meter, model, batch):
    """What prediction adds to the forward pass: from the answers of all anchors to the boxes that are reported.

    The network is not trained: noise on its answers sees to it that no two anchors are alike, and all scores count.
    """
    generator = torch.Generator(batch["points"].device).manual_seed(0)
    noise = lambda x: torch.randn(x.shape, generator=generator, device=x.device)
    with torch.no_grad():
        answers = [x + spread * noise(x) for x, spread in zip(model.answers(batch), (1.0, 0.1, 1.0))]
    boxes = model.anchors.flatten(0, 3)

    def ours(dtype):
        with torch.no_grad(), patch.object(anchors, "MIN_SCORE", 0.0):
            return anchors.select(*answers, boxes, model.protocol)

    def usual(dtype):
        with patch.object(ops_boxes, "nms", peers.polygon_nms):
            return ours(dtype)

    shape = f"{len(answers[0])} x {len(boxes)} anchors"
    meter.compare("decoding, NMS", shape, ours, {"greedy, polygons": usual}, peers.norms_differ, 1e-5)


# -----------------------------------------------------------------------------
# finetune_mono3d.py


def bench_mono3d(meter, work, run):
    model, c, batch, tail = work.model, work.c, work.batch, "losses"
    step = frozen_step(meter, model, [finetune_mono3d.build_optimizer(model, c)], tail, c.clip)
    stages = {
        "image encoder, pyramid": [(part, "forward") for part in (model.backbone, model.neck)],
        "head": [(model.bbox_head, "forward")],
        "deformable layers": [(ops_deform, "deform_conv2d")],
        "targets": [(finetune_mono3d, "assign")],
    }

    def usual_step(dtype):
        with patch.object(ops_deform, "deform_conv2d", peers.gathered_deform_conv2d):
            return loss_and_norm(step(batch, dtype))

    roofline, rows = stage_table(meter, work, run, step, stages, tail)
    figures = beside_usual(meter, work, step, {"gather": usual_step})
    images_per_s(meter, work, roofline, rows, figures)
