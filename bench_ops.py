"""`bench.py ops`: every operation at the shapes that a model uses it with, beside its peers (bench_peers.py)."""

import functools
import math
from unittest.mock import patch

import numpy as np
import torch

import bench_peers as peers
import data
import data_det3d
import encoders
import finetune_det3d
import ops_boxes
import ops_deform
import ops_sparse
import ops_triton as ops
import simipu

BOXES = 1000  # of the rows of overlaps and suppression


# -----------------------------------------------------------------------------
# pre-training


def bench_pretraining(meter, work):
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
    ours = peers.matching(simipu.match_in_background, *question)
    usual = peers.matching(peers.serial_scipy, *question)
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
    """The three shells of a set abstraction, and the maximum over the largest of them."""
    clouds = f"{len(xyz)} x {centers.shape[1]}"
    queries = {"cdist, topk": peers.ball_topk}
    if not meter.cuda:
        queries["scipy k-d tree"] = peers.ball_kdtree

    shells = peers.shells(sa)

    def usual(query):
        return lambda _: torch.cat([query(xyz, centers, radius, k, inner) for radius, k, inner in shells], 2)

    ours = lambda _: torch.cat(ops.ball_shells(xyz, centers, sa.radii, sa.neighbours), 2)
    beside = {name: usual(query) for name, query in queries.items()}
    balls = f"{clouds} of {xyz.shape[1]}, k = {', '.join(map(str, sa.neighbours))}"
    meter.compare(f"balls to {', '.join(map(str, sa.radii))} m", balls, ours, beside, peers.share_of_balls, 1e-3)

    radius, k, inner = shells[-1]
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
    with patch.object(ops, "ball_shells", functools.cache(ops.ball_shells)):
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
# detection


def bench_detection(meter, frames, c):
    """Sparse convolution on the voxels of these frames, and boxes on their points. c: finetune_det3d.Config."""
    layout = data_det3d.Layout(c)
    samples = []
    for i, frame in enumerate(frames):
        sample = data_det3d.move(data_det3d.read_scene(frame, labelled=False), np.eye(4), layout)
        sample |= data_det3d.voxels(sample["points"], layout)
        samples.append(sample | {"flip": False, "window": data.WHOLE, "index": i})
    batch = data_det3d.augment(data_det3d.collate(layout, samples), c.image_scale[:2], layout, meter.device)

    bench_tables(meter, batch["levels"][0].keys, layout)
    bench_sparse_encoder(meter, batch, layout, c, len(frames))
    bench_boxes(meter, batch["points"])


def bench_tables(meter, keys, layout):
    """All neighbour tables of the encoder, from the voxels on; on a CPU with the lists of pairs that it works from."""

    def side(tables_from):
        def built(dtype):
            stages = ops_sparse.pyramid_keys(keys, layout.grid, layout.windows)
            tables = tables_from(stages)
            if not meter.cuda:
                for table in tables:
                    table.pairs  # noqa: B018  made when it is first asked for
            return [table.inputs for table in tables]

        return built

    def searched(stages):
        return peers.searched_tables(stages, layout.grid, layout.windows)

    ours = side(lambda stages: peers.tables_of(ops_sparse.pyramid(stages, layout.grid, layout.windows)))
    grid = " x ".join(str(n) for n in layout.grid.shape)
    shape = f"{len(keys)} of {grid}"
    meter.compare("sparse tables", shape, ours, {"search per cell": side(searched)}, peers.share_differs, 0)


def bench_sparse_encoder(meter, batch, layout, c, frames):
    """SECOND's encoder, 12 layers with batch norm: forward and backward with the tables given; forward with tables."""
    levels, keys = batch["levels"], batch["levels"][0].keys
    with torch.no_grad():
        x = finetune_det3d.DynamicVFE(c, layout, levels=0).to(meter.device)(batch, [], []).requires_grad_()  # (M, C)
    encoder = finetune_det3d.SparseEncoder(c).to(meter.device)
    weights = list(encoder.parameters())
    meter.weights += [*weights, *peers.rows_of_tables(levels)]
    dense_tables = patch.object(ops_sparse, "sparse_conv", peers.dense_table_conv)

    trained = meter.trained(lambda x: encoder(x, levels, frames), x, weights)

    def forward(dtype):
        stages = ops_sparse.pyramid_keys(keys, layout.grid, layout.windows)
        built = ops_sparse.pyramid(stages, layout.grid, layout.windows)
        with torch.no_grad(), meter.autocast(dtype):
            return [encoder(x.detach().to(dtype), built, frames)]

    def usual(side):
        def patched(dtype):
            with dense_tables:
                return side(dtype)

        return patched

    usual_forward = {"dense tables": usual(forward)}
    if peers.spconv and not meter.cuda:  # the wheel for CPUs: its backward pass needs a GPU
        layers = peers.spconv_layers(encoder, layout.windows)
        cells = torch.stack(layout.grid.decode(keys), 1).int()
        spconv = lambda dtype: [peers.spconv_encoder(x.detach(), cells, layout.grid, frames, layers)]
        usual_forward["spconv"] = spconv
    shape = f"{len(keys)} voxels, {len(weights) // 3} layers"
    # 1e-2: where a sum is zero but for rounding, ReLU may let the gradient pass or not
    usual_trained = {"dense tables": usual(trained)}
    meter.compare("sparse encoder", shape, trained, usual_trained, peers.norms_differ, 1e-2)
    meter.compare("forward, with tables", shape, forward, usual_forward, peers.norms_differ, 1e-4)


def bench_boxes(meter, points):
    """Rotated overlap and suppression of boxes of all classes that stand at points of the frames, with any heading."""
    centres = points[:: max(1, len(points) // BOXES)][:BOXES, :3]
    generator = torch.Generator().manual_seed(0)
    yaws, scores = torch.rand(2, len(centres), generator=generator).to(points.device)
    sizes = [(anchor.length, anchor.width, anchor.height) for anchor in data_det3d.KITTI.anchors.values()]
    sizes = points.new_tensor(sizes)[torch.arange(len(centres), device=points.device) % len(sizes)]
    boxes = torch.cat([centres, sizes, 2 * math.pi * yaws[:, None]], 1)

    shape = f"{len(boxes)} x {len(boxes)}"
    overlaps = lambda overlap: lambda dtype: [ops_boxes.pairwise(overlap, boxes, boxes)]
    ours, usual = overlaps(ops_boxes.bev_iou), overlaps(peers.polygon_iou)
    meter.compare("rotated overlap", shape, ours, {"polygon clipping": usual}, peers.norms_differ, 1e-4)

    suppressed = lambda nms: lambda dtype: [nms(boxes, scores, data_det3d.KITTI.nms_overlap)]
    usual = {"greedy": suppressed(peers.greedy_nms), "greedy, polygons": suppressed(peers.polygon_nms)}
    shape = f"{len(boxes)} boxes"
    # 1e-3: an overlap may be the threshold to the last bit
    meter.compare("NMS", shape, suppressed(ops_boxes.nms), usual, peers.share_differs, 1e-3)


# -----------------------------------------------------------------------------
# monocular detection


def bench_mono3d(meter, work):
    """Deformable convolution in place of the last 3x3 one of a ResNet's stage 3, on what that is given.

    It is to look around, as a trained one does: its offsets are a random function of the map, most below one cell.
    """
    encoder = work.model.img_backbone
    if not isinstance(encoder, encoders.ResNet):
        return
    plain, given = encoder.layer3[-1].conv2, []
    hook = plain.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        encoder(work.batch["image"])
    hook.remove()
    x = given[0].requires_grad_()
    layer = ops_deform.DeformConv2d(plain.in_channels, plain.out_channels, 3, 1, 1, bias=False)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(layer.conv_offset.weight, 0, 0.02, generator)
    layer.to(meter.device, memory_format=torch.channels_last)
    meter.weights += layer.parameters()
    ours = meter.trained(layer, x, list(layer.parameters()))

    def usual(dtype):
        with patch.object(ops_deform, "deform_conv2d", peers.gathered_deform_conv2d):
            return ours(dtype)

    shape = f"{' x '.join(map(str, x.shape))} -> {plain.out_channels}"
    # 1e-3: where a tap lies on a cell to the last bit, its offset's gradient may be that of either side
    meter.compare("deformable convolution", shape, ours, {"gather": usual}, peers.norms_differ, 1e-3)
