"""The usual way to write each operation of a training step, and how far an answer may be from ours: for bench.py.

Of `bench.py ops`:
    farthest points     the torch loop that everybody writes
    ball query          cdist and topk, cloud by cloud; on a CPU also scipy's k-d tree
    gathered maximum    gather, then max
    set abstraction     group, then Conv2d, BatchNorm2d and ReLU over (B, C, M, k), then max
    bilinear sampling   F.grid_sample, image by image
    assignment          scipy's, of full matrices, one after another
    sparse tables       a search for each of the 27 cells, and of each table, in place of the half that tells the rest
    sparse encoder      `dense_table_conv`; for the forward pass on a CPU also spconv, where it is installed
                        (`pip install spconv`, the wheel without CUDA), with its own tables
    rotated overlap     polygons: corners inside the other, crossings of edges, sorted by angle (`polygon_iou`)
    NMS                 box by box, with our overlaps, and with those of polygons
    deformable conv.    four cells gathered for every tap, weighed and kept (`gathered_deform_conv2d`)

Of `bench.py step`: the same step with grouped set abstractions, serial scipy, and grid_sample image by image. Its
farthest points and balls stay ours, since the usual code has compiled CUDA operations for them. Where image sizes are
drawn, the usual code draws one for each image and pads the batch to the largest (`padding`).

Of `bench.py step --task depth`: the same network in the toolbox's way, that is float32 (TF32 where a GPU has it),
channels first, an unfused AdamW, and a loss that indexes by a mask (`masked_sig_loss`).

Of `bench.py step --task det3d`: the same network with `dense_table_conv` and grid_sample image by image; the selection
of boxes with greedy suppression on polygons (`polygon_nms`).

Of `bench.py step --task mono3d`: the same network with `gathered_deform_conv2d`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from torch import nn

import data
import ops_boxes
import ops_sparse
import ops_triton as ops

try:
    import spconv.pytorch as spconv
except ImportError:
    spconv = None

# -----------------------------------------------------------------------------
# the peers


def fps_loop(points, m):
    """points (B, N, C) -> (B, m) int64."""
    B, N, _ = points.shape
    clouds = torch.arange(B, device=points.device)
    picks = torch.zeros(B, m, dtype=torch.long, device=points.device)
    nearest = torch.full((B, N), 1e10, device=points.device)
    pick = picks[:, 0]
    for i in range(m):
        picks[:, i] = pick
        distance = ((points - points[clouds, pick][:, None]) ** 2).sum(-1)
        nearest = torch.min(nearest, distance)
        pick = nearest.argmax(-1)
    return picks


def ball_topk(xyz, centers, radius, k, min_radius):
    """xyz (B, N, 3), centers (B, M, 3) -> (B, M, k) int64."""
    N = xyz.shape[1]
    out = []
    for points, around in zip(xyz, centers):  # all clouds at once would take 16 bytes for every point and centre
        distance = torch.cdist(around, points, compute_mode="donot_use_mm_for_euclid_dist")  # (M, N)
        outside = (distance >= radius) | ((distance < min_radius) & (distance > 0))
        index = torch.arange(N, device=xyz.device).expand_as(distance).masked_fill(outside, N)
        index = index.topk(k, largest=False, sorted=True).values  # (M, k)
        first = index[:, :1] % N  # 0 for a ball with no hit
        out.append(torch.where(index == N, first, index))
    return torch.stack(out)


def ball_kdtree(xyz, centers, radius, k, min_radius):
    """As ball_topk, on a CPU."""
    out = np.zeros((len(xyz), centers.shape[1], k), np.int64)
    threads = torch.get_num_threads()
    for points, around, balls in zip(xyz.numpy(), centers.numpy(), out):
        found = cKDTree(points).query_ball_point(around, radius, return_sorted=True, workers=threads)
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
    flat = idx.flatten(1)[:, None].expand(-1, columns.shape[1], -1)  # (B, C, M k)
    return columns.gather(2, flat).unflatten(2, idx.shape[1:])


def group_max(features, idx):
    """features (B, N, C), idx (B, M, k) -> (B, M, C)."""
    return group(features, idx).max(3).values.transpose(1, 2)


def shells(sa):
    """(radius, neighbours, inner radius) of each ball of a set abstraction: a ball leaves out the one before it."""
    return list(zip(sa.radii, sa.neighbours, (0.0, *sa.radii)))


class Grouped(nn.Module):
    """A set abstraction as PointNet++ draws it, on the weights of one of ours."""

    def __init__(self, sa):
        super().__init__()
        self.radii, self.neighbours = sa.radii, sa.neighbours
        self.mlps = nn.ModuleList()
        for mlp in sa.mlps:
            parts = []
            for layer in mlp:
                parts += [layer.conv, layer.bn, nn.ReLU(inplace=True)]
            self.mlps.append(nn.Sequential(*parts))

    def forward(self, xyz, features, centers):
        out = []
        for mlp, idx in zip(self.mlps, ops.ball_shells(xyz, centers, self.radii, self.neighbours)):
            out.append(mlp(group(features, idx)).max(3).values.transpose(1, 2))
        return torch.cat(out, -1)


def grid_sample_per_image(feature_map, uv):
    """feature_map (B, C, H, W), uv (B, N, 2) in cells -> (B, N, C)."""
    size = uv.new_tensor([feature_map.shape[3], feature_map.shape[2]])
    samples = []
    for m, p in zip(feature_map, uv):
        grid = ((2 * p + 1) / size - 1)[None, None]  # (1, 1, N, 2)
        samples.append(F.grid_sample(m[None].float(), grid, align_corners=False)[0, :, 0].T)
    return torch.stack(samples).to(feature_map.dtype)


def serial_scipy(alpha, beta, T, visible, method):
    """In place of simipu.match_in_background: full matrices, one after another, before anything else goes on."""
    partner, distance = [], []
    host = [x.detach().cpu().double().numpy() for x in (alpha, beta, T)]
    for a, b, t in zip(*host):
        cost = cdist(a @ t[:3, :3].T + t[:3, 3], b)
        rows, columns = linear_sum_assignment(cost)
        scale = np.cbrt(abs(np.linalg.det(t[:3, :3])))
        partner.append(torch.from_numpy(columns))
        distance.append(torch.from_numpy(cost[rows, columns] / scale))
    rows = visible.flatten().nonzero()[:, 0]
    result = torch.stack(partner).to(alpha.device), torch.stack(distance).to(alpha.device), rows
    return lambda: result


def matching(match, *question):
    """A side of a row: `match`, as simipu.match_in_background, asked and waited for."""
    return lambda dtype: match(*question)()


def masked_sig_loss(prediction, truth):
    """In place of finetune_depth.sig_loss."""
    known = truth > 0
    g = torch.log(prediction[known] + 1e-3) - torch.log(truth[known] + 1e-3)
    return torch.sqrt(g.var() + 0.15 * g.mean() ** 2)


def padding(sizes, c):
    """How much larger a batch gets whose images each draw their own size and are padded to the largest.

    sizes (B, 2): width, height of the files. c: image_scale. -> pixels over those of one drawn size for all images, a
    mean over 1000 steps; 1 where nothing is drawn.
    """
    draws = [[data.random_image_scale(c.image_scale, i, j) for j in range(len(sizes))] for i in range(1000)]
    own = np.array(draws)  # (1000, B, 2)
    pixels = []
    for box in (own, own[:, :1]):
        resized = (sizes * (box / sizes).min(2, keepdims=True)).round()  # (1000, B, 2)
        canvas = np.ceil(resized.max(1) / data.SIZE_DIVISOR) * data.SIZE_DIVISOR
        pixels.append(canvas.prod(1).mean())
    return pixels[0] / pixels[1]


# -----------------------------------------------------------------------------
# detection's


def tables_of(levels):
    """All tables of ops_sparse.pyramid's levels."""
    return [table for level in levels for table in (level.around, level.down) if table]


def rows_of_tables(levels):
    """Their tensors, which are there before a layer runs, and which no layer should be said to save."""
    return [rows for table in tables_of(levels) for rows in (table.inputs, table.outputs)]


def searched_tables(stages, grid, windows):
    """In place of ops_sparse.pyramid: keys of all stages -> its tables in order. They lack the transposes."""
    around = ops_sparse.Window((3, 3, 3), (1, 1, 1), (1, 1, 1))
    tables = []
    for keys, next_keys, window in zip(stages, stages[1:], windows):
        for out_keys, layer in ((keys, around), (next_keys, window)):
            inputs = searched_table(keys, grid, out_keys, layer)
            nothing = inputs.new_empty(0, len(keys))
            tables.append(ops_sparse.Table(layer.kernel, inputs, nothing, 13 if layer is around else None))
        grid = grid.after(window)
    return tables


def searched_table(keys, grid, out_keys, window):
    """ops_sparse.Table's inputs (K, M), by one search for each cell of the kernel."""
    frame, *cells = grid.after(window).decode(out_keys)
    z, y, x = (cell * stride - padding for cell, stride, padding in zip(cells, window.stride, window.padding))
    rows = []
    for dz, dy, dx in np.ndindex(*window.kernel):
        wanted = grid.encode(frame, z + dz, y + dy, x + dx)
        row = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        rows.append(torch.where(keys[row] == wanted, row, len(keys)))
    return torch.stack(rows).int()


def dense_table_conv(x, weight, table, impl=None):
    """In place of ops_sparse.sparse_conv: for each kernel cell all rows, those without a neighbour as zeros."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    out = x.new_zeros(table.inputs.shape[1], weight.shape[4])
    for rows, w in zip(table.inputs, weight.flatten(0, 2)):
        out = out + padded.index_select(0, rows) @ w
    return out


def spconv_layers(encoder, windows):
    """spconv's layers with the weights of a finetune_det3d.SparseEncoder, each with its batch norm: [(layer, norm)]."""
    parts = encoder.encoder_layers
    first = [encoder.conv_input, *parts["encoder_layer1"]]
    stages = [first, *(parts[f"encoder_layer{i}"] for i in (2, 3, 4)), [encoder.conv_out]]
    native = {"bias": False, "algo": spconv.ConvAlgo.Native}
    layers = []
    for i, blocks in enumerate(stages):
        for j, (conv, norm) in enumerate(blocks):
            channels = conv.weight.shape[3:]
            if i and j == 0:
                kernel, stride, padding = map(list, windows[i - 1])
                layer = spconv.SparseConv3d(*channels, kernel, stride, padding, **native)
            else:
                layer = spconv.SubMConv3d(*channels, 3, padding=1, indice_key=f"stage {i}", **native)
            layer.weight.data.copy_(conv.weight.data.permute(4, 0, 1, 2, 3))  # C_out first, C_in last
            layers.append((layer, norm))
    return layers


def spconv_encoder(x, cells, grid, frames, layers):
    """x (M, C) at cells (M, 4) int32: frame, z, y, x; layers: of spconv_layers -> the map seen from above."""
    found = spconv.SparseConvTensor(x, cells, list(grid.shape), frames)
    with torch.no_grad():
        for layer, norm in layers:
            found = layer(found)
            found = found.replace_feature(F.relu(norm(found.features)))
        return found.dense().flatten(1, 2)


def cross(a, b):
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def polygon_iou(a, b):
    """In place of ops_boxes.bev_iou, of tensors (..., 7): the corners of the polygon that both share, in order."""
    origin = a[..., :2]  # far from it, float32 would lose digits
    p, q = (ops_boxes.corners(box)[..., :4, :2] - origin[..., None, :] for box in (a, b))  # (..., 4, 2)
    p, q = torch.broadcast_tensors(p, q)
    p_edge, q_edge = p.roll(-1, -2) - p, q.roll(-1, -2) - q
    gap, e, f = q[..., None, :, :] - p[..., :, None, :], p_edge[..., :, None, :], q_edge[..., None, :, :]
    across = cross(e, f)  # (..., 4, 4); 0 for parallel edges, which do not cross
    t, u = cross(gap, f) / across, cross(gap, e) / across
    crossings = (p[..., :, None, :] + t[..., None] * e).flatten(-3, -2)
    crossed = ((t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)).flatten(-2)

    def within(corners, ring, edges):
        side = cross(edges[..., None, :, :], corners[..., :, None, :] - ring[..., None, :, :])
        return (side >= 0).all(-1)

    corners = torch.cat([p, q, crossings], -2)  # (..., 24, 2)
    there = torch.cat([within(p, q, q_edge), within(q, p, p_edge), crossed], -1)
    corners = torch.where(there[..., None], corners, 0)
    corners = corners - corners.sum(-2, keepdim=True) / there.sum(-1)[..., None, None].clamp(min=1)
    angle = torch.atan2(corners[..., 1], corners[..., 0]).masked_fill(~there, torch.inf)
    order = angle.argsort(-1)
    ring = corners.gather(-2, order[..., None].expand_as(corners))
    ring = torch.where(there.gather(-1, order)[..., None], ring, ring[..., :1, :])
    shared = cross(ring, ring.roll(-1, -2)).sum(-1).abs() / 2
    areas = a[..., 3] * a[..., 4] + b[..., 3] * b[..., 4]
    return shared / (areas - shared)


def polygon_nms(boxes, scores, threshold):
    """In place of ops_boxes.nms: all overlaps as polygons, then greedy suppression, set by set, on the host."""
    overlaps = ops_boxes.pairwise(polygon_iou, boxes, boxes) > threshold  # (..., K, K)
    K = scores.shape[-1]
    overlaps = overlaps.expand(*scores.shape, K).reshape(-1, K, K).cpu().numpy()
    return suppress(scores, lambda s, i: overlaps[s, i])


def greedy_nms(boxes, scores, threshold):
    """In place of ops_boxes.nms: the overlaps of each box that stays with all others, when its turn has come."""
    flat = boxes.expand(*scores.shape, 7).reshape(-1, *boxes.shape[-2:])
    return suppress(scores, lambda s, i: (ops_boxes.bev_iou(flat[s, i], flat[s]) > threshold).cpu().numpy())


def suppress(scores, too_near):
    """Greedy suppression. too_near(set, box) -> (K,) bool. -> as ops_boxes.nms."""
    K = scores.shape[-1]
    host = scores.reshape(-1, K).cpu().numpy()
    alive, keep = np.isfinite(host), np.zeros(host.shape, bool)
    for s, order in enumerate(np.argsort(-host, 1, kind="stable")):
        for i in order:
            if alive[s, i]:
                alive[s] &= ~too_near(s, i)
                keep[s, i] = True
    return torch.from_numpy(keep.reshape(scores.shape)).to(scores.device)


# -----------------------------------------------------------------------------
# monocular detection's


def gathered_deform_conv2d(x, offset, mask, weight, bias=None, stride=1, padding=0):
    """In place of ops_deform.deform_conv2d: as one writes it with gather, which keeps all that the taps see."""
    (B, C, H, W), (_, _, rows, columns), (h, w) = x.shape, weight.shape, offset.shape[2:]
    taps = torch.arange(rows * columns, device=x.device)
    down, right = (stride * torch.arange(n, device=x.device) - padding for n in (h, w))
    v = offset[:, 0::2] + (taps // columns)[:, None, None] + down[:, None]  # (B, k, h, w)
    u = offset[:, 1::2] + (taps % columns)[:, None, None] + right
    top, left = v.detach().floor(), u.detach().floor()
    cells = x.flatten(2)  # (B, C, H W)
    seen = 0
    for row, share_v in ((top, 1 - (v - top)), (top + 1, v - top)):
        for column, share_u in ((left, 1 - (u - left)), (left + 1, u - left)):
            inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
            share = torch.where(inside, share_v * share_u * mask, 0)
            cell = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).long()
            cell = cell.flatten(1)[:, None].expand(-1, C, -1)  # (B, C, k h w)
            seen = seen + cells.gather(2, cell) * share.flatten(1)[:, None].to(x.dtype)
    out = weight.flatten(1).to(x.dtype) @ seen.view(B, -1, h * w)  # (B, O, h w)
    out = out.unflatten(2, (h, w))
    return out if bias is None else out + bias.to(out.dtype)[:, None, None]


# -----------------------------------------------------------------------------
# are they the same answers? `differ` of a row: results of ours and of the peer -> error, 0 for exact


def picks_differ(points):
    """-> differ, for orders of farthest points among `points` (B, N, C).

    Rounding may break a tie otherwise, and all later picks follow from it. So where two orders part, both picks must be
    equally far from all before; how unequal they are is the error.
    """

    def differ(ours, peer):
        worst = 0.0
        for p, a, b in zip(points.double(), ours, peer):
            parted = (a != b).nonzero()
            if len(parted):
                i = int(parted[0])
                far = torch.cdist(p[torch.stack([a[i], b[i]])], p[a[:i]]).amin(1)  # (2,)
                worst = max(worst, 1e-9, abs(float(far[0] / far[1]) - 1))
        return worst

    return differ


def share_of_balls(ours, peer):
    """The share of centres whose balls differ: on a radius, to the last bit, the peers round otherwise."""
    return float((ours != peer).any(2).float().mean())


def norms_differ(ours, peer):
    """The worst of outputs and gradients: the norm of the difference, relative to the peer's."""
    errors = []
    for a, b in zip(ours, peer):
        norm = b.float().norm().clamp(min=1e-30)
        errors.append(float((a - b).float().norm() / norm))
    return max(errors)


def share_differs(ours, peer):
    """The largest share of elements that differ, of any of the results."""
    return max(float((a != b).float().mean()) for a, b in zip(ours, peer))


def costs_differ(ours, peer):
    """There are several optimal assignments, all of one total distance."""
    return norms_differ([ours[1].sum()], [peer[1].sum()])
