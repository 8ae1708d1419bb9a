"""SimIPU (Li et al., AAAI 2022, arXiv 2112.04680): pre-training of an image encoder from camera + LiDAR, with no
labels.

Two views of a LiDAR sweep go through a PointNet++ encoder; Hungarian matching pairs the places it keeps; an intra-modal
InfoNCE makes point features spatial. The places, projected through the calibration, pick features from the image
encoder's map; an inter-modal InfoNCE hands the spatial knowledge to the image encoder. This file is all of it.

Smoke run on built-in scenes, minutes on two CPU cores:

    torchrun --standalone simipu.py demo                # `python simipu.py demo` is the same program

The paper's recipe on KITTI, on one GPU, on eight (same global batch, same negatives), on two nodes of eight:

    torchrun --standalone simipu.py kitti --data-root data/kitti
    torchrun --standalone --nproc_per_node=8 simipu.py kitti --data-root data/kitti
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 simipu.py kitti --data-root data/kitti \\
        --batch-size 64                                 # 4 frames on each of 16 GPUs; out/ on a disk that both nodes
        see

KITTI raw drives, one or many:      torchrun --standalone simipu.py kitti_raw --data-root data/kitti_raw Resume: the
same command again; it goes on from out/NAME/last.pt, on a CPU to the same bits. Every flag: `python simipu.py kitti
--help`.

A run writes out/NAME/: log.jsonl, last.pt, backbone.pt (the image encoder, torchvision's key names), curves.png,
pairs.png.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import nn

import data
import data_kitti
import eval_match
import ops_triton as ops
import pictures
import runtime
import synthetic
import weights
from files import BadInput
from loop import Loop, stream


@dataclass
class Config:
    """Everything a run depends on. Defaults are the paper's; where it is silent, the official release's."""

    # ---- data ----
    data_root: tuple[str, ...] = ("data/kitti",)
    """Folder in KITTI's object or raw layout; several folders are pooled."""
    splits: tuple[str, ...] = ("train", "test")
    """Of the object layout: names of files in ImageSets/. The paper pre-trains on train and test, and keeps val
    unseen.
    """
    eval_splits: tuple[str, ...] = ()
    """Splits, unseen in training, that the run ends by judging itself on: does the right image match better than
    another frame's? () for none.
    """
    eval_root: tuple[str, ...] = ()
    """Folders that eval_splits are looked up in; () for data_root."""
    eval_frames: int = 100
    """At most so many of them, evenly spread."""
    eval_every: int = 0
    """Steps between judgements, each a line in log.jsonl. 0: only after the last step."""
    frame_stride: int = 1
    """Of the raw layout: keep every n-th frame of a drive. Neighbours are near copies; 10 is good advice."""
    skip_missing: bool = False
    """Leave out frames that lack an image or a cloud, instead of stopping at them."""
    synthetic_frames: int = 0
    """If data_root does not exist, write this many built-in scenes there first."""
    num_points: int = 16384
    """Points a sweep is sampled to, in the camera's view and in range."""
    workers: int = 4
    """Loading processes per GPU; 0 loads in the training process."""
    # ---- the second view of a cloud, and the image ----
    rotation: float = 90.0
    """View beta turns about z by U(-rotation, rotation) degrees."""
    scale: tuple[float, float] = (0.75, 1.25)
    """View beta is scaled by U(scale)."""
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """View beta is shifted by N(0, translation) metres."""
    flip: float = 0.5
    """Probability that the image and view beta are mirrored."""
    pairs: Literal["true", "wrong"] = "true"
    """wrong: every cloud goes with some other frame's image. A control: what such a run learns is the pixel's
    position.
    """
    image_scale: tuple[int, ...] = (640, 192, 2400, 720)
    """Box (width, height) that images are resized into, keeping their ratio: two numbers for one fixed size, four for a
    range that every step draws its size from."""
    crop: tuple[float, float] = (1.0, 1.0)
    """A frame's image is cut to a window of U(crop) times its edges, enlarged to the size it had. Above 1: seen from
    further away. Places outside it leave Eq. 7.
    """
    shift: tuple[float, float] = (0.0, 0.0)
    """The window moves by U(-1, 1) times these shares of the image's width and height."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of the jitter of brightness, contrast, saturation and hue. SimCLR's is .8 .8 .8 .2, MoCo v2's .4 .4 .4
    .1.
    """
    # ---- networks ----
    image_encoder: str = "resnet50"
    """resnet18, 34, 50, 101, or timm:NAME when timm is installed: its ResNets, RegNets, EfficientNets and all whose
    output cells are centred on multiples of the stride. Patch stems (ConvNeXt) are half a cell off.
    """
    places: int = 1024
    """Places per cloud after the point encoder, hence pairs per cloud. The set abstractions keep 4, 2 and 1 times as
    many.
    """
    use_xyz: bool = False
    """Group neighbours with their relative position as features (PointNet++), at several times the cost. The release
    does not.
    """
    point_hidden: int = 1024
    """Width of the point projection heads."""
    image_hidden: int = 2048
    """Width of the image projection head."""
    embed_dim: int = 128
    """Dimensions in which features are compared."""
    # ---- matching and losses ----
    matching: Literal["hungarian", "greedy"] = "hungarian"
    """greedy is the paper's ablation: each place in turn takes the nearest one still free."""
    temperature: float = 0.07
    """Of both losses (paper: tau)."""
    intra_weight: float = 1.0
    """lambda, of Eq. 4. 0 skips the second view, its matching and its loss."""
    inter_weight: float = 1.0
    """mu, of Eq. 7. 0 skips the image."""
    detach_keys: bool = False
    """Cut the gradient through the intra loss's keys, as the release does."""
    inter_query: Literal["point", "image"] = "point"
    """point: Eq. 7. image: the release, with image queries against point keys that are cut after their head, which so
    stays random.
    """
    gather_negatives: bool = False
    """Take the other ranks' features as further negatives, with their gradients."""
    # ---- optimisation ----
    batch_size: int = 32
    """Frames per step, over all GPUs. Learning rates are meant for this batch and are not rescaled."""
    group: int = 4
    """Frames per forward pass, from whose pairs the losses take their negatives: part of the method (4 x 1024
    candidates in the paper), not a memory knob. What of batch_size is left over the GPUs is accumulated; a batch_size
    of less than this for each GPU makes groups smaller, and says so.
    """
    epochs: int = 100
    """Paper: 50 to 100."""
    max_steps: int = 0
    """Stop after this many steps whatever epochs says; 0: no limit."""
    point_lr: float = 1e-3
    """AdamW (.95, .99), weight decay .01, for the point encoder."""
    image_lr: float = 0.03
    """For the image encoder and all heads: SGD, momentum .9, weight decay 1e-4. With image_optimizer=adamw use 1e-3."""
    image_optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is the release's. adamw learns faster in short runs."""
    lr_decay: float = 0.99
    """Factor on all learning rates after each epoch."""
    # ---- the run ----
    name: str = "kitti"
    """The run lives in out/NAME."""
    out: str = "out"
    """Folder of all runs."""
    init: str | None = None
    """Weights the image encoder starts from: anybody's, see weights.py. ImageNet's make the paper's double
    fine-tuning.
    """
    init_pixels: Literal["auto", "rgb", "bgr", "rgb_mean", "bgr_mean"] = "auto"
    """Channel order of that file's pixels, and _mean if they were 0..255 less the mean, undivided. auto: the file says,
    or rgb.
    """
    init_points: str | None = None
    """Weights the point encoder starts from: a last.pt, an export with points, the release's."""
    seed: int = 0
    """Of weights, order, sampling and views."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    amp: bool = True
    """bfloat16 autocast on GPUs. Distances, logits and losses stay in float32."""
    compile: bool = False
    """torch.compile the image encoder, for any image size."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    save_every: int = 200
    """Steps between checkpoints. The last step and a polite kill save too."""
    keep_every: int = 0
    """Every so many steps, keep the checkpoint as step_N.pt beside last.pt. 0: none."""


PRESETS = {
    "demo": (
        "Built-in scenes, ResNet-18, minutes on two CPU cores.",
        Config(
            data_root=("data/synthetic",), synthetic_frames=64, splits=("train",), eval_splits=("val",), num_points=4096, workers=1,
            image_scale=(512, 160), image_encoder="resnet18", places=128, point_hidden=256, image_hidden=512,
            batch_size=4, epochs=1000, max_steps=140, image_optimizer="adamw", image_lr=1e-3, name="demo", log_every=5, save_every=35, eval_every=35,
        ),
    ),
    "kitti": ("KITTI's object benchmark: the paper's recipe.", Config(eval_splits=("val",), eval_every=1000)),
    "kitti_raw": ("KITTI raw drives.", Config(data_root=("data/kitti_raw",), frame_stride=10, name="kitti_raw")),
}  # fmt: skip

# a checkpoint may be continued with other values of these; any other difference is another experiment
FREE = {"data_root", "workers", "epochs", "max_steps", "name", "out", "device", "compile", "log_every", "save_every"}
FREE |= {"keep_every", "eval_splits", "eval_root", "eval_frames", "eval_every"}


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
        return F.relu(self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x)), inplace=True)


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
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)), inplace=True)


def shortcut(cin, cout, stride):
    if stride == 1 and cin == cout:
        return None
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    """ResNet without its classifier. forward: (B, 3, H, W) -> five maps, of strides 2 (after the stem's ReLU), 4, 8,
    16, 32.

    Output cell i of a map of stride s is centred on input pixel s * i: the 7x7, 3x3 and 1x1 convolutions all pad
    evenly.
    """

    def __init__(self, depth):
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
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.channels, self.stride = cin, 32
        self.map_channels = [64, *(width * block.expansion for width in (64, 128, 256, 512))]
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        maps = [x]
        x = F.max_pool2d(x, 3, 2, 1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps


def build_image_encoder(name):
    """resnetNN, or timm:NAME. The module's `channels` and `stride` describe its last map, `map_channels` all of them.
    Raises BadInput for other names.
    """
    if name in ("resnet18", "resnet34", "resnet50", "resnet101"):
        return ResNet(int(name[6:]))
    if not name.startswith("timm:"):
        raise BadInput(f"--image-encoder {name}: not one of resnet18, resnet34, resnet50, resnet101, timm:NAME")
    try:
        import timm

        encoder = timm.create_model(name[5:], features_only=True)
    except (ImportError, RuntimeError) as e:  # no timm, or no such model
        raise BadInput(f"--image-encoder {name}: {str(e).splitlines()[0]}") from None
    encoder.map_channels, encoder.stride = encoder.feature_info.channels(), encoder.feature_info.reduction()[-1]
    encoder.channels = encoder.map_channels[-1]
    return encoder


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


class CountedNormReLU(torch.autograd.Function):
    """relu(batch_norm(x)) in training, where row n of x (n, C) stands for count[n] equal rows (count None: one each).

    Exactly what batch norm computes on the repeated rows, gradients included, without ever repeating them. The mean and
    the biased variance, both (C,), and the number of rows are returned for the running statistics; they carry no
    gradient. With `sync` all ranks share their statistics, as SyncBatchNorm's do.
    """

    @staticmethod
    @torch.autocast("cuda", enabled=False)  # else the sums below would be taken in bfloat16
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, x, count, weight, bias, eps, sync):
        x32 = x if x.dtype == torch.float64 else x.float()
        count = (x32.new_ones(len(x)) if count is None else count.to(x32.dtype)).view(-1)  # (n,)
        sums = torch.cat([count.sum().view(1), count @ x32])
        if sync:
            dist.all_reduce(sums)
        total, mean = sums[0], sums[1:] / sums[0]
        var = count @ (x32 - mean).square_()
        if sync:
            dist.all_reduce(var)
        var = var / total
        rstd = (var + eps).rsqrt()
        y = torch.addcmul(bias - mean * weight * rstd, x32, weight * rstd).relu_().to(x.dtype)
        ctx.save_for_backward(x, y, count, weight, mean, rstd, total)
        ctx.sync = sync
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    def backward(ctx, dy, *_):
        x, y, count, weight, mean, rstd, total = ctx.saved_tensors
        x, dy = x.to(mean.dtype), torch.ops.aten.threshold_backward(dy, y, 0).to(mean.dtype)  # through the ReLU
        dbias = dy.sum(0)
        dweight = rstd * ((dy * x).sum(0) - mean * dbias)
        sums = torch.stack([dbias, dweight])
        if ctx.sync:
            dist.all_reduce(sums)
        # dx = weight rstd (dy - count / total (sum dy + xhat sum dy xhat)), in passes over (n, C) as few as can be
        slope = sums[1] * rstd / total
        dx = torch.addcmul(sums[0] / total - mean * slope, x, slope).mul_(count[:, None])
        return torch.sub(dy, dx, out=dx).mul_(weight * rstd).to(x.dtype), None, dweight, dbias, None, None


class PointLayer(nn.Module):
    """1x1 convolution, batch norm, ReLU over rows (..., cin) -> (..., cout). No bias: batch norm would cancel it.

    `conv` and `bn` hold the parameters under the release's names and shapes; their own forward is not used.
    """

    def __init__(self, cin, cout, dims, eps):
        super().__init__()
        self.sync = False  # share batch statistics between ranks; set by `train` on GPUs
        self.conv = (nn.Conv2d if dims == 2 else nn.Conv1d)(cin, cout, 1, bias=False)
        self.bn = (nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d)(cout, eps=eps)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x, count=None):
        """count: how many rows each row of x stands for, (...,), or None for one each."""
        y = F.linear(x, self.conv.weight.flatten(1))
        bn, rows = self.bn, y.reshape(-1, y.shape[-1])
        if not self.training:
            return F.relu(F.batch_norm(rows, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)).view_as(
                y
            )
        rows, mean, var, total = CountedNormReLU.apply(rows, count, bn.weight, bn.bias, bn.eps, self.sync)
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
        for i, mlp in enumerate(self.mlps):
            k = self.neighbours[i]
            idx = ops.ball_query(xyz, centers, self.radii[i], k, self.radii[i - 1] if i else 0.0)  # (B, M, k)
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
    """(B, N, 4) points (x, y, z, reflectance) -> places (B, P, 3) metres, features (B, P, 1024), with P = `places`.

    Sampling (release's `fps_mods`): SA1 keeps 4P points by D-FPS; SA2 keeps P by F-FPS and P by D-FPS; SA3 keeps P/2 of
    the F-FPS half and P/2 of all the others. Two of these need no work. A set in FPS order is its own FPS, so SA2's
    D-FPS takes the first P; and SA3's F-FPS on SA2's first P/2 takes all of them, in an order that nothing downstream
    sees.
    """

    def __init__(self, places, use_xyz=False):
        super().__init__()
        self.places = places
        self.SA_modules, self.aggregation_mlps = nn.ModuleList(), nn.ModuleList()
        cin = 1  # reflectance
        for radii, neighbours, mlps, cout in zip(RADII, NEIGHBOURS, MLPS, AGGREGATION):
            self.SA_modules.append(SetAbstraction(cin, radii, neighbours, mlps, use_xyz))
            self.aggregation_mlps.append(PointLayer(sum(m[-1] for m in mlps), cout, dims=1, eps=1e-5))
            cin = cout

    def forward(self, points):
        P, xyz, features = self.places, points[..., :3].contiguous(), points[..., 3:].contiguous()
        for stage, (sa, aggregate) in enumerate(zip(self.SA_modules, self.aggregation_mlps)):
            if stage == 0:
                index = ops.furthest_point_sample(xyz, 4 * P)  # (B, 4P)
            elif stage == 1:
                by_feature = ops.furthest_point_sample_features(xyz, features.detach().float(), P)
                index = torch.cat([by_feature, torch.arange(P, device=xyz.device).expand(len(xyz), P)], 1)  # (B, 2P)
            else:
                rest = P // 2 + ops.furthest_point_sample(xyz[:, P // 2 :].contiguous(), P // 2)
                index = torch.cat([torch.arange(P // 2, device=xyz.device).expand(len(xyz), P // 2), rest], 1)  # (B, P)
            centers = xyz.gather(1, index[..., None].expand(-1, -1, 3))
            features = aggregate(sa(xyz, features, centers))
            xyz = centers
        return xyz, features


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


# -----------------------------------------------------------------------------
# matching: which place of view beta is which place of view alpha

MATCHING_THREADS = ThreadPoolExecutor(8)  # scipy's solver lets go of the GIL
COINCIDE = 1e-4  # metres: nearer than this two places are one point, seen through float32's rounding of T


def match_places(alpha, beta, method="hungarian"):
    """For each place of alpha its partner in beta: a permutation (P,) int64. alpha, beta (P, 3) float64, in one frame.

    hungarian minimises the sum of distances. Places that coincide are paired first: by the triangle inequality some
    optimal assignment contains them, and the cubic solver is left with two thirds of the problem. greedy (the paper's
    ablation): each place in turn takes the nearest one still free.
    """
    cost = cdist(alpha, beta)  # (P, P)
    if method == "greedy":
        partner = np.empty(len(alpha), np.int64)
        for i in range(len(alpha)):
            partner[i] = cost[i].argmin()
            cost[:, partner[i]] = np.inf
        return partner
    nearest = cost.argmin(1)
    same = np.flatnonzero(cost[np.arange(len(alpha)), nearest] < COINCIDE)
    _, first = np.unique(nearest[same], return_index=True)  # doubled points: a place is given away once
    rows = same[first]
    partner = np.full(len(alpha), -1)
    partner[rows] = nearest[rows]
    rest, free = np.flatnonzero(partner < 0), np.setdiff1d(np.arange(len(beta)), nearest[rows])
    i, j = linear_sum_assignment(cost[np.ix_(rest, free)])
    partner[rest[i]] = free[j]
    return partner


def match_in_background(alpha, beta, T, visible, method):
    """Start matching a batch; the returned function waits for it. The host is free to launch the image encoder
    meanwhile.

    alpha, beta (B, P, 3) places, T (B, 4, 4), visible (B, P) bool, all on the device. The function returns partner (B,
    P), distance (B, P) in metres of view alpha, visible (n,) flat indices, all on the device.
    """
    device = alpha.device
    host = [t.detach().to("cpu", non_blocking=True) for t in (alpha, beta, T, visible)]
    ready = torch.cuda.Event() if device.type == "cuda" else None
    if ready is not None:
        ready.record()

    def solve(b):
        if ready is not None:
            ready.synchronize()
        a, p, T = (t[b].double().numpy() for t in host[:3])
        a = a @ T[:3, :3].T + T[:3, 3]
        partner = match_places(a, p, method)
        return partner, np.linalg.norm(a - p[partner], axis=1) / np.cbrt(abs(np.linalg.det(T[:3, :3])))

    jobs = [MATCHING_THREADS.submit(solve, b) for b in range(len(alpha))]

    def wait():
        partner, distance = zip(*(job.result() for job in jobs))
        visible = host[3].flatten().nonzero()[:, 0]
        return tuple(
            t.to(device, non_blocking=True)
            for t in (torch.from_numpy(np.stack(partner)), torch.from_numpy(np.stack(distance)), visible)
        )

    return wait


# -----------------------------------------------------------------------------
# losses


def info_nce(query, key, temperature, gather=False, report=True):
    """InfoNCE of matched rows, Eq. 4 and Eq. 7 of the paper with the sum over pairs made a mean.

    -1/n sum_i log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) ), q and k l2-normalised. query, key (n, D) -> loss,
    stats. gather: the keys of all ranks are candidates, and the mean is over all ranks' queries once DDP has averaged.
    stats, {} without `report`: chance, ln(number of candidates), what random features score; top1, the share of queries
    whose own key is the one best (a tie is no success, so collapsed features score 0); positive, negative, mean
    cosines; std and rank of the queries, key_std and key_rank of the keys: the dimensions' deviation, 1 when they fill
    the sphere evenly and 0 when collapsed, and the effective rank.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k = (F.normalize(t if t.dtype == torch.float64 else t.float(), dim=1) for t in (query, key))
        own_key, n, offset, weight = k, len(q), 0, 1.0
        if gather and dist.is_initialized():
            k, counts = runtime.gather_rows(k)
            offset, weight = sum(counts[: dist.get_rank()]), n * len(counts) / sum(counts)
        cosine = q @ k.T  # (n, candidates)
        target = torch.arange(offset, offset + n, device=q.device)
        loss = weight * F.cross_entropy(cosine / temperature, target)
        if not report:
            return loss, {}
        with torch.no_grad():
            positive = cosine.gather(1, target[:, None])  # (n, 1)
            stats = {
                "chance": torch.tensor(math.log(len(k))),
                "top1": ((cosine >= positive).sum(1) == 1).float().mean(),
                "positive": positive.mean(),
                "negative": (cosine.sum() - positive.sum()) / max(cosine.numel() - n, 1),
            }
            for name, z in (("", q), ("key_", own_key)):
                stats |= {name + "std": z.std(0).mean() * math.sqrt(z.shape[1]), name + "rank": effective_rank(z)}
    return loss, stats


def effective_rank(z):
    """exp(entropy of the singular values' shares) of z (n, D) (Roy and Vetterli 2007; as RankMe, uncentred): how many
    dimensions are in use, from 1, collapsed to one direction, to D. NaN for what is not finite.
    """
    gram = torch.nan_to_num(z.double().T @ z.double(), 0.0, 0.0, 0.0)  # eigvalsh would raise, and hide who it was
    share = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_()
    share = share / share.sum()
    return torch.exp(-torch.xlogy(share, share).sum())


# -----------------------------------------------------------------------------
# the method


class SimIPU(nn.Module):
    """forward(batch of data.augment) -> total loss, stats (dict of scalars; few without `report`). Parts have the
    release's names.
    """

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.pts_backbone = PointEncoder(c.places, c.use_xyz)
        if c.intra_weight:
            self.mlp_intro_points = ProjectionHead(AGGREGATION[-1], c.point_hidden, c.embed_dim)
        else:
            self.pts_backbone.requires_grad_(False)  # Eq. 7 does not train it
        if c.inter_weight:
            self.img_backbone = build_image_encoder(c.image_encoder)
            self.mlp_cross_points = ProjectionHead(AGGREGATION[-1], c.point_hidden, c.embed_dim)
            self.mlp_cross_img = ProjectionHead(self.img_backbone.channels, c.image_hidden, c.embed_dim)
            if c.inter_query == "image":
                self.mlp_cross_points.requires_grad_(False)

    def match(self, alpha, beta, T, visible):
        """match_in_background, as the run's --matching says."""
        return match_in_background(alpha, beta, T, visible, self.c.matching)

    def forward(self, batch, report=True):
        c, B = self.c, len(batch["alpha"])
        loss, stats = torch.zeros((), device=batch["alpha"].device), {}

        # places and features of both views; both are needed before anything can be matched
        views = torch.cat([batch["alpha"], batch["beta"]]) if c.intra_weight else batch["alpha"]
        places, features = self.pts_backbone(views)  # (2B, P, 3), (2B, P, 1024)
        uv, depth = data.project(places[:B], batch["lidar2img"])  # (B, P, 2)
        height, width = batch["image"].shape[2:]
        visible = data.inside_image(uv, depth, width, height)  # (B, P)
        if c.intra_weight:
            matched = self.match(places[:B], places[B:], batch["T"], visible)

        # the image encoder runs while threads match
        if c.inter_weight:
            feature_map = self.img_backbone(batch["image"].contiguous(memory_format=torch.channels_last))[
                -1
            ]  # (B, C, H / 32, W / 32)

        # Eq. 4: places that T maps onto each other have alike features. One pass of the head for both views.
        if c.intra_weight:
            partner, distance, visible_rows = matched()
            z = self.mlp_intro_points(features.flatten(0, 1)).view(2, B, -1, c.embed_dim)
            f_alpha, f_beta = z[0], z[1].gather(1, partner[..., None].expand_as(z[1]))
            f_alpha, f_beta = f_alpha.flatten(0, 1), f_beta.flatten(0, 1)  # (B P, 128)
            intra, s = info_nce(
                f_alpha, f_beta.detach() if c.detach_keys else f_beta, c.temperature, c.gather_negatives, report
            )
            loss = loss + c.intra_weight * intra
            stats |= {"intra": intra.detach(), **{f"intra_{k}": v for k, v in s.items()}, "match_m": distance.mean()}
        else:
            visible_rows = visible.flatten().nonzero()[:, 0]

        # Eq. 7: a place and its pixel have alike features. The point encoder only teaches: its gradient is cropped.
        if c.inter_weight:
            if len(visible_rows) < 2:
                raise BadInput(
                    f"{len(visible_rows)} places of a forward pass lie in its images: wrong calibration, or too much of --crop and --shift"
                )
            f_gamma = ops.bilinear_sample(feature_map, uv / self.img_backbone.stride).flatten(0, 1)[
                visible_rows
            ]  # (n, C)
            f_gamma = self.mlp_cross_img(f_gamma)
            f_alpha = self.mlp_cross_points(features[:B].detach().flatten(0, 1)[visible_rows])
            query, key = (f_alpha, f_gamma) if c.inter_query == "point" else (f_gamma, f_alpha.detach())
            inter, s = info_nce(query, key, c.temperature, c.gather_negatives, report)
            loss = loss + c.inter_weight * inter
            stats |= {
                "inter": inter.detach(),
                **{f"inter_{k}": v for k, v in s.items()},
                "visible": visible.float().mean(),
            }
        return loss, stats


def build_optimizers(model, c):
    """AdamW for the point encoder; SGD (or AdamW) for the image encoder and the heads. Every parameter that learns is
    in exactly one of them.
    """
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    points = [p for name, p in learns.items() if name.startswith("pts_backbone.")]
    others = [p for name, p in learns.items() if not name.startswith("pts_backbone.")]
    optimizers = [torch.optim.AdamW(points, c.point_lr, betas=(0.95, 0.99), weight_decay=0.01)] if points else []
    if c.image_optimizer == "sgd":
        optimizers.append(torch.optim.SGD(others, c.image_lr, momentum=0.9, weight_decay=1e-4))
    else:
        optimizers.append(torch.optim.AdamW(others, c.image_lr, betas=(0.9, 0.999), weight_decay=0.01))
    for g in (g for o in optimizers for g in o.param_groups):
        g["initial_lr"] = g["lr"]
    return optimizers


# -----------------------------------------------------------------------------
# training


def find_frames(c, roots, splits):
    return [f for root in roots for f in data_kitti.find_frames(root, splits, c.frame_stride, c.skip_missing)]


def load_frames(c, run):
    """-> frames to train on; frames of --eval-splits, none of them trained on; a note to print or None.

    Raises BadInput as find_frames does, for held-out frames that are trained on, and for fewer than two.
    """
    synthetic.write_scenes(c, run)
    frames = find_frames(c, c.data_root, c.splits)
    if not (c.eval_splits or c.eval_root):
        return frames, [], None
    held_out = data.evenly_spread(find_frames(c, c.eval_root or c.data_root, c.eval_splits), c.eval_frames)
    flag = f"--eval-splits {' '.join(c.eval_splits)}" if c.eval_splits else f"--eval-root {' '.join(c.eval_root)}"
    data.check_unseen(frames, held_out, flag)
    if len(held_out) < 2:
        raise BadInput(f"{flag}: judging needs two frames or more, for the other frame's image")
    return frames, held_out, data.shared_drives(frames, held_out, flag)


def check_config(c, world):
    """-> runtime.split_batch. Raises BadInput, naming the flag, for what cannot work."""
    split = runtime.split_batch(c, world)
    runtime.check_range(c, "keep_every", 0, 1e30, "0 or more")
    above_0 = "places epochs log_every save_every frame_stride temperature eval_frames image_lr point_lr point_hidden image_hidden embed_dim"
    runtime.check_range(c, above_0, 1e-30, 1e30, "above 0")
    runtime.check_range(
        c, "seed workers max_steps eval_every synthetic_frames intra_weight inter_weight", 0, 1e30, "0 or more"
    )
    runtime.check_range(c, "shift jitter flip", 0, 1, "from 0 to 1")
    runtime.check_range(c, "crop scale", 0.2, 5, "from 0.2 to 5, the smaller first", rising=True)
    if c.places % 2 or 4 * c.places > c.num_points:
        raise BadInput(f"--places {c.places}: must be even, and --num-points {c.num_points} at least 4 times as many")
    if (
        len(c.image_scale) not in (2, 4)
        or min(c.image_scale) < 32
        or any(a > b for a, b in zip(c.image_scale, c.image_scale[2:]))
    ):
        raise BadInput(
            f"--image-scale {' '.join(map(str, c.image_scale))}: two numbers (width height) or four (smallest, then largest), from 32 on"
        )
    if not c.inter_weight and (c.init or c.compile or not c.intra_weight):
        raise BadInput(
            f"--inter-weight 0: there is no image encoder for --init or --compile{', and with --intra-weight 0 nothing to learn' * (not c.intra_weight)}"
        )
    return split


def train(c):
    run = runtime.start_run(c.device, c.seed)
    group, accumulate, a_step = check_config(c, run.world)

    # ============ networks and optimisers ============
    model = SimIPU(c).to(run.device)
    if c.inter_weight:
        model.img_backbone.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs too
    notes = [weights.load_image_encoder(model.img_backbone, c.init, c.init_pixels)] if c.init else []
    notes += [weights.load_point_encoder(model.pts_backbone, c.init_points)] if c.init_points else []
    if run.device.type == "cuda" and run.world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for layer in model.modules():
            if isinstance(layer, PointLayer):
                layer.sync = True
    optimizers = build_optimizers(model, c)
    if c.compile:
        model.img_backbone.compile(dynamic=True)

    # ============ data ============
    frames, held_out, note = load_frames(c, run)
    notes += [note] if note else []
    if len(frames) < max(c.batch_size, 2):
        raise BadInput(f"--batch-size {c.batch_size}: the {len(frames)} frames found are too few")
    inventory = data.inventory(frames)
    steps_per_epoch = len(frames) // c.batch_size
    steps = min(c.epochs * steps_per_epoch, c.max_steps or math.inf)
    identity = runtime.as_json(c, without=FREE) | {"group": group, "frames": data.fingerprint(inventory)}
    if c.gather_negatives:
        identity["processes"] = run.world
        notes += ["note: --gather-negatives: with one process there are no others"] if run.world == 1 else []
    # on every rank: recalibrating batch norm talks to the others
    judgement = (lambda: eval_match.match(model, held_out, c, run.device)) if held_out else None
    loop = Loop(c, run, model, optimizers, identity, [f.name for f in frames], "match", judgement)
    batches = data.Batches(len(frames), c.batch_size, group, c.seed, run.rank, run.world, loop.start, steps)
    loaded = stream(data.PretrainFrames(frames, c), batches, data.collate, c.workers, run)

    def next_batch(step):
        """The next forward pass's batch, augmented as in that step; None after the last."""
        if step < steps:
            return data.augment(next(loaded), data.random_image_scale(c.image_scale, c.seed, step), run.device)

    # ============ the loop ============
    batch = next_batch(loop.start)  # before anything is written: a broken data set leaves no trace
    about = runtime.provenance(run, __file__)
    about |= {"config": runtime.as_json(c), "data": {"frames": len(frames), "fingerprint": identity["frames"]}}
    million = sum(p.numel() for p in loop.owned) / 1e6
    lines = [
        *notes,
        f"{c.name}: {len(frames)} frames, {million:.1f} M parameters, {run.world} x {run.device.type}",
        f"{a_step}, {group * c.places} pairs a pass",
        f"steps {loop.start} to {steps}, {steps_per_epoch} an epoch, into {loop.folder}/",
    ]
    loop.begin(steps, about, lines)
    for step in loop:
        epoch = step // steps_per_epoch
        loop.set_rate(c.lr_decay**epoch)

        # forward and backward, pass by pass; the next batch is fetched while a GPU still computes
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with loop.sharing(last):
                with torch.autocast(run.device.type, torch.bfloat16, enabled=c.amp and run.device.type == "cuda"):
                    loss, stats = loop.model(batch, loop.reporting and last)
                (loss / accumulate).backward()
            loop.watch(loss, batch["index"])
            batch = loop.waiting(next_batch, step + last)

        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loop.stepped()

        # once in a while: write how it goes, save, judge
        if loop.reporting:
            stats = loop.report(epoch, stats)
            losses = [loss for loss in ("intra", "inter") if loss in stats]
            said = [f"{loss} {stats[loss]:.2f} (chance {stats[loss + '_chance']:.2f})" for loss in losses]
            loop.bar.set_postfix_str(", ".join(said))
        if loop.saving:
            if (
                c.inter_weight and run.main
            ):  # first: a run that is finished by its last.pt has its last backbone.pt, too
                about = {"step": loop.done, "git": loop.about["git"]}
                weights.save_backbone(model.img_backbone, c.image_encoder, about, loop.folder / "backbone.pt")
            # for eval.py: what it is not to be judged on
            loop.save(inventory=inventory, drives=sorted({f.drive for f in frames if f.drive}))
        if loop.judging:
            loop.judge()
    if not loop.stopping:
        finish(model, c, run, frames, held_out, loop)


def untrained(c, device):
    """The run's own network at step 0: what a trained one is judged beside."""
    torch.manual_seed(c.seed)
    return SimIPU(c).to(device)


def finish(model, c, run, frames, held_out, loop):
    """Pictures and, on held-out frames, the one number that tells learning from guessing by position."""
    folder = loop.folder
    if run.main:
        pictures.draw_curves(folder / "log.jsonl", folder / "curves.png")
        box = eval_match.image_box(c, frames[0].rig)
        view = data.view(data.PretrainFrames(frames, c), [(0, 0)], box, run.device)
        pictures.draw_pairs(model, view, folder / "pairs.png", lambda a, b: match_places(a, b, c.matching))
        print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} into {folder}/")
    if held_out:
        random = eval_match.match(untrained(c, run.device), held_out, c, run.device)
        if run.main:
            print("\n" + "\n".join(eval_match.match_table({"random": random, "trained": loop.judged})))


def main():
    runtime.command_line(lambda: tyro.extras.overridable_config_cli(PRESETS), train)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
