"""Monocular 3D detection, the paper's Table 4: FCOS3D. Boxes in metres from one image, without any LiDAR.

    torchrun --standalone finetune_mono3d.py demo --init out/demo/backbone.pt    # built-in scenes, minutes on two cores
    torchrun --standalone finetune_mono3d.py demo --init none --name scratch     # the same from scratch

The paper's recipe on nuScenes, on one GPU or eight (same global batch, same groups of 2); the same network on KITTI:

    torchrun --standalone --nproc_per_node=8 finetune_mono3d.py nuscenes --init out/waymo/backbone.pt \\
        --data-root data/nuscenes
    torchrun --standalone finetune_mono3d.py kitti --init out/kitti/backbone.pt --data-root data/kitti

Resume: the same command again. Every flag: `python finetune_mono3d.py nuscenes --help`. A run ends with nuScenes'
figures on held-out frames, and writes out/NAME/: log.jsonl, last.pt, curves.png, mono3d.png. `python eval.py mono3d
out/NAME/last.pt` judges it again, or on other data.

The network is FCOS3D (Wang et al. 2021) as mmdetection3d has it: a ResNet with deformable convolutions, a feature
pyramid, and a head that says of every cell what object it is near the centre of, and where that is: its pixel, depth,
size, heading, velocity, attribute. Names of parameters are mmdetection3d's.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn

import data
import data_mono3d
import data_nuscenes
import encoders
import eval_mono3d
import ops_boxes
import pictures_boxes
import runtime
import synthetic
import weights
from data_mono3d import CLASSES, NO_ATTRIBUTE
from files import BadInput
from loop import Loop, stream
from ops_deform import DeformConv2d


@dataclass
class Config:
    """Everything a run depends on. Defaults are the release's for nuScenes."""

    # ---- data ----
    dataset: Literal["nuscenes", "kitti"] = "nuscenes"
    """Whose labels: nuScenes' ten classes with velocities and attributes, or KITTI's cars, pedestrians and cyclists."""
    data_root: tuple[str, ...] = ("data/nuscenes",)
    """Folder in that data set's layout, with labels; several of KITTI's are pooled."""
    splits: tuple[str, ...] = ("train",)
    """Of nuScenes: train, val, mini_train, mini_val. Of KITTI: names of files in ImageSets/."""
    eval_splits: tuple[str, ...] = ("val",)
    """What the run ends by judging itself on. () for nothing."""
    eval_root: tuple[str, ...] = ()
    """Folders that eval_splits are looked up in; () for data_root."""
    eval_frames: int = 0
    """At most so many samples of them, evenly spread, each with all its cameras; 0 for all."""
    eval_every: int = 0
    """Steps between judgements, each a line in log.jsonl. 0: only after the last step, which is the one to report."""
    labels: float = 1.0
    """Share of the training frames that is used, evenly spread: how much annotation does pre-training save?"""
    cameras: tuple[str, ...] = data_nuscenes.CAMERAS
    """Of nuScenes: which cameras. Each makes a frame of every sample."""
    version: str = "auto"
    """Of nuScenes: the folder of tables, such as v1.0-mini. auto: the one that a split is of."""
    frame_stride: int = 1
    """Of nuScenes: train on every n-th sample. All are judged on, but for --eval-frames."""
    skip_missing: bool = False
    """Leave out frames that lack an image (KITTI: or a cloud), instead of stopping at them."""
    synthetic_frames: int = 0
    """Write this many built-in scenes first, if data_root is data/synthetic and does not exist."""
    workers: int = 4
    """Loading processes per GPU; 0 loads in the training process."""
    # ---- augmentation ----
    flip: float = 0.5
    """Probability that an image is mirrored, its boxes, velocities and camera with it."""
    image_scale: tuple[int, ...] = (1600, 900)
    """Box (width, height) that images are resized into, keeping their ratio, for training and judging."""
    # ---- network ----
    init: str = "none"
    """Weights the image encoder starts from: anybody's, see weights.py, or by name: imagenet, simipu-kitti, timm:NAME,
    see weights_named.py. none: from scratch.
    """
    init_pixels: Literal["auto", "rgb", "bgr", "rgb_mean", "bgr_mean"] = "auto"
    """How that file's pixels were normalised, where it does not say."""
    image_encoder: str = "resnet50"
    """resnet18, 34, 50, 101, or timm:NAME when timm is installed."""
    deformable: bool = True
    """Deformable convolutions in stages 3 and 4 of a ResNet, and in the last one that each half of the head shares."""
    freeze: encoders.Freeze = "first"
    """What of the image encoder stays as it is, statistics included: none, its first stage, or all of it. From scratch
    this freezes random filters, as the release's configuration does."""
    width: int = 256
    """Channels of the feature pyramid and of the head, a multiple of 32."""
    centre_width: int = 64
    """Channels before the answer how central a cell is, a multiple of 32."""
    ranges: tuple[float, float, float, float] = (48.0, 96.0, 192.0, 384.0)
    """Which of the five maps answers for an object: by its cells' largest distance to a side of the rectangle around
    it, up to so many pixels of the resized image."""
    first_depth: float = 1.0
    """Metres that an untrained head takes everything to be away. Short runs want what is usual."""
    # ---- optimisation ----
    batch_size: int = 16
    """Images per step, over all GPUs."""
    group: int = 2
    """Images per forward pass, over which batch norm and the number of positives are taken: 2 on each of eight GPUs in
    the release. If the GPUs together take less than batch_size in a pass, passes are accumulated."""
    epochs: int = 12
    """The rate falls to a tenth after 8 and 11 twelfths of them."""
    max_steps: int = 0
    """Steps in place of those epochs; 0: as many as they make."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is the release's: momentum .9, weight decay 1e-4, biases at twice the rate and without decay."""
    lr: float = 8e-3
    """The highest rate. adamw wants a tenth of it."""
    warm_up: int = 500
    """Steps in which the rate rises, from a third."""
    clip: float = 35.0
    """Norm that gradients are cut to; 0 for not at all."""
    # ---- the run ----
    name: str = "mono3d_nuscenes"
    """The run lives in out/NAME."""
    out: str = "out"
    """Folder of all runs."""
    seed: int = 0
    """Of weights, order and mirroring."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    amp: Literal["gpu", "always", "never"] = "gpu"
    """bfloat16 autocast: on GPUs, on CPUs too, or not at all. Offsets of deformable convolutions, answers, boxes and
    losses stay in float32.
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
            name="mono3d_demo", dataset="kitti", data_root=("data/synthetic",), synthetic_frames=64, workers=1,
            image_scale=(320, 96), image_encoder="resnet18", deformable=False, freeze="none", width=64,
            ranges=(32.0, 64.0, 128.0, 256.0), first_depth=20.0, batch_size=4, group=4, max_steps=720,
            optimizer="adamw", lr=1e-3, warm_up=18, clip=10.0, log_every=10, save_every=120,
        ),
    ),
    "kitti": (
        "KITTI's object benchmark: the same network on three classes.",
        Config(
            name="mono3d_kitti", dataset="kitti", data_root=("data/kitti",), image_scale=(1242, 375), epochs=48,
        ),
    ),
    "nuscenes": ("nuScenes: the paper's recipe.", Config()),
}  # fmt: skip

STRIDES = (8, 16, 32, 64, 128)  # of the pyramid's maps, pixels
RADIUS = 1.5  # strides, along both axes, from an object's projected centre to the cells that answer for it
STEEPNESS = 2.5  # of how central a cell is: exp(-2.5 d), d in shares of the largest distance there is
DIRECTION = math.pi / 4  # local headings from here on for half a turn are bin 0
GAMMA, ALPHA, BETA = 2.0, 0.25, 1 / 9  # of the focal loss, and of smooth L1
WEIGHTS = {"offset": 1.0, "depth": 0.2, "size": 1.0, "yaw": 1.0, "velocity": 0.05}  # of smooth L1's
MIN_SCORE, BEFORE_NMS, NMS_OVERLAP, AFTER_NMS = 0.05, 1000, 0.8, 200  # of a prediction (release)

# a checkpoint may be continued with other values of these; any other difference is another experiment
FREE = {"data_root", "workers", "name", "out", "device", "log_every", "save_every", "init"}
FREE |= {"keep_every", "track", "eval_splits", "eval_root", "eval_frames", "eval_every"}
FREE |= {"cameras", "version"}  # as data_root: the frames that they find must be the same


# -----------------------------------------------------------------------------
# network. Names of parts and parameters are mmdetection3d's


class NormedConv(nn.Module):
    """3x3 convolution with bias, group norm, ReLU."""

    def __init__(self, cin, cout, deformable=False):
        super().__init__()
        layer = DeformConv2d if deformable else nn.Conv2d
        self.conv = layer(cin, cout, 3, padding=1)
        self.gn = nn.GroupNorm(32, cout)

    def forward(self, x):
        return F.relu(self.gn(self.conv(x)), inplace=True)


class Scale(nn.Module):
    """A factor that is learned."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x * self.scale


def branch(width, *widths):
    """Convolutions one after another, the first of `width` channels; none is fine, too."""
    layers = [NormedConv(cin, cout) for cin, cout in zip((width, *widths), widths)]
    return nn.Sequential(*layers)


def answer(conv, x):
    """The last convolution of a branch, in float32: bfloat16 would leave depth in steps of more than 1 %."""
    with torch.autocast(x.device.type, enabled=False):
        return conv(x.to(conv.weight.dtype))


class FCOSMono3DHead(nn.Module):
    """What every cell of every map says; one head for all maps, but for three learned factors of each.

    -> dict of (B, P, n) float32, P cells of all maps end to end: scores (classes, logits); offset (2), from the
    object's projected centre to the cell, in strides; depth (1), metres; size (3), length, height, width; yaw (1),
    local; direction (2), attributes (9) and centreness (1), logits; velocity (2). Velocity and attributes of nuScenes
    alone.
    """

    def __init__(self, c):
        super().__init__()
        width, moves = c.width, c.dataset == "nuscenes"
        self.cls_convs, self.reg_convs = (
            nn.ModuleList([NormedConv(width, width), NormedConv(width, width, c.deformable)]) for _ in range(2)
        )
        self.conv_cls_prev, self.conv_cls = branch(width, width), nn.Conv2d(width, len(CLASSES[c.dataset]), 1)
        self.parts = {"offset": 2, "depth": 1, "size": 3, "yaw": 1} | ({"velocity": 2} if moves else {})
        widths = {name: () if name == "velocity" else (width,) for name in self.parts}
        self.conv_reg_prevs = nn.ModuleList(branch(width, *widths[name]) for name in self.parts)
        self.conv_regs = nn.ModuleList(nn.Conv2d(width, n, 1) for n in self.parts.values())
        self.conv_dir_cls_prev, self.conv_dir_cls = branch(width, width), nn.Conv2d(width, 2, 1)
        if moves:
            self.conv_attr_prev, self.conv_attr = branch(width, width), nn.Conv2d(width, NO_ATTRIBUTE + 1, 1)
        self.conv_centerness_prev = branch(width, c.centre_width)
        self.conv_centerness = nn.Conv2d(c.centre_width, 1, 1)
        self.scales = nn.ModuleList(nn.ModuleList(Scale() for _ in range(3)) for _ in STRIDES)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith("conv_offset"):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.conv_cls.bias, -math.log(99))  # focal loss: every score begins at .01
        nn.init.constant_(self.conv_regs[1].bias, math.log(c.first_depth))

    def forward(self, maps):
        levels = [self.answers(x, scales) for x, scales in zip(maps, self.scales)]
        flat = lambda x: x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, cells, n)
        said = {name: torch.cat([flat(level[name]) for level in levels], 1) for name in levels[0]}
        said["depth"], said["size"] = said["depth"].exp(), said["size"].exp()
        return said

    def answers(self, x, scales):
        """The raw answers of one map, (B, n, H, W) each."""
        classes, box = x, x
        for layer in self.cls_convs:
            classes = layer(classes)
        for layer in self.reg_convs:
            box = layer(box)
        said = {"scores": answer(self.conv_cls, self.conv_cls_prev(classes))}
        for name, before, conv in zip(self.parts, self.conv_reg_prevs, self.conv_regs):
            said[name] = answer(conv, before(box))
        for name, scale in zip(("offset", "depth", "size"), scales):
            said[name] = scale(said[name])
        said["direction"] = answer(self.conv_dir_cls, self.conv_dir_cls_prev(box))
        if hasattr(self, "conv_attr"):
            said["attributes"] = answer(self.conv_attr, self.conv_attr_prev(classes))
        said["centreness"] = answer(self.conv_centerness, self.conv_centerness_prev(box))
        return said


class FCOS3D(nn.Module):
    """forward(batch of data_mono3d.augment) -> loss, stats; detect(batch) -> what is found."""

    def __init__(self, c):
        super().__init__()
        self.ranges = c.ranges
        self.backbone = encoders.build_image_encoder(c.image_encoder, (3, 4) if c.deformable else ())
        if len(self.backbone.map_channels) != 5:
            raise BadInput(f"--image-encoder {c.image_encoder}: the pyramid wants five maps, of strides 2 to 32")
        self.frozen = encoders.freeze_parts(self.backbone, c.freeze)
        self.neck = encoders.FPN(self.backbone.map_channels[2:], c.width, further=2)
        self.bbox_head = FCOSMono3DHead(c)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # faster, on CPUs too

    def train(self, mode=True):
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def answers(self, batch):
        """-> what the head says, and the Cells that say it."""
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        maps = self.neck(self.backbone(image)[2:])
        offsets = [*self.backbone.offsets[2:], *[self.backbone.offsets[-1]] * 2]
        return self.bbox_head(maps), Cells([m.shape[2:] for m in maps], offsets, self.ranges, image.device)

    def forward(self, batch, report=True):
        said, cells = self.answers(batch)
        with torch.autocast(batch["image"].device.type, enabled=False):
            target = assign(cells, batch)
            losses = detection_losses(said, target)
        loss = sum(losses.values())
        if not report:
            return loss, {}
        positives = (target["classes"] >= 0).sum() / len(batch["image"])
        return loss, {"loss": loss.detach(), **{k: v.detach() for k, v in losses.items()}, "positives": positives}

    def detect(self, batch):
        """-> as `select`."""
        return select(*self.answers(batch), batch["intrinsic"])


# -----------------------------------------------------------------------------
# cells, and what they should say


class Cells:
    """The cells of all maps, end to end: places (P, 2), the pixels that they are centred on; strides (P,); low, high
    (P,), between which their range lies; counts, of each map.

    shapes: (height, width) of the maps; offsets: pixel of each map's first cell; ranges: between the maps, pixels.
    """

    def __init__(self, shapes, offsets, ranges, device):
        self.counts = [height * width for height, width in shapes]
        places, strides, low, high = [], [], [], []
        limits = [-1.0, *ranges, math.inf]
        for i, (height, width) in enumerate(shapes):
            v, u = (STRIDES[i] * torch.arange(n, device=device) + offsets[i] for n in (height, width))
            places.append(torch.stack(torch.meshgrid(u, v, indexing="xy"), -1).flatten(0, 1).float())
            one = torch.ones(self.counts[i], device=device)
            strides.append(STRIDES[i] * one)
            low.append(limits[i] * one)
            high.append(limits[i + 1] * one)
        self.places, self.strides, self.low, self.high = (torch.cat(x) for x in (places, strides, low, high))


def project(xyz, intrinsic):
    """Pixels of places (B, M, 3) in the camera's axes. intrinsic (B, 3, 3) -> (B, M, 2)."""
    focal, middle = intrinsic[:, None, (0, 1), (0, 1)], intrinsic[:, None, :2, 2]
    return xyz[..., :2] / xyz[..., 2:].clamp(min=1e-3) * focal + middle


def assign(cells, batch):
    """What each cell should say.

    A cell is positive for an object whose projected centre is within RADIUS strides along both axes, and whose
    rectangle's sides are as far as its map's range says, at most; for the nearest of several.
    -> dict: classes (B, P), -1 for background; offset, depth, size, velocity (NaN where not known) (B, P, n), as
    FCOSMono3DHead says them; yaw (B, P, 1), that of the box less the direction in which its centre is seen; attributes,
    centreness (B, P). Of cells that are background all but `classes` means nothing.
    """
    boxes, intrinsic = batch["boxes"], batch["intrinsic"]
    centres = project(boxes[..., :3], intrinsic)  # (B, M, 2)
    places, strides = cells.places[:, None], cells.strides[:, None]
    away = places - centres[:, None]  # (B, P, M, 2)
    rects = batch["rects"][:, None]  # (B, 1, M, 4)
    farthest = torch.cat([places - rects[..., :2], rects[..., 2:] - places], -1).amax(-1)
    near = away.abs().amax(-1) < RADIUS * strides
    ranged = (farthest >= cells.low[:, None]) & (farthest <= cells.high[:, None])
    distance = away.square().sum(-1).sqrt()
    asked = near & ranged & (batch["kinds"] >= 0)[:, None]
    least, owner = distance.masked_fill(~asked, math.inf).min(2)  # (B, P)
    pick = lambda x: torch.take_along_dim(x, owner[..., None], 1)
    boxes, centres = pick(boxes), pick(centres)
    positive = least < math.inf
    kinds, attributes = (batch[name].gather(1, owner) for name in ("kinds", "attributes"))
    relative = least / (1.414 * RADIUS * cells.strides)
    seen_at = torch.atan2(centres[..., 0] - intrinsic[:, None, 0, 2], intrinsic[:, None, 0, 0])
    return {
        "classes": torch.where(positive, kinds, -1),
        "offset": (cells.places - centres) / strides,
        "depth": boxes[..., 2:3],
        "size": boxes[..., 3:6],
        "yaw": (boxes[..., 6] - seen_at)[..., None],
        "velocity": pick(batch["velocity"]),
        "attributes": attributes,
        "centreness": torch.exp(-STEEPNESS * torch.where(positive, relative, 0.0)),
    }


def direction_bin(yaw):
    """0 for local headings from DIRECTION on for half a turn, else 1."""
    return (torch.remainder(yaw - DIRECTION, 2 * math.pi) >= math.pi).long()


def detection_losses(said, target):
    """Focal loss of all cells, over the number of positive ones and of images; smooth L1 of what boxes are made of,
    with the sine of the headings' difference, and cross-entropies, over the positive ones. -> dict of scalars.

    Masks over all cells, not indices: no GPU is waited for.
    """
    label = target["classes"]
    positive = label >= 0
    count = positive.sum().float()
    some = count.clamp(min=1)
    wanted = F.one_hot(label.clamp(min=0), said["scores"].shape[2]) * positive[..., None]
    probability = said["scores"].sigmoid()
    wrong = torch.where(wanted > 0, 1 - probability, probability)
    balance = torch.where(wanted > 0, ALPHA, 1 - ALPHA)
    entropy = F.binary_cross_entropy_with_logits(said["scores"], wanted.float(), reduction="none")
    losses = {"classes": (balance * wrong.pow(GAMMA) * entropy).sum() / (count + len(label))}
    for name, weight in WEIGHTS.items():
        if name not in said:
            continue
        counts = positive[..., None] & ~target[name].isnan()
        difference = torch.where(counts, said[name] - target[name], 0.0)
        if name == "yaw":
            difference = difference.sin()
        distance = F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=BETA, reduction="none")
        losses[name] = weight * distance.sum() / some

    def crossed(answers, classes):
        return F.cross_entropy(answers.transpose(1, 2), classes, reduction="none")

    direction = direction_bin(target["yaw"][..., 0])
    losses["direction"] = (crossed(said["direction"], direction) * positive).sum() / some
    centreness = target["centreness"]
    entropy = F.binary_cross_entropy_with_logits(said["centreness"][..., 0], centreness, reduction="none")
    losses["centreness"] = (entropy * positive).sum() / some
    if "attributes" in said:
        share = centreness * positive
        entropy = crossed(said["attributes"], target["attributes"])
        losses["attributes"] = (entropy * share).sum() / share.sum().clamp(min=1e-6)
    return losses


# -----------------------------------------------------------------------------
# what the answers mean


def decode(said, places, strides, intrinsic):
    """Answers (B, K, n) of cells at places (B, K, 2) with strides (B, K) -> boxes (B, K, 7) in the camera's axes."""
    focal, middle = intrinsic[:, None, (0, 1), (0, 1)], intrinsic[:, None, :2, 2]
    ray = (places - said["offset"] * strides[..., None] - middle) / focal
    half_turns = said["direction"].argmax(2)
    yaw = DIRECTION + torch.remainder(said["yaw"][..., 0] - DIRECTION, math.pi) + math.pi * half_turns
    ry = yaw + torch.atan(ray[..., 0])
    ry = torch.remainder(ry + math.pi, 2 * math.pi) - math.pi
    return torch.cat([ray * said["depth"], said["depth"], said["size"], ry[..., None]], 2)


def select(said, cells, intrinsic):
    """What all cells say -> what is found in each image, best first: dict of boxes (B, K, 7) in the camera's axes,
    scores (B, K), classes (B, K) and, of nuScenes, velocity (B, K, 2) and attributes (B, K). A score of 0 says that
    there is nothing.

    The best BEFORE_NMS cells of each map, by class score times centreness; of their scores above MIN_SCORE the best
    BEFORE_NMS; suppression seen from above, class by class; AFTER_NMS are kept. It waits for a GPU.
    """
    scores = said["scores"].sigmoid() * said["centreness"].sigmoid()  # (B, P, classes)
    best, rows, first = scores.amax(2), [], 0
    for count in cells.counts:
        top = best[:, first : first + count].topk(min(BEFORE_NMS, count)).indices
        rows.append(top + first)
        first += count
    rows = torch.cat(rows, 1)  # (B, R)
    classes = scores.shape[2]
    scores = torch.take_along_dim(scores, rows[..., None], 1).flatten(1)
    most = int((scores > MIN_SCORE).sum(1).amax().clamp(1, BEFORE_NMS))
    scores, at = scores.topk(most)  # (B, K)
    kinds, rows = at % classes, rows.gather(1, at // classes)
    picked = {name: torch.take_along_dim(x, rows[..., None], 1) for name, x in said.items()}
    boxes = decode(picked, cells.places[rows], cells.strides[rows], intrinsic)
    level = torch.tensor(data_mono3d.LEVEL, device=boxes.device)
    sure = scores.masked_fill(scores <= MIN_SCORE, -math.inf)
    kept = ops_boxes.nms(data_mono3d.from_camera(boxes, level), sure, NMS_OVERLAP, kinds)
    scores, order = scores.masked_fill(~kept, 0.0).topk(min(AFTER_NMS, most))
    pick = lambda x: torch.take_along_dim(x, order[..., None], 1)
    found = {"boxes": pick(boxes), "scores": scores, "classes": kinds.gather(1, order)}
    if "velocity" in picked:
        found |= {"velocity": pick(picked["velocity"]), "attributes": pick(picked["attributes"]).argmax(2)}
    return found


# -----------------------------------------------------------------------------
# training


def build_optimizer(model, c):
    """SGD, or AdamW. Biases have twice the rate and no decay, but for those of norms and of deformable convolutions."""
    bent = {id(p) for m in model.modules() if isinstance(m, DeformConv2d) for p in m.parameters()}
    special = {id(m.bias) for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None} - bent
    learns = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learns if id(p) not in special]},
        {"params": [p for p in learns if id(p) in special], "lr": 2 * c.lr, "weight_decay": 0.0},
    ]
    if c.optimizer == "sgd":
        return torch.optim.SGD(groups, c.lr, momentum=0.9, weight_decay=1e-4, fused=True)
    return torch.optim.AdamW(groups, c.lr, weight_decay=0.01, fused=True)


def rate(step, steps, warm_up):
    """The rate at a step, as a share of the highest: a straight rise from a third, a tenth from 8 twelfths of the steps
    on, a hundredth from 11.
    """
    rise = min(1.0, 1 / 3 + 2 / 3 * step / warm_up) if warm_up else 1.0
    drops = sum(12 * step >= share * steps for share in (8, 11))
    return rise * 0.1**drops


def check_config(c, world):
    """-> runtime.split_batch. Raises BadInput, naming the flag, for what cannot work."""
    split = runtime.split_batch(c, world)
    runtime.check_range(c, "epochs log_every save_every frame_stride", 1, 1e9, "1 or more")
    runtime.check_range(c, "lr labels first_depth", 1e-30, 1e30, "above 0")
    runtime.check_range(c, "seed workers max_steps eval_every keep_every eval_frames", 0, 1e9, "0 or more")
    runtime.check_range(c, "warm_up clip synthetic_frames", 0, 1e9, "0 or more")
    runtime.check_range(c, "labels flip", 0, 1, "from 0 to 1")
    runtime.check_range(c, "ranges", 1, 1e6, "from 1 on, rising", rising=True)
    for flag in ("width", "centre_width"):
        value = getattr(c, flag)
        if value < 32 or value % 32:
            raise BadInput(f"--{flag.replace('_', '-')} {value}: must be a multiple of 32")
    data.check_image_scale(c.image_scale)
    if len(c.image_scale) != 2:
        raise BadInput(f"--image-scale {' '.join(map(str, c.image_scale))}: must be two numbers, width and height")
    if c.deformable and not c.image_encoder.startswith("resnet"):
        raise BadInput(f"--image-encoder {c.image_encoder}: deformable stages are of ResNets; give --no-deformable")
    if c.dataset == "nuscenes" and max(len(c.data_root), len(c.eval_root)) > 1:
        raise BadInput("--data-root, --eval-root: one folder of nuScenes each")
    return split


def load_frames(c, run):
    """-> frames to train on, frames held out, notes to print. Raises BadInput as data_mono3d.pool_frames."""
    synthetic.write_scenes(c, run)
    asked = c.data_root, c.splits, "--splits", c.frame_stride
    train, notes = runtime.main_first(run, lambda: data_mono3d.pool_frames(c, *asked))
    held_out, flag = [], runtime.held_out_flag(c)
    if c.eval_splits or c.eval_root:
        judged = c.eval_root or c.data_root, c.eval_splits, "--eval-splits"
        held_out, more = runtime.main_first(run, lambda: data_mono3d.pool_frames(c, *judged))
        held_out = data_mono3d.few_samples(held_out, c.eval_frames)
        notes += more
    data.check_unseen(train, held_out, flag, data_mono3d.inventory)
    notes += data.shared_drives(train, held_out, flag)
    train = data.share_of(train, c.labels)
    return train, held_out, notes


def train(c):
    run = runtime.start_run(c.device, c.seed)
    group, accumulate, a_step = check_config(c, run.world)

    # ============ network and optimiser ============
    model = FCOS3D(c).to(run.device)
    notes = []
    if c.init != "none":
        notes.append(weights.load_image_encoder(model.backbone, c.init, c.init_pixels))
    optimizer = build_optimizer(model, c)

    # ============ data ============
    frames, held_out, more = load_frames(c, run)
    notes += more
    if len(frames) < c.batch_size:
        raise BadInput(f"--batch-size {c.batch_size}: the {len(frames)} frames found are too few")
    inventory = data_mono3d.inventory(frames)
    steps_per_epoch = len(frames) // c.batch_size
    steps = c.max_steps or c.epochs * steps_per_epoch
    # what it starts from is part of the experiment, the path it lay at is not
    start = {"start": runtime.hash_of(model.backbone.state_dict()) if c.init != "none" else "none"}
    labelled = {"frames": data.fingerprint(inventory)}
    identity = runtime.as_json(c, without=FREE) | {"group": group} | labelled | start
    truth = eval_mono3d.read_truth(c, held_out) if held_out else None
    judgement = (lambda: eval_mono3d.judge(model, held_out, truth, c, run)) if held_out else None
    loop = Loop(c, run, model, [optimizer], identity, data.Names(frames), "mono3d", judgement)
    dataset = data_mono3d.MonoFrames(frames, c)
    batches = data.Batches(len(frames), c.batch_size, group, c.seed, run.rank, run.world, loop.start, steps)
    loaded = stream(dataset, batches, data_mono3d.collate, c.workers, run)

    def next_batch(step):
        """The next forward pass's batch; None after the last."""
        if step < steps:
            return data_mono3d.augment(next(loaded), c.image_scale, run.device)

    # ============ the loop ============
    batch = next_batch(loop.start)
    about = runtime.provenance(run, __file__)
    about |= {"config": runtime.as_json(c), "data": {"frames": len(frames), "fingerprint": identity["frames"]}}
    million = sum(p.numel() for p in loop.owned) / 1e6
    lines = [
        *notes,
        f"{c.name}: {len(frames)} images, {len(held_out)} held out",
        f"{million:.1f} M parameters that learn, {run.world} x {run.device.type}; {a_step}",
        f"steps {loop.start} to {steps}, {steps_per_epoch} an epoch, into {loop.folder}/",
    ]
    loop.begin(steps, about, lines)
    for step in loop:
        loop.set_rate(rate(step, steps, c.warm_up))

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
        finish(model, c, run, frames, held_out, truth, loop)
        loop.end()


def finish(model, c, run, frames, held_out, truth, loop):
    """Figures on held-out frames, and a picture of one of them."""
    if not run.main:
        return
    folder = loop.folder
    losses = ("classes", "offset", "depth", "size", "yaw", "direction", "centreness", "velocity", "attributes")
    curves = "mono3d", losses, "mAP, %", lambda found: {"mAP": 100 * found["mean_ap"]}, "of all but biases"
    pictures_boxes.draw_curves(folder / "log.jsonl", folder / "curves.png", *curves)
    said = eval_mono3d.draw(model, held_out or frames, c, run.device, folder / "mono3d.png")
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} into {folder}/\nmono3d.png: {said}")
    if held_out:
        print("\n" + "\n".join(eval_mono3d.report(c, loop.judged, truth)))


def main():
    runtime.command_line(lambda: tyro.extras.overridable_config_cli(PRESETS), train)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
