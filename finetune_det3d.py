"""Camera + LiDAR 3D detection, the paper's main result: MVX-Net, with MoCA on KITTI (Table 1), on Waymo (Table 2).

    torchrun --standalone finetune_det3d.py demo --init out/demo/backbone.pt    # built-in scenes, minutes on two cores
    torchrun --standalone finetune_det3d.py demo --init none --name scratch     # the same from scratch

The paper's recipe on KITTI, on one GPU or eight (same global batch, same groups of 4):

    torchrun --standalone finetune_det3d.py kitti --init out/kitti/backbone.pt --data-root data/kitti
    torchrun --standalone --nproc_per_node=8 finetune_det3d.py kitti --init out/kitti/backbone.pt --data-root data/kitti

Waymo, as `data_waymo.py convert --whole --elongation` leaves it in data/waymo_360:

    torchrun --standalone --nproc_per_node=8 finetune_det3d.py waymo --init out/waymo/backbone.pt

Resume: the same command again. Every flag: `python finetune_det3d.py kitti --help`. A run ends with its AP on held-out
frames, and writes out/NAME/: log.jsonl, last.pt, curves.png, det3d.png, objects_*.bin (what MoCA pastes).
`python eval.py det3d out/NAME/last.pt` judges it again, or on other data.

The network is MVX-Net (Sindagi et al. 2019) as mmdetection3d 0.13 has it: points with what a feature pyramid says at
their pixels, voxels, a sparse encoder (SECOND, Yan et al. 2018), a head on anchors seen from above. Names of parameters
are mmdetection3d's, so that the official checkpoints load (`--load`). What its answers mean is in anchors.py.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import functools
import math
import os
from dataclasses import dataclass
from typing import Literal

# thousands of small parallel regions a step: OpenMP's threads must sleep between them, or they wait for each other
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn

import data
import data_det3d
import data_sets
import encoders
import eval_boxes
import ops_sparse
import ops_triton as ops
import pictures_boxes
import runtime
import synthetic
import weights
from anchors import YAWS, anchor_grid, assign, detection_losses, select
from data_det3d import Layout
from files import BadInput, read_checkpoint, unless_bad
from loop import Loop, stream


@dataclass
class Config:
    """Everything a run depends on. Defaults are the release's for KITTI."""

    # ---- data ----
    data_root: tuple[str, ...] = ("data/kitti",)
    """Folders in KITTI's object layout, with labels; several are pooled. data_waymo.py writes Waymo's."""
    protocol: Literal["kitti", "waymo"] = "kitti"
    """Whose classes and anchors they are (anchors.py), and whose rules judge."""
    splits: tuple[str, ...] = ("train",)
    """Names of files in ImageSets/."""
    eval_splits: tuple[str, ...] = ("val",)
    """What the run ends by judging itself on. () for nothing."""
    eval_root: tuple[str, ...] = ()
    """Folders that eval_splits are looked up in; () for data_root."""
    eval_frames: int = 0
    """At most so many of them, evenly spread; 0 for all."""
    eval_every: int = 0
    """Steps between judgements, each a line in log.jsonl. 0: only after the last step, which is the one to report."""
    labels: float = 1.0
    """Share of the training frames that is used, evenly spread: how much annotation does pre-training save?"""
    keep_rows: int = 1
    """Only every n-th row of the LiDAR: a cheaper sensor, for which the image matters more. Sweeps must lie row by row,
    as KITTI's do and the built-in scenes'."""
    max_points: int = 0
    """Draw so many of a frame's points, if it has more; 0 for all."""
    elongation: bool = False
    """A point has a fifth number, which the network sees: data_waymo.py's --elongation."""
    skip_missing: bool = False
    """Leave out frames that lack an image or a cloud, instead of stopping at them."""
    synthetic_frames: int = 0
    """Write this many built-in scenes first, if data_root is data/synthetic and does not exist."""
    workers: int = 4
    """Loading processes per GPU; 0 loads in the training process."""
    # ---- augmentation ----
    moca: bool = True
    """Paste objects of other frames, points and pixels (data_det3d.py). Of KITTI alone."""
    rotation: float = 45.0
    """Degrees: the cloud turns about the sensor by U(-rotation, rotation)."""
    scale: tuple[float, float] = (0.95, 1.05)
    """It is scaled by U(scale)."""
    translation: float = 0.2
    """It moves by N(0, translation) metres along each axis."""
    flip: float = 0.5
    """Probability that image and cloud are mirrored."""
    image_scale: tuple[int, ...] = (640, 192, 2560, 768)
    """Box (width, height) that images are resized into, keeping their ratio: two numbers for one fixed size, four for a
    range that every step draws its size from. They are judged at the size, or at the range's geometric middle: 1280 x
    384 here, as in the release."""
    # ---- network ----
    point_range: tuple[float, float, float, float, float, float] = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
    """Metres in the LiDAR's frame: x, y, z minima, then maxima. Multiples of 16 voxels along x and y."""
    voxel: tuple[float, float, float] = (0.05, 0.05, 0.1)
    """Metres."""
    image: bool = True
    """False: points alone, the control that an image encoder's worth is measured against."""
    init: str = "none"
    """Weights the image encoder starts from: anybody's, see weights.py, or by name: imagenet, simipu-kitti, timm:NAME,
    see weights_named.py. none: from scratch.
    """
    init_pixels: Literal["auto", "rgb", "bgr", "rgb_mean", "bgr_mean"] = "auto"
    """How that file's pixels were normalised, where it does not say."""
    load: str = ""
    """Weights of the whole detector to start from, instead of --init: a last.pt of this script, or mmdetection3d's.
    Train on from those: their anchors, spread evenly over the range, lie up to .4 m from ours, which sit on cells."""
    image_encoder: str = "resnet50"
    """resnet18, 34, 50, 101, or timm:NAME when timm is installed."""
    freeze: encoders.Freeze = "first"
    """What of the image encoder stays as it is, statistics included: none, its first stage, or all of it. From scratch
    this freezes random filters, as the release's configuration does."""
    fpn: int = 256
    """Channels of the feature pyramid."""
    fusion: int = 128
    """Channels that a level of the pyramid adds to a point, and of a point after fusion."""
    vfe: int = 64
    """Channels of a point before fusion."""
    sparse: tuple[int, int, int, int, int] = (16, 32, 64, 64, 128)
    """Channels of the sparse encoder's four stages and of its output."""
    second: tuple[int, int] = (128, 256)
    """Channels of the two blocks of 2D convolutions."""
    second_layers: int = 5
    """3x3 convolutions of a block, after its first."""
    upsample: tuple[int, int] = (1, 2)
    """How many times each block's map is enlarged before the head: (2, 4) makes cells half as large."""
    neck: int = 256
    """Channels of each block's enlarged map."""
    norm_momentum: float = 0.01
    """Of the points' batch norms. Short runs want .1."""
    # ---- optimisation ----
    batch_size: int = 32
    """Frames per step, over all GPUs."""
    group: int = 4
    """Frames per forward pass, over which batch norm and the number of positives are taken: 4 on each of eight GPUs in
    the release. If the GPUs together take less than batch_size in a pass, passes are accumulated."""
    epochs: int = 80
    """The release's 40 epochs, each of the training set twice. The rate follows a cosine over all of them."""
    max_steps: int = 0
    """Steps of that cosine, in place of those epochs; 0: as many as they make."""
    lr: float = 3e-3
    """Of all but the image branch: AdamW, betas (.95, .99), weight decay .01."""
    image_lr: float = 5e-3
    """Of the image encoder and its pyramid: SGD, momentum .9, weight decay 1e-4. image_optimizer=adamw wants lr's."""
    image_optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is the release's."""
    warm_up: int = 1000
    """Steps in which the rate rises, from a tenth; the cosine is over the others."""
    drops: tuple[float, ...] = ()
    """Shares of the run from which on the rate is a tenth of what it was, instead of the cosine."""
    clip: float = 35.0
    """Norm that gradients are cut to; 0 for not at all."""
    # ---- the run ----
    name: str = "det3d_kitti"
    """The run lives in out/NAME."""
    out: str = "out"
    """Folder of all runs."""
    seed: int = 0
    """Of weights, order, pasting and augmentation."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    amp: Literal["gpu", "always", "never"] = "gpu"
    """bfloat16 autocast: on GPUs, on CPUs too, or not at all. Coordinates, voxel means, boxes and losses stay in
    float32.
    """
    log_every: int = 50
    """Steps between lines of log.jsonl."""
    save_every: int = 500
    """Steps between checkpoints. The last step and a polite kill save too."""
    keep_every: int = 0
    """Every so many steps, keep the checkpoint as step_N.pt beside last.pt. 0: none."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Show what log.jsonl says there, too, if that package is installed."""


PRESETS = {
    "demo": (
        "Built-in scenes, ResNet-18, minutes on two CPU cores.",
        Config(
            name="det3d_demo", data_root=("data/synthetic",), synthetic_frames=64, workers=1, max_points=8192,
            rotation=10.0, translation=0.1, image_scale=(320, 96),
            point_range=(0.0, -25.6, -3.0, 51.2, 25.6, 1.0), voxel=(0.1, 0.1, 0.1),
            image_encoder="resnet18", freeze="none", fpn=32, fusion=32, vfe=32, sparse=(16, 16, 32, 32, 64),
            second=(64, 128), second_layers=2, upsample=(2, 4), neck=64, norm_momentum=0.1,
            batch_size=2, group=2, max_steps=520, lr=3e-3, image_lr=3e-3, image_optimizer="adamw", warm_up=156,
            clip=10.0, log_every=10, save_every=130,
        ),
    ),
    "kitti": ("KITTI's object benchmark: the paper's recipe.", Config()),
    "waymo": (
        "Waymo, all around, converted by data_waymo.py with --whole and --elongation: the 2x recipe of mmdetection3d.",
        Config(
            name="det3d_waymo", data_root=("data/waymo_360",), protocol="waymo", moca=False, elongation=True,
            point_range=(-76.8, -51.2, -2.0, 76.8, 51.2, 4.0), voxel=(0.08, 0.08, 0.1),
            image_scale=(720, 480, 1280, 853), epochs=48, lr=1e-3, drops=(20 / 24, 23 / 24),
        ),
    ),
}  # fmt: skip

# a checkpoint may be continued with other values of these; any other difference is another experiment
FREE = {"data_root", "workers", "name", "out", "device", "log_every", "save_every", "init", "load"}
FREE |= {"keep_every", "track", "eval_splits", "eval_root", "eval_frames", "eval_every"}


# -----------------------------------------------------------------------------
# network. Names of parts and parameters are mmdetection3d's


def point_norm(c, width):
    return nn.BatchNorm1d(width, eps=1e-3, momentum=c.norm_momentum)


class PointFusion(nn.Module):
    """What the image says at a point's pixel, added to the point: each map through a 3x3 convolution, bilinear samples
    of all of them through one linear layer, the point's own features through another; sum, ReLU. Without an image, the
    points' half alone."""

    def __init__(self, c, levels):
        super().__init__()
        if levels:
            self.lateral_convs = nn.ModuleList(encoders.ConvModule(c.fpn, c.fusion, 3) for _ in range(levels))
            self.img_transform = nn.Sequential(nn.Linear(levels * c.fusion, c.fusion), point_norm(c, c.fusion))
        self.pts_transform = nn.Sequential(nn.Linear(c.vfe, c.fusion), point_norm(c, c.fusion))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, x, maps, batch, cells):
        """x (N, vfe); cells: for each map where the points' pixels are, (B, L, 2). -> (N, fusion)."""
        x = self.pts_transform(x)
        if maps:
            found = [ops.bilinear_sample(conv(m), at) for conv, m, at in zip(self.lateral_convs, maps, cells)]
            rows = torch.cat(found, -1).flatten(0, 1)[batch["slot"]]  # (N, levels * fusion)
            x = x + self.img_transform(rows)
        return F.relu(x)


class DynamicVFE(nn.Module):
    """Features of points, and of voxels as their maxima, for any number of points in a voxel."""

    def __init__(self, c, layout, levels):
        super().__init__()
        self.layout = layout
        layer = lambda cin: nn.Sequential(nn.Linear(cin, c.vfe, bias=False), point_norm(c, c.vfe), nn.ReLU())
        self.vfe_layers = nn.ModuleList([layer(layout.columns + 6), layer(2 * c.vfe)])
        self.fusion_layer = PointFusion(c, levels)

    def forward(self, batch, maps, cells):
        """-> (M, fusion), of the voxels."""
        points, rows, level = batch["points"], batch["rows"], batch["levels"][0]
        with torch.autocast(points.device.type, enabled=False):  # bfloat16 rounds 66.66 m to .16 m
            x = self.vfe_layers[0](self.decorated(points, rows, level))
        x = torch.cat([x, voxel_max(x, rows, len(level.keys))[rows]], 1)
        x = self.vfe_layers[1](x)
        x = self.fusion_layer(x, maps, batch, cells)
        return voxel_max(x, rows, len(level.keys))

    def decorated(self, points, rows, level):
        """A point's own numbers, offset to the mean of the voxel's points, offset to the voxel's centre: (N, 10), or
        (N, 11) with elongation."""
        xyz, M = points[:, :3], len(level.keys)
        count = xyz.new_zeros(M).index_add_(0, rows, torch.ones_like(xyz[:, 0]))
        mean = xyz.new_zeros(M, 3).index_add_(0, rows, xyz) / count[:, None]
        _, z, y, x = level.grid.decode(level.keys)
        size, start = self.layout.voxel, self.layout.range
        centre = torch.stack([(cell + 0.5) * size[i] + start[i] for i, cell in enumerate((x, y, z))], 1)
        return torch.cat([points, xyz - mean[rows], xyz - centre.to(xyz.dtype)[rows]], 1)


def voxel_max(x, rows, count):
    """The maximum of rows x (N, C) of each voxel -> (count, C). Every voxel holds a point."""
    at = rows[:, None].expand_as(x)
    return x.new_zeros(count, x.shape[1]).scatter_reduce(0, at, x, "amax", include_self=False)


class SparseEncoder(nn.Module):
    """SECOND's: submanifold layers, strided ones between four stages, one that flattens. -> a map seen from above."""

    def __init__(self, c):
        super().__init__()
        block = functools.partial(ops_sparse.SparseBlock, momentum=c.norm_momentum)
        a, b, d, e, out = c.sparse
        self.conv_input = block(c.fusion, a)
        stages = {"encoder_layer1": nn.ModuleList([block(a, a)])}
        for i, (cin, cout) in enumerate(((a, b), (b, d), (d, e)), start=2):
            stages[f"encoder_layer{i}"] = nn.ModuleList([block(cin, cout), block(cout, cout), block(cout, cout)])
        self.encoder_layers = nn.ModuleDict(stages)
        self.conv_out = block(e, out, kernel=(3, 1, 1))

    def forward(self, x, levels, frames):
        x = self.conv_input(x, levels[0].around)
        x = self.encoder_layers["encoder_layer1"][0](x, levels[0].around)
        for i, (before, here) in enumerate(zip(levels, levels[1:4]), start=2):
            down, one, two = self.encoder_layers[f"encoder_layer{i}"]
            x = two(one(down(x, before.down), here.around), here.around)
        x = self.conv_out(x, levels[3].down)
        return ops_sparse.to_dense(x, levels[4].keys, levels[4].grid, frames).flatten(1, 2)  # (B, C D, H, W)


def flat_layers(c, *layers):
    """2D convolutions, each with batch norm and ReLU."""
    parts = []
    for conv in layers:
        parts += [conv, nn.BatchNorm2d(conv.out_channels, eps=1e-3, momentum=c.norm_momentum), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


class SECOND(nn.Module):
    """Two blocks of 2D convolutions, the second at stride 2. -> both maps."""

    def __init__(self, c, cin):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        for width, stride in zip(c.second, (1, 2)):
            deeper = [conv(width, width) for _ in range(c.second_layers)]
            self.blocks.append(flat_layers(c, conv(cin, width, stride=stride), *deeper))
            cin = width

    def forward(self, x):
        first = self.blocks[0](x)
        return first, self.blocks[1](first)


class SECONDFPN(nn.Module):
    """Both maps brought to one size and number of channels, side by side."""

    def __init__(self, c):
        super().__init__()
        enlarge = lambda cin, n: nn.ConvTranspose2d(cin, c.neck, n, n, bias=False)
        self.deblocks = nn.ModuleList(flat_layers(c, enlarge(cin, n)) for cin, n in zip(c.second, c.upsample))

    def forward(self, maps):
        return torch.cat([deblock(m) for deblock, m in zip(self.deblocks, maps)], 1)


class Anchor3DHead(nn.Module):
    """Of every anchor: scores of the classes, the box's code, its direction. -> (B, anchors, 3), (.., 7), (.., 2)."""

    def __init__(self, cin, classes):
        super().__init__()
        self.classes = classes
        n = classes * len(YAWS)
        self.conv_cls = nn.Conv2d(cin, n * classes, 1)
        self.conv_reg = nn.Conv2d(cin, n * 7, 1)
        self.conv_dir_cls = nn.Conv2d(cin, n * 2, 1)
        for conv in (self.conv_cls, self.conv_reg):
            nn.init.normal_(conv.weight, 0, 0.01)
            nn.init.zeros_(conv.bias)
        nn.init.constant_(self.conv_cls.bias, -math.log(99))  # focal loss: every score begins at .01

    def forward(self, x):
        answers = ((self.conv_cls, self.classes), (self.conv_reg, 7), (self.conv_dir_cls, 2))
        return [conv(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, n)).float() for conv, n in answers]


class Detector(nn.Module):
    """MVX-Net. forward(batch of data_det3d.augment) -> loss, stats; detect(batch) -> boxes, scores, classes."""

    def __init__(self, c):
        super().__init__()
        self.layout = Layout(c)
        self.protocol = self.layout.protocol
        self.frozen, levels = (), 0
        if c.image:
            self.img_backbone = encoders.build_image_encoder(c.image_encoder)
            if len(self.img_backbone.map_channels) != 5:
                raise BadInput(f"--image-encoder {c.image_encoder}: the pyramid wants five maps, of strides 2 to 32")
            self.frozen = encoders.freeze_parts(self.img_backbone, c.freeze)
            self.img_neck = encoders.FPN(self.img_backbone.map_channels[1:], c.fpn)
            levels = 5
        self.pts_voxel_encoder = DynamicVFE(c, self.layout, levels)
        self.pts_middle_encoder = SparseEncoder(c)
        self.pts_backbone = SECOND(c, self.layout.grids[-1].shape[0] * c.sparse[4])
        self.pts_neck = SECONDFPN(c)
        self.pts_bbox_head = Anchor3DHead(2 * c.neck, len(self.protocol.anchors))
        self.register_buffer("anchors", anchor_grid(self.layout), persistent=False)  # (Y, X, classes, yaws, 7)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.to(memory_format=torch.channels_last)  # faster, on CPUs too

    def train(self, mode=True):
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def answers(self, batch):
        """Raw answers of all anchors: scores (B, A, 3), codes (B, A, 7), directions (B, A, 2), float32."""
        maps, cells = [], []
        if hasattr(self, "img_backbone"):
            image = batch["image"].contiguous(memory_format=torch.channels_last)
            maps = self.img_neck(self.img_backbone(image)[1:])
            uv = self.pixels(batch)
            cells = [encoders.cells(self.img_backbone, uv, at) for at in range(1, 5)]
            cells.append(cells[-1] / 2)  # of the pyramid's last map, which takes every other cell
        x = self.pts_voxel_encoder(batch, maps, cells)
        x = self.pts_middle_encoder(x, batch["levels"], len(batch["image"]))
        x = x.contiguous(memory_format=torch.channels_last)
        return self.pts_bbox_head(self.pts_neck(self.pts_backbone(x)))

    def pixels(self, batch):
        """Pixels of the points, each frame's in a row of its own: (B, L, 2). Far outside where a row has no more."""
        points, frames = batch["points"], len(batch["image"])
        uv, depth = data.project(points[:, None], batch["lidar2img"][batch["frame"]])  # (N, 1, 2)
        uv = torch.where(depth[..., None] > 0, uv, -1e4)[:, 0]
        rows = uv.new_full((frames * batch["longest"], 2), -1e4)
        return rows.index_copy(0, batch["slot"], uv).view(frames, -1, 2)

    def forward(self, batch, report=True):
        scores, codes, directions = self.answers(batch)
        with torch.autocast(scores.device.type, enabled=False):
            target = assign(self.anchors, batch["boxes"], batch["classes"], self.protocol)
            losses = detection_losses(scores, codes, directions, self.anchors.flatten(0, 3), target, self.protocol)
        loss = sum(losses.values())
        if not report:
            return loss, {}
        positives = (target["classes"] >= 0).sum() / len(scores)
        return loss, {"loss": loss.detach(), **{k: v.detach() for k, v in losses.items()}, "positives": positives}

    def detect(self, batch):
        """-> boxes (B, K, 7), scores (B, K), classes (B, K), best first; a score of 0 says that there is no box."""
        return select(*self.answers(batch), self.anchors.flatten(0, 3), self.protocol)


# -----------------------------------------------------------------------------
# training


def build_optimizers(model, c):
    """AdamW for all but the image branch; SGD (or AdamW) for the image encoder and its pyramid."""
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    image = [p for name, p in learns.items() if name.startswith("img_")]
    points = [p for name, p in learns.items() if not name.startswith("img_")]
    optimizers = [torch.optim.AdamW(points, c.lr, betas=(0.95, 0.99), weight_decay=0.01, fused=True)]
    if image and c.image_optimizer == "sgd":
        optimizers.append(torch.optim.SGD(image, c.image_lr, momentum=0.9, weight_decay=1e-4, fused=True))
    elif image:
        optimizers.append(torch.optim.AdamW(image, c.image_lr, betas=(0.95, 0.99), weight_decay=0.01, fused=True))
    return optimizers


def rate(step, steps, warm_up, drops=()):
    """The rate at a step, as a share of the highest: a straight rise from a tenth, then a cosine to 1e-5, or with
    `drops` (shares of the steps) a tenth of what it was from each of them on."""
    warm_up = min(warm_up, steps - 1)
    if step < warm_up:
        return 0.1 + 0.9 * step / warm_up
    if drops:
        return 0.1 ** sum(step >= share * steps for share in drops)
    return 1e-5 + (1 - 1e-5) * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def check_config(c, world):
    """-> runtime.split_batch. Raises BadInput, naming the flag, for what cannot work."""
    split = runtime.split_batch(c, world)
    runtime.check_range(c, "epochs log_every save_every keep_rows second_layers", 1, 1e9, "1 or more")
    runtime.check_range(c, "fpn fusion vfe sparse second neck upsample", 1, 4096, "from 1 to 4096")
    runtime.check_range(c, "lr image_lr", 1e-30, 1e30, "above 0")
    runtime.check_range(c, "seed workers max_steps eval_every keep_every eval_frames", 0, 1e9, "0 or more")
    runtime.check_range(c, "max_points warm_up clip translation synthetic_frames", 0, 1e9, "0 or more")
    runtime.check_range(c, "rotation", 0, 180, "from 0 to 180")
    runtime.check_range(c, "labels", 1e-30, 1, "above 0, and 1 or less")
    runtime.check_range(c, "flip norm_momentum", 0, 1, "from 0 to 1")
    runtime.check_range(c, "drops", 0, 1, "from 0 to 1, rising", rising=True)
    runtime.check_range(c, "scale", 0.2, 5, "from 0.2 to 5, the smaller first", rising=True)
    runtime.check_range(c, "voxel", 1e-3, 10, "from .001 to 10")
    low, high = c.point_range[:3], c.point_range[3:]
    cells = [(b - a) / size for a, b, size in zip(low, high, c.voxel)]
    whole = all(abs(n - round(n)) < 1e-3 for n in cells)
    enough = min(cells) >= 16 and cells[2] >= 24  # above, the encoder's last stage would have no cell left
    if not (whole and enough and round(cells[0]) % 16 == 0 and round(cells[1]) % 16 == 0):
        wanted = "must be whole voxels: a multiple of 16 along x and y, 24 or more along z"
        raise BadInput(f"--point-range {' '.join(map(str, c.point_range))}: {wanted}")
    data.check_image_scale(c.image_scale)
    if c.upsample[1] != 2 * c.upsample[0]:
        raise BadInput(f"--upsample {c.upsample[0]} {c.upsample[1]}: the second must be twice the first")
    if c.protocol == "waymo" and c.moca:
        raise BadInput("--moca: pastes KITTI's classes alone; with --protocol waymo give --no-moca")
    if c.protocol == "waymo" and c.keep_rows > 1:
        raise BadInput(f"--keep-rows {c.keep_rows}: the rows are those of KITTI's LiDAR; Waymo has five LiDARs")
    if c.elongation and c.moca:
        raise BadInput("--elongation: pasted objects have none; give --no-moca")
    if c.init != "none" and not c.image:
        raise BadInput("--init: with --no-image there is no image encoder")
    if c.init != "none" and c.load:
        raise BadInput("--init: the file of --load has an image encoder, too; give one of them")
    return split


def load_frames(c, run):
    """-> frames to train on, frames held out, notes to print. Raises BadInput as data_det3d.pool_frames, and for frames
    that are not those of the protocol, or whose points lack a number.
    """
    synthetic.write_scenes(c, run)
    if c.protocol == "kitti":
        data_sets.refuse_waymo((*c.data_root, *c.eval_root))
    train, notes = runtime.main_first(run, lambda: data_det3d.pool_frames(c.data_root, c.splits, c.skip_missing))
    held_out, flag = [], runtime.held_out_flag(c)
    if c.eval_splits or c.eval_root:
        rules = c.eval_root or c.data_root, c.eval_splits, c.skip_missing, "--eval-splits", c.eval_frames
        held_out, more = runtime.main_first(run, lambda: data_det3d.pool_frames(*rules))
        notes += more
    eval_boxes.check_frames(train, c, held_out)
    data.check_unseen(train, held_out, flag)
    notes += data.shared_drives(train, held_out, flag)
    train = data.share_of(train, c.labels)
    return train, held_out, notes


def load_detector(model, path, pixels):
    """Weights of a whole detector by name: this script's or mmdetection3d's, whose first convolution is converted to
    pixels as they are here (weights.py). -> lines for the user. Raises BadInput where one is missing or misfits.
    """
    saved = read_checkpoint(path)
    wrapped = [saved.get(name) for name in ("model", "state_dict")] if isinstance(saved, dict) else []
    tensors = next((found for found in (*wrapped, saved) if isinstance(found, dict)), {})
    own = model.state_dict()
    fitting = {k: v for k, v in tensors.items() if k in own and getattr(v, "shape", None) == own[k].shape}
    lacking = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    if lacking:
        counts = f"{len(fitting)} of {len(own)} tensors fit, {lacking[0]} does not"
        raise BadInput(f"{path}: {counts}; is it a detector of the same configuration?")
    model.load_state_dict(fitting, strict=False)
    lines = [f"{path}: {len(fitting)} tensors of a detector loaded, {len(tensors) - len(fitting)} left"]
    if hasattr(model, "img_backbone"):
        lines.append(weights.load_image_encoder(model.img_backbone, path, pixels))
    return "\n".join(lines)


def train(c):
    run = runtime.start_run(c.device, c.seed)
    group, accumulate, a_step = check_config(c, run.world)

    # ============ network and optimisers ============
    model = Detector(c).to(run.device)
    notes = []
    if c.image and c.init != "none":
        notes.append(weights.load_image_encoder(model.img_backbone, c.init, c.init_pixels))
    if c.load:
        notes.append(load_detector(model, c.load, c.init_pixels))
    optimizers = build_optimizers(model, c)

    # ============ data ============
    frames, held_out, more = load_frames(c, run)
    notes += more
    if len(frames) < c.batch_size:
        raise BadInput(f"--batch-size {c.batch_size}: the {len(frames)} frames found are too few")
    inventory = data.inventory(frames)
    steps_per_epoch = len(frames) // c.batch_size
    steps = c.max_steps or c.epochs * steps_per_epoch
    # what it starts from is part of the experiment, the path it lay at is not
    start = {"start": runtime.hash_of(model.state_dict()) if c.load or c.init != "none" else "none"}
    labelled = {"frames": data.fingerprint(data_det3d.inventory(frames))}
    identity = runtime.as_json(c, without=FREE) | {"group": group} | labelled | start
    judgement = (lambda: eval_boxes.judge(model, held_out, c, run)) if held_out else None
    loop = Loop(c, run, model, optimizers, identity, data.Names(frames), "det3d", judgement)
    unless_bad(data_det3d.DetectionFrames(frames, c, model.layout)[0, 0])  # before anything is written
    bank = data_det3d.open_bank(frames, loop.folder, c.keep_rows, run) if c.moca else None
    dataset = data_det3d.DetectionFrames(frames, c, model.layout, bank)
    batches = data.Batches(len(frames), c.batch_size, group, c.seed, run.rank, run.world, loop.start, steps)
    collate = functools.partial(data_det3d.collate, model.layout)
    loaded = stream(dataset, batches, collate, c.workers, run)

    def next_batch(step):
        """The next forward pass's batch, augmented as in that step; None after the last."""
        if step < steps:
            box = data.random_image_scale(c.image_scale, c.seed, step)
            return data_det3d.augment(next(loaded), box, model.layout, run.device)

    # ============ the loop ============
    batch = next_batch(loop.start)
    about = runtime.provenance(run, __file__)
    about |= {"config": runtime.as_json(c), "data": {"frames": len(frames), "fingerprint": identity["frames"]}}
    million = sum(p.numel() for p in loop.owned) / 1e6
    objects = f", {len(bank.entries)} objects to paste" if bank else ""
    lines = [
        *notes,
        f"{c.name}: {len(frames)} frames, {len(held_out)} held out{objects}",
        f"{million:.1f} M parameters that learn, {run.world} x {run.device.type}; {a_step}",
        f"steps {loop.start} to {steps}, {steps_per_epoch} an epoch, into {loop.folder}/",
    ]
    loop.begin(steps, about, lines)
    for step in loop:
        loop.set_rate(rate(step, steps, c.warm_up, c.drops))

        # forward and backward, pass by pass; the next batch is fetched while a GPU still computes
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with loop.sharing(last):
                with runtime.mixed_precision(c.amp, run.device):
                    loss, stats = loop.model(batch, loop.reporting and last)
                (loss / accumulate).backward()
            loop.watch(loss, batch["index"])
            batch = loop.waiting(next_batch, step + last)

        if c.clip:
            stats["grad_norm"] = nn.utils.clip_grad_norm_(loop.owned, c.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loop.stepped()

        # once in a while: write how it goes, save, judge
        if loop.reporting:
            stats = loop.report(step // steps_per_epoch, stats)
            loop.bar.set_postfix_str(f"loss {stats['loss']:.3f}")
        if loop.saving:  # first: judging may stop at a broken file
            loop.save(inventory=data.digests(inventory))
        if loop.judging:
            loop.judge()
    if not loop.stopping:
        finish(model, c, run, frames, held_out, loop)
        loop.end()


def finish(model, c, run, frames, held_out, loop):
    """Figures on held-out frames, and a picture of one of them."""
    if not run.main:
        return
    folder = loop.folder
    rules = eval_boxes.RULES[c.protocol]
    losses = ("classes", "boxes", "direction")
    curves = "det3d", losses, rules.title, rules.headline, "AdamW"
    pictures_boxes.draw_curves(folder / "log.jsonl", folder / "curves.png", *curves)
    said = eval_boxes.draw(model, held_out or frames, c, run.device, folder / "det3d.png")
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} into {folder}/\ndet3d.png: {said}")
    if held_out:
        print("\n" + "\n".join(eval_boxes.report(loop.judged, held_out, c)))


def main():
    runtime.command_line(lambda: tyro.extras.overridable_config_cli(PRESETS), train)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
