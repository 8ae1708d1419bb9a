"""The point encoder against its textbook form, batch norm over ranks, and the centres of the cells of feature maps."""

import copy
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import data
import data_kitti
import encoders
import ops_triton as ops
import simipu


def cloud(B, N, seed=0, spread=6.0):
    """(B, N, 4) random points in a box of spread x spread x 2 metres."""
    g = torch.Generator().manual_seed(seed)
    xyz = torch.rand(B, N, 3, generator=g) * torch.tensor([spread, spread, 2.0])
    return torch.cat([xyz, torch.rand(B, N, 1, generator=g)], -1)


def real_cloud(root, split, num_points, count):
    rng = np.random.default_rng(0)
    frames = data_kitti.find_frames(root, (split,))[:count]
    clouds = [data.load_frame(f, num_points, rng)["points"] for f in frames]
    return torch.stack([torch.from_numpy(points) for points in clouds])


# -----------------------------------------------------------------------------
# set abstraction and its batch norm


class Reference(nn.Module):
    """A set abstraction as the paper draws it: group, shared MLP of Conv2d, BatchNorm2d and ReLU, maximum over the
    group. It starts from copies of the parameters of `sa`.
    """

    def __init__(self, sa):
        super().__init__()
        self.radii, self.neighbours, self.use_xyz = sa.radii, sa.neighbours, sa.use_xyz
        self.mlps = nn.ModuleList()
        for mlp in sa.mlps:
            layers = []
            for layer in mlp:
                layers += [copy.deepcopy(layer.conv), copy.deepcopy(layer.bn), nn.ReLU()]
            self.mlps.append(nn.Sequential(*layers))

    def forward(self, xyz, features, centers):
        out = []
        batch = torch.arange(len(xyz))[:, None, None]
        inner = (0.0, *self.radii)
        for i, mlp in enumerate(self.mlps):
            idx = ops.ball_query(xyz, centers, self.radii[i], self.neighbours[i], inner[i])
            grouped = features[batch, idx]  # (B, M, k, C)
            if self.use_xyz:
                offset = xyz[batch, idx] - centers[:, :, None]
                grouped = torch.cat([offset.to(features.dtype), grouped], -1)
            out.append(mlp(grouped.permute(0, 3, 1, 2)).amax(3).transpose(1, 2))
        return torch.cat(out, -1)


def run(module, xyz, features, centers):
    """-> output, and the gradient of the features for a loss that weighs all outputs differently."""
    features = features.clone().requires_grad_()
    out = module(xyz, features, centers)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    return out.detach(), features.grad


@pytest.mark.parametrize("form", ["pointwise", "grouped", "grouped with xyz"])
def test_set_abstraction_equals_the_textbook_form(form):
    torch.manual_seed(0)
    use_xyz = form == "grouped with xyz"
    mlps = ((6, 7, 8), (6, 7, 8), (4, 9, 5))
    sa = encoders.SetAbstraction(5, (0.4, 0.8, 1.6), (8, 8, 16), mlps, use_xyz).double()
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
    reference_parameters = dict(reference.named_parameters())
    for name, p in sa.named_parameters():  # mlps.I.layerJ.conv is mlps.I.(3 J) of the reference, its .bn the next
        _, i, layer, part, kind = name.split(".")
        place = 3 * int(layer.removeprefix("layer")) + ("conv", "bn").index(part)
        ref_p = reference_parameters[f"mlps.{i}.{place}.{kind}"]
        torch.testing.assert_close(p.grad, ref_p.grad, rtol=1e-9, atol=1e-9)
    for i in range(3):
        for j in range(3):
            bn, ref_bn = sa.mlps[i][j].bn, reference.mlps[i][3 * j + 1]
            assert bn.eps == ref_bn.eps == 1e-3
            assert bn.num_batches_tracked == ref_bn.num_batches_tracked == 1
            torch.testing.assert_close(bn.running_mean, ref_bn.running_mean, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(bn.running_var, ref_bn.running_var, rtol=1e-10, atol=1e-12)
    sa.eval()
    reference.eval()
    with torch.no_grad():
        out, ref = sa(xyz, features, centers), reference(xyz, features, centers)
    torch.testing.assert_close(out, ref, rtol=1e-10, atol=1e-10)


def test_counted_norm_equals_batch_norm_of_repeated_rows():
    torch.manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    count = torch.randint(0, 5, (30,))
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    counted = encoders.CountedNormReLU.apply(x, count, weight, bias, 1e-3)[0]
    rows = x.repeat_interleave(count, 0)
    repeated = torch.relu(F.batch_norm(rows, None, None, weight, bias, True, eps=1e-3))
    torch.testing.assert_close(counted.repeat_interleave(count, 0), repeated)
    # a gathered maximum sends each row one gradient, however often the row was counted: weigh one copy of each
    seen = count > 0
    first = (count.cumsum(0) - count)[seen]
    coefficients = torch.randn(30, 4, dtype=torch.float64)[seen]
    ours = torch.autograd.grad((counted[seen] * coefficients).sum(), (x, weight, bias))
    theirs = torch.autograd.grad((repeated[first] * coefficients).sum(), (x, weight, bias))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_statistics_stay_in_float32_under_autocast():
    """Half-precision rows, float32 sums: a bfloat16 mean would be wrong in its third digit."""
    torch.manual_seed(0)
    x = torch.randn(4000, 3).add(3).bfloat16()
    count = torch.randint(0, 600, (4000,))
    weight, bias = torch.ones(3), torch.zeros(3)
    wanted = encoders.CountedNormReLU.apply(x.float(), count, weight, bias, 1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, var, total = encoders.CountedNormReLU.apply(x, count, weight, bias, 1e-3)
    assert y.dtype == torch.bfloat16
    assert mean.dtype == var.dtype == total.dtype == torch.float32
    torch.testing.assert_close(y.float(), wanted[0], rtol=8e-3, atol=1e-6)
    torch.testing.assert_close(mean, wanted[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, wanted[2], rtol=8e-3, atol=1e-6)
    torch.testing.assert_close(total, wanted[3], rtol=8e-3, atol=1e-6)


# -----------------------------------------------------------------------------
# the point encoder


@pytest.fixture(scope="module")
def traced():
    """-> a full-size encoder, the balls that its stages asked for on a random cloud, its places, its features."""
    torch.manual_seed(0)
    encoder = encoders.PointEncoder(64)
    calls = []
    original = ops.ball_shells

    def spy(xyz, centers, radii, ks):
        calls.extend((xyz.shape[1], centers.shape[1], *shell) for shell in zip((0.0, *radii), radii, ks))
        return original(xyz, centers, radii, ks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "ball_shells", spy)
        places, features = encoder(cloud(2, 1024, spread=40))
    return encoder, calls, places, features


def test_encoder_follows_the_table(traced):
    """For P = 64 places its stages see 16P points, 4P, P + P and P/2 + P/2. Radii, neighbours and channels are those of
    the release's table.
    """
    encoder, calls, places, features = traced
    assert calls == [  # points, centres, inner and outer radius, neighbours
        (1024, 256, 0.0, 0.2, 32), (1024, 256, 0.2, 0.4, 32), (1024, 256, 0.4, 0.8, 64),
        (256, 128, 0.0, 0.4, 32), (256, 128, 0.4, 0.8, 32), (256, 128, 0.8, 1.6, 64),
        (128, 64, 0.0, 1.6, 16), (128, 64, 1.6, 3.2, 16), (128, 64, 3.2, 4.8, 16),
    ]  # fmt: skip
    assert places.shape == (2, 64, 3)
    assert features.shape == (2, 64, 1024)
    shape = {n: tuple(p.shape) for n, p in encoder.named_parameters()}
    assert shape["SA_modules.0.mlps.0.layer0.conv.weight"] == (32, 1, 1, 1)
    assert shape["SA_modules.0.mlps.2.layer2.conv.weight"] == (128, 64, 1, 1)
    assert shape["SA_modules.1.mlps.2.layer0.conv.weight"] == (128, 128, 1, 1)
    assert shape["SA_modules.2.mlps.2.layer2.conv.weight"] == (512, 256, 1, 1)
    assert shape["aggregation_mlps.0.conv.weight"] == (128, 256, 1)
    assert shape["aggregation_mlps.1.conv.weight"] == (256, 512, 1)
    assert shape["aggregation_mlps.2.conv.weight"] == (1024, 1024, 1)
    assert encoders.PointEncoder(1024).places == 1024
    assert simipu.Config().places == 1024
    assert simipu.Config().num_points == 16384
    with_xyz = encoders.PointEncoder(4, use_xyz=True)
    assert with_xyz.SA_modules[0].mlps[0].layer0.conv.weight.shape == (32, 4, 1, 1)


def test_point_features_are_what_the_first_layer_sees():
    points = torch.rand(2, 64, 8)
    sees = lambda *names: encoders.PointEncoder(4, point_features=names)
    assert torch.equal(sees("reflectance").seen_of(points), points[..., 3:4])
    both = sees("shape", "height")
    assert torch.equal(both.seen_of(points), torch.cat([points[..., 4:], 0.3 * points[..., 2:3]], -1))
    assert both.SA_modules[0].mlps[0].layer0.conv.weight.shape == (32, 5, 1, 1)
    assert not any(sa.grouped for sa in both.SA_modules)  # once per point, as with reflectance
    places, features = both(points)
    assert places.shape == (2, 4, 3) and features.shape == (2, 4, 1024)


def test_places_are_points_of_the_cloud(traced):
    _, _, places, _ = traced
    xyz = cloud(2, 1024, spread=40)[..., :3]
    equal = (places[:, :, None] == xyz[:, None]).all(-1)  # (B, places, points)
    assert equal.any(2).all()


def literal_forward(encoder, points):
    """The encoder with every sampling of the release's `fps_mods` really done."""
    P = encoder.places
    half = P // 2
    xyz, features = points[..., :3].contiguous(), points[..., 3:].contiguous()
    for stage, (sa, aggregate) in enumerate(zip(encoder.SA_modules, encoder.aggregation_mlps)):
        if stage == 0:
            index = ops.furthest_point_sample(xyz, 4 * P)
        elif stage == 1:
            by_feature = ops.furthest_point_sample_features(xyz, features, P)
            by_distance = ops.furthest_point_sample(xyz, P)
            index = torch.cat([by_feature, by_distance], 1)
        else:
            by_feature = ops.furthest_point_sample_features(xyz[:, :half].contiguous(), features[:, :half], half)
            by_distance = ops.furthest_point_sample(xyz[:, half:].contiguous(), half)
            index = torch.cat([by_feature, half + by_distance], 1)
        centers = xyz.gather(1, index[..., None].expand(-1, -1, 3))
        features = aggregate(sa(xyz, features, centers))
        xyz = centers
    return xyz, features


def check_identities(points, P):
    """SA2's D-FPS takes the first P, and SA3's F-FPS of P/2 of P/2 permutes. The encoder leaves both out, and finds the
    same places with the same features, the first half of them in another order.
    """
    torch.manual_seed(0)
    encoder = encoders.PointEncoder(P).train()
    half = P // 2
    with torch.no_grad():
        places, features = encoder(points)
        literal, wanted = literal_forward(encoder, points)
    assert torch.equal(places[:, half:], literal[:, half:])
    assert not torch.equal(places, literal)
    torch.testing.assert_close(features[:, half:], wanted[:, half:])
    same = (places[:, :half, None] == literal[:, None, :half]).all(-1)  # (B, P/2, P/2)
    order = same.int().argmax(2)  # (B, P/2)
    assert torch.equal(order.sort(1).values, torch.arange(half).expand_as(order))
    reordered = wanted.gather(1, order[..., None].expand(-1, -1, 1024))
    torch.testing.assert_close(reordered, features[:, :half])


def test_sampling_identities_on_built_in_scenes(scenes):
    check_identities(real_cloud(scenes, "train", 2048, 3), 64)


def test_sampling_identities_on_real_clouds(kitti):
    check_identities(real_cloud(kitti, "train", 8192, 4), 256)


def test_encoder_does_not_see_the_order_of_the_cloud(scenes):
    """Order counts in two ways only: farthest point sampling starts at point 0, and a full ball keeps its first k
    points. With the first point in place and no ball full, the encoder is a function of the set.
    """
    torch.manual_seed(0)
    encoder = encoders.PointEncoder(32).eval()
    for sa in encoder.SA_modules:
        sa.neighbours = (1024, 1024, 1024)  # no ball is full
    points = real_cloud(scenes, "train", 1024, 2)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(1023)])
    with torch.no_grad():
        places, features = encoder(points)
        shuffled_places, shuffled_features = encoder(points[:, order])
    distance = torch.cdist(places, shuffled_places, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.argmin(2)[..., None]  # (B, P, 1)
    found_places = shuffled_places.gather(1, nearest.expand_as(places))
    found_features = shuffled_features.gather(1, nearest.expand_as(features))
    torch.testing.assert_close(found_places, places)
    torch.testing.assert_close(found_features, features, rtol=1e-4, atol=1e-5)


# -----------------------------------------------------------------------------
# V8: batch norm of image encoders over ranks


def shared_problem():
    """-> a small network with batch norms, four images, and what each output weighs in the loss."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    images = torch.randn(4, 3, 8, 9, dtype=torch.float64)
    coefficients = torch.randn(4, 2, 6, 7, dtype=torch.float64)
    return encoder.double(), images, coefficients


def shared_rank(rank, folder):
    """One of two ranks: the first has one image, the second three. Writes what it found into `folder`."""
    meet = f"file://{folder}/meet"
    patience = timedelta(minutes=5)  # for the other rank to come, or for this one to learn that it broke
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=patience)
    try:
        encoder, images, coefficients = shared_problem()
        assert encoders.share_batch_norm(encoder) == 0
        mine = (slice(0, 1), slice(1, 4))[rank]
        part = images[mine].clone().requires_grad_()
        (encoder(part) * coefficients[mine]).sum().backward()
        grads = [p.grad for p in encoder.parameters()]
        for g in grads:
            dist.all_reduce(g)
        torch.save({"dx": part.grad, "grads": grads, "buffers": list(encoder.buffers())}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_shared_batch_norm_equals_one_process_on_all_images(tmp_path):
    """Ranks with different numbers of images find the gradients and running figures of one process with all of them."""
    other = mp.get_context("spawn").Process(target=shared_rank, args=(1, tmp_path))
    other.start()
    try:
        shared_rank(0, tmp_path)  # here, which saves the seconds that another process needs to start
        other.join()
    finally:
        other.kill()
    assert other.exitcode == 0
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    encoder, images, coefficients = shared_problem()
    images.requires_grad_()
    (encoder(images) * coefficients).sum().backward()
    torch.testing.assert_close(torch.cat([r["dx"] for r in ranks]), images.grad)
    for r in ranks:
        torch.testing.assert_close(r["grads"], [p.grad for p in encoder.parameters()])
        torch.testing.assert_close(r["buffers"], list(encoder.buffers()))


def test_norms_that_cannot_be_shared_are_counted():
    class Fused(nn.BatchNorm2d):
        """As timm's, which is followed by an activation of its own."""

    encoder = nn.Sequential(nn.BatchNorm2d(2), Fused(2))
    assert encoders.share_batch_norm(encoder) == 1
    assert type(encoder[0]) is encoders.SharedBatchNorm
    assert type(encoder[1]) is Fused


# -----------------------------------------------------------------------------
# V2: where the cells of any encoder's maps are centred


class SamePad(nn.Conv2d):
    """TensorFlow's padding: the odd pixel goes to the right and to the bottom."""

    def forward(self, x):
        total = self.kernel_size[0] - self.stride[0]
        before = total // 2
        after = total - before
        return super().forward(F.pad(x, (before, after, before, after)))


class Pooled(nn.Module):
    """The shortcut of a ResNet-D: average pooling subsamples."""

    def __init__(self, width):
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.conv(self.pool(x))


class Attention(nn.Module):
    """A layer of a ViT, which brings a little of every cell into each."""

    def forward(self, x):
        rows = x.flatten(2)  # (B, C, n)
        mixed = (rows.transpose(1, 2) @ rows / 8).softmax(-1)  # (B, n, n)
        return x + 0.1 * (rows @ mixed.transpose(1, 2)).view_as(x)


class OneMap(nn.Module):
    """An image encoder whose only map is what a network gives."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        return [self.network(image)]


FAMILIES = {  # layers, stride, offset: output cell i is centred on input pixel stride * i + offset
    "ResNet": ([nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)], 8, 0),
    "ResNet-D": ([nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Pooled(8), Pooled(8)], 16, 6),
    "ConvNeXt": ([nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 7, 1, 3), nn.Conv2d(8, 8, 2, 2)], 8, 3.5),
    "EfficientNet": ([nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 5, 2, 2), nn.Conv2d(8, 8, 3, 2, 1)], 8, 0),
    "EfficientNet, TensorFlow": ([SamePad(3, 8, 3, 2), nn.SiLU(), SamePad(8, 8, 5, 2), SamePad(8, 8, 3, 2)], 8, 7),
    "ViT": ([nn.Conv2d(3, 8, 16, 16), Attention(), Attention()], 16, 7.5),
}


def receptive_field(encoder, cell, size):
    """First and last input pixel of a row that can change a cell, found by changing each of them."""
    blank = torch.zeros(1, 3, size, size)
    columns = torch.arange(size)
    changed = blank.repeat(size, 1, 1, 1)
    changed[columns, :, :, columns] = 5.0  # image u differs from the blank one in column u alone
    before = encoder(blank)[0][:, :, cell, cell]
    after = encoder(changed)[0][:, :, cell, cell]  # (size, C)
    change = (after - before).abs().amax(1)
    hits = (change > 0.05 * change.max()).nonzero()
    return hits[0].item(), hits[-1].item()


@pytest.mark.parametrize("family", FAMILIES)
def test_offsets_are_the_centres_of_receptive_fields(family):
    layers, stride, offset = FAMILIES[family]
    torch.manual_seed(1)
    encoder = OneMap(nn.Sequential(*copy.deepcopy(layers)))
    (found,) = encoders.measure_offsets(encoder, [stride], size=128)
    assert abs(found - offset) <= 1.0
    cell = 128 // stride // 2
    with torch.no_grad():
        first, last = receptive_field(encoder, cell, 128)
    assert abs((first + last) / 2 - stride * cell - found) <= 3


def test_offsets_of_our_own_are_measured_as_said():
    torch.manual_seed(0)
    encoder = encoders.build_image_encoder("resnet18")
    found = encoders.measure_offsets(encoder, encoder.strides)
    assert encoder.training
    assert np.abs(np.subtract(found, encoder.offsets)).max() <= 2.5


def test_cells_are_where_pixels_are():
    encoder = SimpleNamespace(strides=(4, 16), offsets=(1.5, 7.5))
    uv = torch.tensor([[7.5, 23.5], [1.5, 0.0]])
    assert encoders.cells(encoder, uv).tolist() == [[0, 1], [-0.375, -0.46875]]
    assert encoders.cells(encoder, uv, 0).tolist() == [[1.5, 5.5], [0, -0.375]]
