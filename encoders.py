"""The networks that are trained and those that they are made of: image encoders, the point encoder, projection heads.

Image encoders give maps, and say where a pixel lies in them (`cells`). Parameter names are those of torchvision for the
ResNets, and of the official release for the point encoder, so that their checkpoints load.
"""

import functools
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ops_triton as ops
from files import BadInput
from ops_deform import DeformConv2d

# -----------------------------------------------------------------------------
# image encoder: ResNet (He et al. 2016), v1.5, with torchvision's parameter names


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, cin, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(cin, width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, cin, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = shortcut(cin, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x), inplace=True)


def shortcut(cin, cout, stride):
    if stride == 1 and cin == cout:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    """ResNet without its classifier. forward: (B, 3, H, W) -> five maps, of strides 2 (after the stem's ReLU), 4, 8,
    16, 32.

    Output cell i of a map of stride s is centred on input pixel s * i: the 7x7, 3x3 and 1x1 convolutions all pad
    evenly. deformable: stages, from 1 to 4, whose 3x3 convolutions `conv2` are deformable ones (ops_deform.py).
    """

    def __init__(self, depth, deformable=()):
        super().__init__()
        block, layers = {
            18: (BasicBlock, (2, 2, 2, 2)),
            34: (BasicBlock, (3, 4, 6, 3)),
            50: (Bottleneck, (3, 4, 6, 3)),
            101: (Bottleneck, (3, 4, 23, 3)),
        }[depth]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        cin = 64
        for stage, (count, width) in enumerate(zip(layers, (64, 128, 256, 512)), start=1):
            blocks = []
            for i in range(count):
                blocks.append(block(cin, width, stride=2 if stage > 1 and i == 0 else 1))
                cin = width * block.expansion
                if stage in deformable:
                    stride = blocks[-1].conv2.stride[0]
                    blocks[-1].conv2 = DeformConv2d(width, width, 3, stride, 1, bias=False)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.channels, self.arch = cin, f"resnet{depth}"
        self.strides, self.offsets = (2, 4, 8, 16, 32), (0, 0, 0, 0, 0)  # as build_image_encoder says
        self.map_channels = [64, *(width * block.expansion for width in (64, 128, 256, 512))]
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        for m in self.modules():
            if isinstance(m, DeformConv2d):
                m.start_plain()

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        maps = [x]
        x = F.max_pool2d(x, 3, 2, 1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


Freeze = Literal["none", "first", "all"]


def freeze_parts(encoder, freeze):
    """Parts of an encoder that fine-tuning leaves as they are: their weights learn no more. -> these parts, which the
    network's train() must put into eval mode, for their statistics to stay, too.

    freeze: none; first, a ResNet's first stage and what comes before it (mmdetection's frozen_stages=1); or all. Raises
    BadInput for anything else, and for the first stage of another encoder.
    """
    names = {"none": (), "first": ("conv1", "bn1", "layer1"), "all": ("",)}
    if freeze not in names:
        raise BadInput(f"--freeze {freeze}: expected {', '.join(names)}")
    if freeze == "first" and not hasattr(encoder, "layer1"):
        raise BadInput("--freeze first: of ResNets alone; give none or all")
    parts = tuple(encoder.get_submodule(name) for name in names[freeze])
    for part in parts:
        part.requires_grad_(False)
    return parts


def build_image_encoder(name, deformable=()):
    """resnetNN, or timm:NAME when timm is installed. deformable: as ResNet has it. Raises BadInput for other names.

    The module's forward is (B, 3, H, W) -> a list of maps. Of these, shallowest first, `map_channels`, `strides` and
    `offsets` say: output cell i is centred on input pixel strides * i + offsets, in both directions. `channels` is the
    last map's. `arch` is the encoder's name.
    """
    if name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        return ResNet(int(name[6:]), deformable)
    if not name.startswith("timm:"):
        raise BadInput(f"--image-encoder {name}: not one of resnet18, resnet34, resnet50, resnet101, timm:NAME")
    encoder = build_timm_encoder(name)
    encoder.map_channels, encoder.strides = encoder.feature_info.channels(), encoder.feature_info.reduction()
    encoder.channels, encoder.arch = encoder.map_channels[-1], name
    encoder.offsets = offsets_of(name)
    return encoder


@functools.cache
def offsets_of(name):
    """`measure_offsets` of timm:NAME. Weights move them a little, so one seed's are taken, the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = build_timm_encoder(name)
    return measure_offsets(encoder, encoder.feature_info.reduction())


def import_timm(asked, why=""):
    """The module. Raises BadInput where it is not installed: `asked`, the flag that wants it, then `why`."""
    try:
        import timm
    except ImportError as e:
        raise BadInput(f"{asked}: {e}{why}") from None
    return timm


def build_timm_encoder(name):
    timm = import_timm(f"--image-encoder {name}")
    any_size = {"dynamic_img_size": True, "dynamic_img_pad": True}  # what a ViT needs for images that are not square
    try:
        return timm.create_model(name[5:], features_only=True, **any_size)
    except TypeError:  # no ViT
        pass
    except RuntimeError as e:  # no such model
        raise BadInput(f"--image-encoder {name}: {str(e).splitlines()[0]}") from None
    return timm.create_model(name[5:], features_only=True)


def measure_offsets(encoder, strides, size=256):
    """Where the cells of an encoder's maps are centred: input pixel of cell 0, one for each map.

    Encoders differ in how they pad and subsample: by 0 pixels (ResNet), by half a patch (ConvNeXt, ViT), by up to a
    stride (EfficientNets converted from TensorFlow). Measured by gradients: what a cell in the middle depends on,
    squared and weighed, has its centre on that cell's pixel, to a pixel or two. In the maps of ResNet-D it lies between
    its two ways to subsample, and moves a little in training.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, size, size, generator=generator).requires_grad_()
    was_training = encoder.training
    maps = encoder.eval()(image)
    offsets = []
    for feature_map, stride in zip(maps, strides):
        middle = size // stride // 2
        found = []
        for cell in (middle, middle - 1):
            answer = feature_map[:, :, cell, cell]
            mixed = (answer * torch.randn(answer.shape, generator=generator)).sum()
            (slope,) = torch.autograd.grad(mixed, image, retain_graph=True)
            weight = slope.square().sum((0, 1))  # (size, size)
            pixels = torch.arange(size)
            for axis in (0, 1):
                found.append((weight.sum(axis) * pixels).sum() / weight.sum() - stride * cell)
        offsets.append(round(float(sum(found) / len(found)), 1))
    encoder.train(was_training)
    return offsets


def cells(encoder, uv, at=-1):
    """Where pixels uv (..., 2) of the input lie in map `at` of an encoder, in cells: what ops.bilinear_sample wants."""
    return (uv - encoder.offsets[at]) / encoder.strides[at]


def sample_stages(encoder, maps, uv, stages):
    """An encoder's maps at pixels uv (B, n, 2): the features of its stages (4: the last map, 3: the one before), side
    by side, (B, n, C).
    """
    return torch.cat([ops.bilinear_sample(maps[s - 5], cells(encoder, uv, s - 5)) for s in stages], -1)


def width_of(encoder, stages):
    """Channels of `sample_stages`."""
    return sum(encoder.map_channels[s - 5] for s in stages)


# -----------------------------------------------------------------------------
# feature pyramid, with the names of mmcv and mmdetection


class ConvModule(nn.Module):
    """A 2D convolution with bias, named as mmcv's."""

    def __init__(self, cin, cout, size, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, size, stride, padding=size // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return self.conv(x)


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017): maps of strides 4 to 32 -> five maps of one width, the last of stride 64.

    further: instead of that last one, so many maps more, each a convolution of stride 2 on the one before, with a ReLU
    between them (RetinaNet, FCOS).
    """

    def __init__(self, channels, width, further=0):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(cin, width, 1) for cin in channels)
        self.fpn_convs = nn.ModuleList(ConvModule(width, width, 3) for _ in channels)
        self.fpn_convs.extend(ConvModule(width, width, 3, stride=2) for _ in range(further))

    def forward(self, maps):
        x = [conv(m) for conv, m in zip(self.lateral_convs, maps)]
        for i in range(len(x) - 1, 0, -1):
            x[i - 1] = x[i - 1] + F.interpolate(x[i], x[i - 1].shape[2:], mode="nearest")
        x = [conv(m) for conv, m in zip(self.fpn_convs, x)]
        further = self.fpn_convs[len(x) :]
        if not further:
            return [*x, F.max_pool2d(x[-1], 1, 2)]
        for i, conv in enumerate(further):
            x.append(conv(F.relu(x[-1]) if i else x[-1]))
        return x


# -----------------------------------------------------------------------------
# batch norm of image encoders over several GPUs


def full_precision(x):
    return x if x.dtype == torch.float64 else x.float()


class _SharedNorm(torch.autograd.Function):
    """Batch norm of x (B, C, H, W) over all ranks, whose B, H and W may differ. One collective forward, one
    backward.
    """

    @staticmethod
    @torch.autocast("cuda", enabled=False)  # statistics are float32
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, x, weight, bias, eps):
        x32 = full_precision(x)
        var, mean = torch.var_mean(x32, (0, 2, 3), correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() / x.shape[1])])
        ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, own)
        ranks = torch.stack(ranks)  # (world, 2 C + 1)
        means, variances, counts = ranks[:, : len(mean)], ranks[:, len(mean) : -1], ranks[:, -1:]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        rstd = (var + eps).rsqrt()
        scale = (weight * rstd)[:, None, None]
        y = torch.addcmul((bias - mean * weight * rstd)[:, None, None], x32, scale).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, rstd, total)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        x, weight, mean, rstd, total = ctx.saved_tensors
        normed = (full_precision(x) - mean[:, None, None]) * rstd[:, None, None]
        dy = full_precision(dy)
        dbias, dweight = dy.sum((0, 2, 3)), (dy * normed).sum((0, 2, 3))
        sums = torch.stack([dbias, dweight])
        dist.all_reduce(sums)
        dbias_all, dweight_all = sums[:, :, None, None] / total
        dx = (dy - dbias_all - normed * dweight_all) * (weight * rstd)[:, None, None]
        return dx.to(x.dtype), dweight, dbias, None


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all ranks' images, as nn.SyncBatchNorm; but the host never waits for the
    device.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, var, total = _SharedNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (total / (total - 1)), self.momentum)
        return y


def share_batch_norm(encoder):
    """Let the batch norms of an image encoder take their statistics over all ranks, as the release's do.

    -> how many could not, because they are fused with an activation (timm's are): these keep their own rank's.
    """
    left = 0
    for module in encoder.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm  # the same parameters, another forward
        elif isinstance(module, nn.BatchNorm2d):
            left += 1
    return left


# -----------------------------------------------------------------------------
# point encoder: PointNet++ with multi-scale grouping, points sampled by distance (D-FPS) and by feature (F-FPS, 3DSSD)

RADII = ((0.2, 0.4, 0.8), (0.4, 0.8, 1.6), (1.6, 3.2, 4.8))  # metres; ball i is a shell, from radius i - 1 on
NEIGHBOURS = ((32, 32, 64), (32, 32, 64), (16, 16, 16))
MLPS = (
    ((32, 32, 64), (32, 32, 64), (64, 64, 128)),
    ((64, 64, 128), (64, 64, 128), (128, 128, 256)),
    ((128, 128, 256), (128, 128, 256), (256, 256, 512)),
)
AGGREGATION = (128, 256, 1024)
HEIGHT_UNIT = 0.3  # on metres: a street's heights to numbers of the size of the other features
PointFeature = Literal["reflectance", "height", "shape"]
POINT_FEATURES = {  # --point-features: the channels of each
    "reflectance": ("reflectance",),
    "height": (f"{HEIGHT_UNIT} z",),
    "shape": ("linearity", "planarity", "scattering", "|normal z|"),
}


class CountedNormReLU(torch.autograd.Function):
    """relu(batch_norm(x)) in training, where row n of x (n, C) stands for count[n] equal rows (count None: one each).

    Exactly what batch norm computes on the repeated rows, gradients included, without ever repeating them. The mean and
    the biased variance, both (C,), and the number of rows are returned for the running statistics; they carry no
    gradient. Each rank takes its own.
    """

    @staticmethod
    @torch.autocast("cuda", enabled=False)  # else the sums below would be taken in bfloat16
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, x, count, weight, bias, eps):
        x32 = full_precision(x)
        count = (x32.new_ones(len(x)) if count is None else count.to(x32.dtype)).view(-1)  # (n,)
        total = count.sum()
        mean = (count @ x32) / total
        var = (count @ (x32 - mean).square_()) / total
        rstd = (var + eps).rsqrt()
        y = torch.addcmul(bias - mean * weight * rstd, x32, weight * rstd).relu_().to(x.dtype)
        ctx.save_for_backward(x, y, count, weight, mean, rstd, total)
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        x, y, count, weight, mean, rstd, total = ctx.saved_tensors
        x = x.to(mean.dtype)
        dy = torch.ops.aten.threshold_backward(dy, y, 0).to(mean.dtype)  # through the ReLU
        dbias = dy.sum(0)
        dweight = rstd * ((dy * x).sum(0) - mean * dbias)
        # dx = weight rstd (dy - count / total (sum dy + xhat sum dy xhat)), in passes over (n, C) as few as can be
        slope = dweight * rstd / total
        dx = torch.addcmul(dbias / total - mean * slope, x, slope).mul_(count[:, None])
        dx = torch.sub(dy, dx, out=dx).mul_(weight * rstd)
        return dx.to(x.dtype), None, dweight, dbias, None


class PointLayer(nn.Module):
    """1x1 convolution, batch norm, ReLU over rows (..., cin) -> (..., cout). No bias: batch norm would cancel it.

    `conv` and `bn` hold the parameters under the release's names and shapes; their own forward is not used.
    """

    def __init__(self, cin, cout, dims, eps):
        super().__init__()
        self.conv = (nn.Conv2d if dims == 2 else nn.Conv1d)(cin, cout, 1, bias=False)
        self.bn = (nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d)(cout, eps=eps)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x, count=None):
        """count: how many rows each row of x stands for, (...,), or None for one each."""
        y = F.linear(x, self.conv.weight.flatten(1))
        bn, rows = self.bn, y.reshape(-1, y.shape[-1])
        if not self.training:
            normed = F.batch_norm(rows, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
            return F.relu(normed).view_as(y)
        rows, mean, var, total = CountedNormReLU.apply(rows, count, bn.weight, bn.bias, bn.eps)
        with torch.no_grad():
            bn.num_batches_tracked += 1
            bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
            bn.running_var.lerp_((var * (total / (total - 1))).to(bn.running_var.dtype), bn.momentum)
        return rows.view_as(y)


class SetAbstraction(nn.Module):
    """Multi-scale grouping around given centres: in each of three shells an MLP of the neighbours' features, then a
    maximum.

    Without relative positions a neighbour's MLP does not depend on whose neighbour it is. So the MLP runs once per
    point instead of once per (centre, neighbour), with batch norm counting each point as often as the shells do, and
    the maximum is gathered: the same function, statistics and gradients, at a twelfth of the multiply-adds and
    activations (`grouped=False`). `grouped=True` is the textbook form, which relative positions need.
    """

    def __init__(self, cin, radii, neighbours, mlps, use_xyz):
        super().__init__()
        self.radii, self.neighbours, self.use_xyz, self.grouped = radii, neighbours, use_xyz, use_xyz
        self.mlps = nn.ModuleList()
        for widths in mlps:
            layers = zip((cin + 3 * use_xyz, *widths), widths)
            self.mlps.append(nn.Sequential())
            for i, (a, b) in enumerate(layers):
                self.mlps[-1].add_module(f"layer{i}", PointLayer(a, b, dims=2, eps=1e-3))

    def forward(self, xyz, features, centers):
        """xyz (B, N, 3), features (B, N, C), centers (B, M, 3) -> (B, M, sum of the MLPs' outputs)."""
        B, N, _ = xyz.shape
        out = []
        for idx, mlp in zip(ops.ball_shells(xyz, centers, self.radii, self.neighbours), self.mlps):  # (B, M, k)
            if self.grouped:
                flat = (idx + N * torch.arange(B, device=idx.device).view(B, 1, 1)).view(-1)
                f = features.reshape(B * N, -1)[flat].view(*idx.shape, -1)  # (B, M, k, C)
                if self.use_xyz:
                    offset = xyz.reshape(B * N, 3)[flat].view(*idx.shape, 3) - centers[:, :, None]
                    f = torch.cat([offset.to(f.dtype), f], -1)  # (B, M, k, 3 + C)
                out.append(mlp(f).max(2).values)
            else:
                count = torch.zeros(B, N, device=idx.device).scatter_add_(
                    1, idx.flatten(1), torch.ones(1, device=idx.device).expand(B, idx[0].numel())
                )
                f = features
                for layer in mlp:
                    f = layer(f, count)  # (B, N, C)
                out.append(ops.gather_max(f, idx))
        return torch.cat(out, -1)


class PointEncoder(nn.Module):
    """(B, N, 4) points (x, y, z, reflectance), or (B, N, 8) with data.local_shape -> places (B, P, 3) metres, features
    (B, P, 1024), with P = `places`. point_features: of PointFeature, what the first layer sees of a point.

    Sampling (release's `fps_mods`): SA1 keeps 4P points by D-FPS; SA2 keeps P by F-FPS and P by D-FPS; SA3 keeps P/2 of
    the F-FPS half and P/2 of all the others. Two of these need no work. A set in FPS order is its own FPS, so SA2's
    D-FPS takes the first P; and SA3's F-FPS on SA2's first P/2 takes all of them, in an order that nothing downstream
    sees.
    """

    def __init__(self, places, use_xyz=False, point_features=("reflectance",)):
        super().__init__()
        self.places, self.point_features = places, point_features
        self.SA_modules, self.aggregation_mlps = nn.ModuleList(), nn.ModuleList()
        cin = sum(len(POINT_FEATURES[name]) for name in point_features)
        for radii, neighbours, mlps, cout in zip(RADII, NEIGHBOURS, MLPS, AGGREGATION):
            self.SA_modules.append(SetAbstraction(cin, radii, neighbours, mlps, use_xyz))
            self.aggregation_mlps.append(PointLayer(sum(m[-1] for m in mlps), cout, dims=1, eps=1e-5))
            cin = cout

    def seen_of(self, points):
        """What the first layer sees of points: (B, N, cin)."""
        seen = {"reflectance": points[..., 3:4], "height": HEIGHT_UNIT * points[..., 2:3], "shape": points[..., 4:]}
        return torch.cat([seen[name] for name in self.point_features], -1)

    def forward(self, points):
        places, layers = self.place(points)
        return places, self.describe(layers)

    def place(self, points):
        """points -> places (B, P, 3), and for `describe` the points of all stages with the first one's features: places
        can be matched while they are described.
        """
        P, xyz = self.places, points[..., :3].contiguous()
        rows_at = lambda rows, index: torch.take_along_dim(rows, index[..., None], 1)
        first = rows_at(xyz, ops.furthest_point_sample(xyz, 4 * P))  # (B, 4P, 3)
        features = self.stage(0, xyz, self.seen_of(points), first)
        by_feature = ops.furthest_point_sample_features(first, features.detach().float(), P)
        second = torch.cat([rows_at(first, by_feature), first[:, :P]], 1)  # (B, 2P, 3)
        others = second[:, P // 2 :].contiguous()
        rest = rows_at(others, ops.furthest_point_sample(others, P // 2))
        places = torch.cat([second[:, : P // 2], rest], 1)  # (B, P, 3)
        return places, (first, features, second, places)

    def describe(self, layers):
        """What `place` left -> features (B, P, 1024)."""
        first, features, second, places = layers
        return self.stage(2, second, self.stage(1, first, features, second), places)

    def stage(self, i, xyz, features, centers):
        """One set abstraction and its aggregation: (B, N, 3), (B, N, C), (B, M, 3) -> (B, M, C')."""
        return self.aggregation_mlps[i](self.SA_modules[i](xyz, features, centers))


class ProjectionHead(nn.Module):
    """SimCLR-style MLP of three layers, batch norm after each, ReLU after the first two. (n, cin) -> (n, cout)."""

    def __init__(self, cin, hidden, cout):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(cin, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(
            nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)
        )
        self.layer3 = nn.Sequential(nn.Linear(hidden, cout, bias=False), nn.BatchNorm1d(cout))

    def forward(self, x):
        return self.layer3(self.layer2(self.layer1(x)))
