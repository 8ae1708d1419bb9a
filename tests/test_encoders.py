"""The point-wise form of the point encoder is the grouped form; batch norm over ranks; where the cells of maps are."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import data
import data_kitti
import encoders
import ops_triton as ops
import simipu


def cloud(B, N, seed=0, spread=6.0):
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(B, N, 3, generator=g) * torch.tensor([spread, spread, 2.0])
    return torch.cat([xyz, torch.rand(B, N, 1, generator=g)], -1)


def real_cloud(root, split, num_points, count):
    rng = np.random.default_rng(0)
    frames = data_kitti.find_frames(root, (split,))[:count]
    return torch.stack([torch.from_numpy(data.load_frame(f, num_points, rng)["points"]) for f in frames])


class Reference(nn.Module):
    """A set abstraction as the paper draws it: group, shared MLP of Conv2d, BatchNorm2d, ReLU, maximum over the
    group.
    """

    def __init__(self, sa):
        super().__init__()
        self.radii, self.neighbours, self.use_xyz = sa.radii, sa.neighbours, sa.use_xyz
        self.mlps = nn.ModuleList()
        for mlp in sa.mlps:
            layers = [m for layer in mlp for m in (copy.deepcopy(layer.conv), copy.deepcopy(layer.bn), nn.ReLU())]
            self.mlps.append(nn.Sequential(*layers))

    def forward(self, xyz, features, centers):
        out = []
        for i, mlp in enumerate(self.mlps):
            idx = ops.ball_query(xyz, centers, self.radii[i], self.neighbours[i], self.radii[i - 1] if i else 0.0)
            batch = torch.arange(len(xyz))[:, None, None]
            grouped = features[batch, idx]
            if self.use_xyz:
                grouped = torch.cat([(xyz[batch, idx] - centers[:, :, None]).to(features.dtype), grouped], -1)
            out.append(mlp(grouped.permute(0, 3, 1, 2)).amax(3).transpose(1, 2))
        return torch.cat(out, -1)


def run(module, xyz, features, centers):
    features = features.clone().requires_grad_()
    out = module(xyz, features, centers)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), features.grad


@pytest.mark.parametrize("form", ["pointwise", "grouped", "grouped with xyz"])
def test_set_abstraction_equals_the_textbook_form(form):
    torch.manual_seed(0)
    use_xyz = form == "grouped with xyz"
    sa = encoders.SetAbstraction(5, (0.4, 0.8, 1.6), (8, 8, 16), ((6, 7, 8), (6, 7, 8), (4, 9, 5)), use_xyz).double()
    sa.grouped = form != "pointwise"
    for p in sa.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, -1, 1)  # scales of both signs, shifts: nothing cancels by accident
    reference = Reference(sa)
    xyz = cloud(3, 200)[..., :3]
    xyz[0, :50] = xyz[0, :1]  # a doubled point
    centers = torch.cat([xyz[:, :40], torch.full((3, 2, 3), 99.0)], 1)  # the last two balls are empty
    features = torch.rand(3, 200, 5, dtype=torch.float64)
    out, dx = run(sa, xyz, features, centers)
    ref, dx_ref = run(reference, xyz, features, centers)
    torch.testing.assert_close(out, ref, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx, dx_ref, rtol=1e-9, atol=1e-9)
    grads = {
        n.replace("layer", "").replace(".conv.", ".0.").replace(".bn.", ".1."): p for n, p in sa.named_parameters()
    }
    for n, p in grads.items():  # mlps.I.J.{0: conv, 1: bn}.* is mlps.I.(3 J + {0, 1}).* of the reference
        _, i, j, part, kind = n.split(".")
        ref_p = dict(reference.named_parameters())[f"mlps.{i}.{3 * int(j) + int(part)}.{kind}"]
        torch.testing.assert_close(p.grad, ref_p.grad, rtol=1e-9, atol=1e-9)
    for i in range(3):
        for j in range(3):
            bn, ref_bn = sa.mlps[i][j].bn, reference.mlps[i][3 * j + 1]
            assert bn.eps == ref_bn.eps == 1e-3 and bn.num_batches_tracked == ref_bn.num_batches_tracked == 1
            torch.testing.assert_close(bn.running_mean, ref_bn.running_mean, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(bn.running_var, ref_bn.running_var, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            sa.eval()(xyz, features, centers), reference.eval()(xyz, features, centers), rtol=1e-10, atol=1e-10
        )


def test_counted_norm_equals_batch_norm_of_repeated_rows():
    torch.manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    count = torch.randint(0, 5, (30,))
    weight, bias = (
        torch.randn(4, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    )
    apply = lambda x, w, b: encoders.CountedNormReLU.apply(x, count, w, b, 1e-3)[0]
    repeated = lambda x, w, b: torch.relu(
        nn.functional.batch_norm(x.repeat_interleave(count, 0), None, None, w, b, True, eps=1e-3)
    )
    torch.testing.assert_close(apply(x, weight, bias).repeat_interleave(count, 0), repeated(x, weight, bias))
    # a gathered maximum sends each row one gradient, however often the row was counted: weigh one copy of each
    first = torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)[:-1]])[count > 0]
    coefficients = torch.randn(30, 4, dtype=torch.float64)[count > 0]
    ours = torch.autograd.grad((apply(x, weight, bias)[count > 0] * coefficients).sum(), (x, weight, bias))
    theirs = torch.autograd.grad((repeated(x, weight, bias)[first] * coefficients).sum(), (x, weight, bias))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_statistics_stay_in_float32_under_autocast():
    """Half-precision rows, float32 sums: a bfloat16 mean would be wrong in its third digit."""
    torch.manual_seed(0)
    x, count, weight = torch.randn(4000, 3).add(3).bfloat16(), torch.randint(0, 600, (4000,)), torch.ones(3)
    plain = encoders.CountedNormReLU.apply(x.float(), count, weight, 0 * weight, 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, var, total = encoders.CountedNormReLU.apply(x, count, weight, 0 * weight, 1e-3)
    assert y.dtype == torch.bfloat16 and mean.dtype == var.dtype == total.dtype == torch.float32
    for ours, wanted in zip((y.float(), mean, var, total), plain):
        torch.testing.assert_close(ours, wanted, rtol=8e-3 if ours is not mean else 1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def traced():
    """What each stage of a full-size encoder was asked for, on a random cloud."""
    torch.manual_seed(0)
    encoder, calls = encoders.PointEncoder(64), []
    original = ops.ball_query

    def spy(xyz, centers, radius, k, min_radius=0.0):
        calls.append((xyz.shape[1], centers.shape[1], min_radius, radius, k))
        return original(xyz, centers, radius, k, min_radius)

    ops.ball_query = spy
    try:
        places, features = encoder(cloud(2, 1024, spread=40))
    finally:
        ops.ball_query = original
    return encoder, calls, places, features


def test_encoder_follows_the_table(traced):
    """Counts for P = 64 places: 16P points, 4P, P + P, P/2 + P/2; radii, neighbours, channels of the design's (the
    release's) table.
    """
    encoder, calls, places, features = traced
    assert calls == [
        (1024, 256, 0.0, 0.2, 32), (1024, 256, 0.2, 0.4, 32), (1024, 256, 0.4, 0.8, 64),
        (256, 128, 0.0, 0.4, 32), (256, 128, 0.4, 0.8, 32), (256, 128, 0.8, 1.6, 64),
        (128, 64, 0.0, 1.6, 16), (128, 64, 1.6, 3.2, 16), (128, 64, 3.2, 4.8, 16),
    ]  # fmt: skip
    assert places.shape == (2, 64, 3) and features.shape == (2, 64, 1024)
    shape = {n: tuple(p.shape) for n, p in encoder.named_parameters()}
    assert shape["SA_modules.0.mlps.0.layer0.conv.weight"] == (32, 1, 1, 1)
    assert shape["SA_modules.0.mlps.2.layer2.conv.weight"] == (128, 64, 1, 1)
    assert shape["SA_modules.1.mlps.2.layer0.conv.weight"] == (128, 128, 1, 1)
    assert shape["SA_modules.2.mlps.2.layer2.conv.weight"] == (512, 256, 1, 1)
    assert [shape[f"aggregation_mlps.{i}.conv.weight"] for i in range(3)] == [
        (128, 256, 1),
        (256, 512, 1),
        (1024, 1024, 1),
    ]
    assert (
        encoders.PointEncoder(1024).places == 1024
        and simipu.Config().places == 1024
        and simipu.Config().num_points == 16384
    )
    assert encoders.PointEncoder(4, use_xyz=True).SA_modules[0].mlps[0].layer0.conv.weight.shape == (32, 4, 1, 1)


def test_places_are_points_of_the_cloud(traced):
    places = traced[2]
    xyz = cloud(2, 1024, spread=40)[..., :3]
    assert (places[:, :, None] == xyz[:, None]).all(-1).any(2).all()


def literal_forward(encoder, points):
    """The encoder with every sampling of the release's `fps_mods` really done."""
    P, xyz, features = encoder.places, points[..., :3].contiguous(), points[..., 3:].contiguous()
    for stage, (sa, aggregate) in enumerate(zip(encoder.SA_modules, encoder.aggregation_mlps)):
        if stage == 0:
            index = ops.furthest_point_sample(xyz, 4 * P)
        elif stage == 1:
            index = torch.cat(
                [ops.furthest_point_sample_features(xyz, features, P), ops.furthest_point_sample(xyz, P)], 1
            )
        else:
            by_feature = ops.furthest_point_sample_features(
                xyz[:, : P // 2].contiguous(), features[:, : P // 2], P // 2
            )
            index = torch.cat(
                [by_feature, P // 2 + ops.furthest_point_sample(xyz[:, P // 2 :].contiguous(), P // 2)], 1
            )
        centers = xyz.gather(1, index[..., None].expand(-1, -1, 3))
        features = aggregate(sa(xyz, features, centers))
        xyz = centers
    return xyz, features


def check_identities(points, P):
    """SA2's D-FPS takes the first P, SA3's F-FPS of P/2 of P/2 permutes: left out, the encoder finds the same places,
    with the same features, the first half of them in another order.
    """
    torch.manual_seed(0)
    encoder = encoders.PointEncoder(P).train()
    with torch.no_grad():
        (places, features), (literal, wanted) = encoder(points), literal_forward(encoder, points)
    half = P // 2
    assert torch.equal(places[:, half:], literal[:, half:]) and not torch.equal(places, literal)
    torch.testing.assert_close(features[:, half:], wanted[:, half:])
    order = (places[:, :half, None] == literal[:, None, :half]).all(-1).int().argmax(2)  # (B, P/2)
    assert torch.equal(order.sort(1).values, torch.arange(half).expand_as(order))
    torch.testing.assert_close(wanted.gather(1, order[..., None].expand(-1, -1, 1024)), features[:, :half])


def test_sampling_identities_on_built_in_scenes(scenes):
    check_identities(real_cloud(scenes, "train", 2048, 3), 64)


def test_sampling_identities_on_real_clouds(kitti):
    check_identities(real_cloud(kitti, "train", 8192, 4), 256)


def test_encoder_does_not_see_the_order_of_the_cloud(scenes):
    """Farthest point sampling starts at point 0, and a full ball keeps its first k points; all else is a set
    function.
    """
    torch.manual_seed(0)
    encoder = encoders.PointEncoder(32).eval()
    for sa in encoder.SA_modules:
        sa.neighbours = (1024, 1024, 1024)  # no ball is full
    points = real_cloud(scenes, "train", 1024, 2)
    shuffled = torch.cat([points[:, :1], points[:, 1:][:, torch.randperm(1023)]], 1)
    with torch.no_grad():
        (pa, fa), (pb, fb) = encoder(points), encoder(shuffled)
    nearest = torch.cdist(pa, pb, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)
    torch.testing.assert_close(pb.gather(1, nearest[..., None].expand(-1, -1, 3)), pa)
    torch.testing.assert_close(fb.gather(1, nearest[..., None].expand_as(fb)), fa, rtol=1e-4, atol=1e-5)


# -----------------------------------------------------------------------------
# V8: batch norm of image encoders over ranks


def _shared_worker(rank, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=2)
    encoder, images, coefficients = _shared_problem()
    assert encoders.share_batch_norm(encoder) == 0
    mine = slice(0, 1) if rank == 0 else slice(1, 4)
    part = images[mine].clone().requires_grad_()
    (encoder(part) * coefficients[mine]).sum().backward()
    grads = [p.grad for p in encoder.parameters()]
    for g in grads:
        torch.distributed.all_reduce(g)
    torch.save({"dx": part.grad, "grads": grads, "buffers": list(encoder.buffers())}, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def _shared_problem():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    shape = (4, 2, 6, 7)
    images, coefficients = torch.randn(4, 3, 8, 9, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    return encoder.double(), images, coefficients


def test_shared_batch_norm_equals_one_process_on_all_images(tmp_path):
    """Ranks with different numbers of images; outputs' gradients, weights' gradients and running figures."""
    mp.spawn(_shared_worker, (tmp_path / "shared",), nprocs=2)
    ranks = [torch.load(tmp_path / f"shared.{rank}") for rank in range(2)]
    encoder, images, coefficients = _shared_problem()
    images.requires_grad_()
    (encoder(images) * coefficients).sum().backward()
    torch.testing.assert_close(torch.cat([r["dx"] for r in ranks]), images.grad)
    for r in ranks:
        torch.testing.assert_close(r["grads"], [p.grad for p in encoder.parameters()])
        torch.testing.assert_close(r["buffers"], list(encoder.buffers()))


def test_norms_that_cannot_be_shared_are_counted():
    class Fused(nn.BatchNorm2d):  # as timm's, with an activation
        pass

    encoder = nn.Sequential(nn.BatchNorm2d(2), Fused(2))
    assert encoders.share_batch_norm(encoder) == 1
    assert type(encoder[0]) is encoders.SharedBatchNorm and type(encoder[1]) is Fused


# -----------------------------------------------------------------------------
# V2: where the cells of any encoder's maps are centred


class SamePad(nn.Conv2d):
    """TensorFlow's padding: what does not come out even goes to the right."""

    def forward(self, x):
        total = self.kernel_size[0] - self.stride[0]
        return super().forward(F.pad(x, (total // 2, total - total // 2) * 2))


class Pooled(nn.Module):
    """The shortcut of a ResNet-D: average pooling subsamples."""

    def __init__(self, width):
        super().__init__()
        self.pool, self.conv = nn.AvgPool2d(2), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.conv(self.pool(x))


class Attention(nn.Module):
    """A layer of a ViT, a little of everything in each cell."""

    def forward(self, x):
        rows = x.flatten(2)  # (B, C, n)
        mixed = (rows.transpose(1, 2) @ rows / 8).softmax(-1)  # (B, n, n)
        return x + 0.1 * (rows @ mixed.transpose(1, 2)).view_as(x)


FAMILIES = {  # layers, stride, offset: output cell i is centred on input pixel stride * i + offset
    "ResNet": ([nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)], 8, 0),
    "ResNet-D": ([nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Pooled(8), Pooled(8)], 16, 6),
    "ConvNeXt": ([nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 7, 1, 3), nn.Conv2d(8, 8, 2, 2)], 8, 3.5),
    "EfficientNet": ([nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 5, 2, 2), nn.Conv2d(8, 8, 3, 2, 1)], 8, 0),
    "EfficientNet, TensorFlow": ([SamePad(3, 8, 3, 2), nn.SiLU(), SamePad(8, 8, 5, 2), SamePad(8, 8, 3, 2)], 8, 7),
    "ViT": ([nn.Conv2d(3, 8, 16, 16), Attention(), Attention()], 16, 7.5),
}


def receptive_field(encoder, cell, size):
    """First and last input pixel of a row that can change a cell: by changing them."""
    image = torch.zeros(1, 3, size, size)
    before = encoder(image)[0][0, :, cell, cell]
    change = [float((encoder(image.clone().index_fill_(3, torch.tensor([u]), 5.0))[0][0, :, cell, cell] - before).abs().max())
              for u in range(size)]  # fmt: skip
    hits = [u for u, c in enumerate(change) if c > 0.05 * max(change)]
    return hits[0], hits[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_are_the_centres_of_receptive_fields(family):
    layers, stride, offset = FAMILIES[family]
    torch.manual_seed(1)
    network = nn.Sequential(*copy.deepcopy(layers))
    encoder = lambda image: [network(image)]
    encoder.training, encoder.eval, encoder.train = False, lambda: encoder, lambda mode: None
    (found,) = encoders.measure_offsets(encoder, [stride], size=128)
    assert abs(found - offset) <= 1.0
    with torch.no_grad():
        first, last = receptive_field(encoder, 128 // stride // 2, 128)
    assert abs((first + last) / 2 - stride * (128 // stride // 2) - found) <= 3


def test_offsets_of_our_own_are_measured_as_said():
    torch.manual_seed(0)
    encoder = encoders.build_image_encoder("resnet18")
    found = encoders.measure_offsets(encoder, encoder.strides)
    assert encoder.training and np.abs(np.subtract(found, encoder.offsets)).max() <= 2.5


def test_cells_are_where_pixels_are():
    encoder = SimpleNamespace(strides=(4, 16), offsets=(1.5, 7.5))
    uv = torch.tensor([[7.5, 23.5], [1.5, 0.0]])
    assert encoders.cells(encoder, uv).tolist() == [[0, 1], [-0.375, -0.46875]]
    assert encoders.cells(encoder, uv, 0).tolist() == [[1.5, 5.5], [0, -0.375]]
