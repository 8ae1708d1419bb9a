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
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        simipu.py kitti --data-root data/kitti --batch-size 64      # 4 frames on each of 16 GPUs; both nodes see out/

KITTI raw drives, one or many; odometry sequences; Waymo as data_waymo.py converts it; nuScenes' six cameras, all of it
or ten scenes:

    torchrun --standalone simipu.py kitti_raw --data-root data/kitti_raw
    torchrun --standalone simipu.py kitti_odometry --data-root data/kitti_odometry
    torchrun --standalone simipu.py waymo --data-root data/waymo
    torchrun --standalone simipu.py nuscenes --data-root data/nuscenes
    torchrun --standalone simipu.py nuscenes --data-root data/nuscenes --splits mini_train --eval-splits mini_val

Resume: the same command again. It goes on from out/NAME/last.pt, on a CPU to the same bits. Every flag:
`python simipu.py kitti --help`.

A run writes out/NAME/: log.jsonl, last.pt, backbone.pt (the image encoder, torchvision's key names), curves.png,
pairs.png.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import functools
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
import data_nuscenes
import data_sets
import encoders
import eval_match
import pictures
import runtime
import synthetic
import weights
from encoders import AGGREGATION, PointEncoder, ProjectionHead, build_image_encoder
from files import BadInput
from loop import Loop, stream


@dataclass
class Config:
    """Everything a run depends on. Defaults are the paper's; where it is silent, the official release's."""

    # ---- data ----
    data_root: tuple[str, ...] = ("data/kitti",)
    """Folder of a data set, which is known by what lies in it; several folders are pooled."""
    splits: tuple[str, ...] = ("train", "test")
    """Names of lists in ImageSets/: of frames, or of raw drives, where () takes them all. The paper pre-trains on train
    and test, and keeps val unseen. Of nuScenes: train, val, test, mini_train, mini_val. Of KITTI's odometry: train,
    val, test, or sequences such as 04.
    """
    cameras: tuple[str, ...] = data_nuscenes.CAMERAS
    """Of nuScenes: which cameras. Each makes a frame of every sweep."""
    version: str = "auto"
    """Of nuScenes: the folder of tables, such as v1.0-mini. auto: the one that a split is of."""
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
    """Keep every n-th frame of a raw drive or sequence, and of nuScenes' keyframes. Neighbours in a drive are near
    copies; 10 is good advice.
    """
    train_frames: int = 0
    """Train on at most so many frames, evenly spread; 0: on all."""
    skip_missing: bool = False
    """Leave out frames that lack an image or a cloud, instead of stopping at them."""
    synthetic_frames: int = 0
    """Write this many built-in scenes first, if data_root is data/synthetic and does not exist."""
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
    further away. Places outside the result, padding included, leave Eq. 7."""
    shift: tuple[float, float] = (0.0, 0.0)
    """The window moves by U(-1, 1) times these shares of the image's width and height."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of the jitter of brightness, contrast, saturation and hue. SimCLR's is .8 .8 .8 .2, MoCo v2's .4 .4 .4
    .1.
    """
    # ---- networks ----
    image_encoder: str = "resnet50"
    """resnet18, 34, 50, 101, or timm:NAME when timm is installed: any of its encoders that gives feature maps. Where
    their cells are centred is measured when they are built.
    """
    places: int = 1024
    """Places per cloud after the point encoder, hence pairs per cloud. The set abstractions keep 4, 2 and 1 times as
    many.
    """
    point_features: tuple[encoders.PointFeature, ...] = ("reflectance",)
    """What the point encoder's first layer sees of a point, one or several. The release: reflectance. height: z, of the
    view. shape: linearity, planarity, scattering and the normal's |z| of the nearest 16 points, the same in both views.
    """
    use_xyz: bool = False
    """Group neighbours with their relative position as features (PointNet++), at several times the cost. The release
    does not.
    """
    inter_stages: tuple[Literal[1, 2, 3, 4], ...] = (4,)
    """Stages of the image encoder whose features Eq. 7 compares, side by side: 4 is the last (stride 32), 3 the one
    before (stride 16).
    """
    point_hidden: int = 1024
    """Width of the point projection heads."""
    image_hidden: int = 2048
    """Width of the image projection head."""
    embed_dim: int = 128
    """Dimensions in which features are compared."""
    # ---- matching and losses ----
    matching: Literal["hungarian", "greedy", "rowwise"] = "hungarian"
    """greedy is the paper's ablation: the nearest pair first, then the nearest of what is left. rowwise is the
    release's: each place in turn takes the nearest one still free.
    """
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
    drop_twins: bool = False
    """Leave out of a pair's candidates those of places at the same spot: the point encoder keeps some points twice."""
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
    same_sweep: bool = False
    """Let a forward pass hold frames of one sweep, which cameras side by side both see."""
    epochs: int = 100
    """Paper: 50 to 100."""
    max_steps: int = 0
    """Steps in place of those epochs; 0: as many as they make."""
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
    """Weights the image encoder starts from: anybody's, see weights.py, or by name: imagenet, simipu-kitti, timm:NAME,
    see weights_named.py. ImageNet's make the paper's double fine-tuning.
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
    amp: Literal["gpu", "always", "never"] = "gpu"
    """bfloat16 autocast: on GPUs, on CPUs too, or not at all. Distances, logits and losses stay in float32."""
    compile: bool = False
    """torch.compile the image encoder, for any image size."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    save_every: int = 200
    """Steps between checkpoints. The last step and a polite kill save too."""
    keep_every: int = 0
    """Every so many steps, keep the checkpoint as step_N.pt beside last.pt. 0: none."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Show what log.jsonl says there, too, if that package is installed."""


PRESETS = {
    "demo": (
        "Built-in scenes, ResNet-18, minutes on two CPU cores.",
        Config(
            name="demo", data_root=("data/synthetic",), synthetic_frames=64, splits=("train",), eval_splits=("val",),
            num_points=4096, workers=1, image_scale=(512, 160),
            image_encoder="resnet18", places=128, point_hidden=256, image_hidden=512,
            batch_size=4, max_steps=140, image_optimizer="adamw", image_lr=1e-3,
            log_every=5, save_every=35, eval_every=35,
        ),
    ),
    "kitti": ("KITTI's object benchmark: the paper's recipe.", Config(eval_splits=("val",), eval_every=1000)),
    "kitti_raw": (
        "KITTI raw drives.",
        Config(data_root=("data/kitti_raw",), splits=(), frame_stride=10, name="kitti_raw"),
    ),
    "kitti_odometry": (
        "KITTI's odometry sequences, or SemanticKITTI's: every fifth frame of ten of them, judged on 08.",
        Config(
            name="kitti_odometry", data_root=("data/kitti_odometry",), splits=("train",), eval_splits=("val",),
            frame_stride=5, eval_every=1000,
        ),
    ),
    "waymo": (
        "Waymo, converted by data_waymo.py: the paper's other recipe.",
        Config(name="waymo", data_root=("data/waymo",), splits=("train",), eval_splits=("val",), eval_every=1000),
    ),
    "nuscenes": (
        "nuScenes keyframes. A camera sees some 2500 points of its sweep: half as many places, twice as many clouds.",
        Config(
            name="nuscenes", data_root=("data/nuscenes",), splits=("train",), eval_splits=("val",),
            num_points=2048, image_scale=(512, 288, 1600, 900), places=512, group=8,
            epochs=10, lr_decay=0.95, eval_every=1000,
        ),
    ),
}  # fmt: skip

# a checkpoint may be continued with other values of these; any other difference is another experiment
FREE = {"data_root", "workers", "epochs", "max_steps", "name", "out", "device", "compile", "log_every", "save_every"}
FREE |= {"keep_every", "track", "eval_splits", "eval_root", "eval_frames", "eval_every"}
FREE |= {"cameras", "version"}  # as data_root: the frames that they find must be the same


# -----------------------------------------------------------------------------
# matching: which place of view beta is which place of view alpha

MATCHING_THREADS = ThreadPoolExecutor(8)  # scipy's solver lets go of the GIL
COINCIDE = 1e-4  # metres: nearer than this two places are one point, seen through float32's rounding of T


def match_places(alpha, beta, method="hungarian"):
    """For each place of alpha its partner in beta: a permutation (P,) int64. alpha, beta (P, 3) float64, in one frame.

    hungarian minimises the sum of distances. Places that coincide are paired first: by the triangle inequality some
    optimal assignment contains them, and the cubic solver is left with two thirds of the problem. greedy (the paper's
    ablation) pairs the nearest two, then the nearest of what is left. rowwise (the release's code for it) lets each
    place in turn take the nearest one still free.
    """
    cost = cdist(alpha, beta)  # (P, P)
    if method == "greedy":
        return nearest_first(cost)
    if method == "rowwise":
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


def nearest_first(cost):
    """Pairs by rising cost, each row and column once: (P, P) -> columns (P,) of the rows.

    The nearest pair of all is each other's nearest. So are many others, and all of these can be taken at once: nothing
    cheaper will come for either. The first of equals is taken.
    """
    partner = np.full(len(cost), -1)
    rows, columns = np.arange(len(cost)), np.arange(len(cost))
    while len(rows):
        left = cost[np.ix_(rows, columns)]
        best_column, best_row = left.argmin(1), left.argmin(0)
        mutual = best_row[best_column] == np.arange(len(rows))
        partner[rows[mutual]] = columns[best_column[mutual]]
        columns = np.delete(columns, best_column[mutual])
        rows = rows[~mutual]
    return partner


def match_in_background(alpha, beta, T, visible, method):
    """Start matching a batch; the returned function waits for it. The host is free to launch the encoders meanwhile.

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
        found = torch.from_numpy(np.stack(partner)), torch.from_numpy(np.stack(distance)), visible
        return tuple(t.to(device, non_blocking=True) for t in found)

    return wait


# -----------------------------------------------------------------------------
# losses


def info_nce(query, key, temperature, gather=False, report=True, spot=None, drop_twins=False):
    """InfoNCE of matched rows, Eq. 4 and Eq. 7 of the paper with the sum over pairs made a mean. -> loss, stats.

    -1/n sum_i log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) ), q and k l2-normalised. query, key: (n, D).
    gather: the keys of all ranks are candidates, and the mean is over all ranks' queries once DDP has averaged.
    spot (n,): rows of one number are of places that coincide, each other's twins. drop_twins: these are no candidates.

    stats, {} without `report`: chance, ln(number of candidates), what random features score; top1, the share of queries
    whose own key is the one best (a tie is no success, so collapsed features score 0; but a tie with a twin is one);
    positive, negative, mean cosines; std and rank of the queries, key_std and key_rank of the keys: the dimensions'
    deviation, 1 when they fill the sphere evenly and 0 when collapsed, and the effective rank.
    """
    with torch.autocast(query.device.type, enabled=False):
        unit = lambda t: F.normalize(encoders.full_precision(t), dim=-1)
        q, k = unit(query), unit(key)
        own_key, n, offset, weight = k, len(q), 0, 1.0
        if gather and dist.is_initialized():
            k, counts = runtime.gather_rows(k)
            offset, weight = sum(counts[: dist.get_rank()]), n * len(counts) / sum(counts)
        cosine = q @ k.T  # (n, candidates)
        target = torch.arange(offset, offset + n, device=q.device)
        logits = cosine / temperature
        if spot is not None:
            twin = torch.zeros_like(cosine, dtype=torch.bool)
            twin[:, offset : offset + n] = (spot[:, None] == spot).fill_diagonal_(False)
            if drop_twins:
                logits = logits.masked_fill(twin, -torch.inf)
        loss = weight * F.cross_entropy(logits, target)
        if not report:
            return loss, {}
        with torch.no_grad():
            positive = cosine.gather(1, target[:, None])  # (n, 1)
            best = cosine >= positive
            if spot is not None:
                best &= ~twin
            stats = {
                "chance": torch.tensor(math.log(len(k))),
                "top1": (best.sum(1) == 1).float().mean(),
                "positive": positive.mean(),
                "negative": (cosine.sum() - positive.sum()) / max(cosine.numel() - n, 1),
            }
            for name, z in (("", q), ("key_", own_key)):
                stats[name + "std"] = z.std(0).mean() * math.sqrt(z.shape[1])
                stats[name + "rank"] = effective_rank(z)
    return loss, stats


def coinciding(places):
    """Which places of a cloud lie at the same spot: places (B, P, 3) -> numbers (B, P), equal for these alone."""
    B, P, _ = places.shape
    same = (places[:, :, None] == places[:, None]).all(3)  # (B, P, P)
    first = same.int().argmax(2)  # of all places at a place's spot
    return first + P * torch.arange(B, device=places.device)[:, None]


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
        self.pts_backbone = PointEncoder(c.places, c.use_xyz, c.point_features)
        if c.intra_weight:
            self.mlp_intro_points = ProjectionHead(AGGREGATION[-1], c.point_hidden, c.embed_dim)
        else:
            self.pts_backbone.requires_grad_(False)  # Eq. 7 does not train it
        if c.inter_weight:
            self.img_backbone = build_image_encoder(c.image_encoder)
            self.mlp_cross_points = ProjectionHead(AGGREGATION[-1], c.point_hidden, c.embed_dim)
            seen = encoders.width_of(self.img_backbone, c.inter_stages)
            self.mlp_cross_img = ProjectionHead(seen, c.image_hidden, c.embed_dim)
            if c.inter_query == "image":
                self.mlp_cross_points.requires_grad_(False)

    def match(self, alpha, beta, T, visible):
        """match_in_background, as the run's --matching says."""
        return match_in_background(alpha, beta, T, visible, self.c.matching)

    def at_pixels(self, maps, uv):
        """What Eq. 7 takes from the image encoder's maps at pixels uv (B, n, 2): (B, n, C), for mlp_cross_img."""
        return encoders.sample_stages(self.img_backbone, maps, uv, self.c.inter_stages)

    def forward(self, batch, report=True):
        c, B = self.c, len(batch["alpha"])
        loss, stats = torch.zeros((), device=batch["alpha"].device), {}

        # places of both views: matching starts before they have features
        views = torch.cat([batch["alpha"], batch["beta"]]) if c.intra_weight else batch["alpha"]
        places, layers = self.pts_backbone.place(views)  # (2B, P, 3)
        uv, depth = data.project(places[:B], batch["lidar2img"])  # (B, P, 2)
        height, width = batch["image"].shape[2:]
        visible = data.inside_image(uv, depth, width, height)  # (B, P)
        if c.intra_weight:
            matched = self.match(places[:B], places[B:], batch["T"], visible)

        # both encoders run while threads match
        features = self.pts_backbone.describe(layers)  # (2B, P, 1024)
        if c.inter_weight:
            image = batch["image"].contiguous(memory_format=torch.channels_last)
            maps = self.img_backbone(image)  # (B, C, H / s, W / s), s = 2, 4, 8, 16, 32

        # places that the point encoder kept twice have twins among the candidates
        spot = coinciding(places[:B]).flatten() if report or c.drop_twins else None  # (B P,)
        compare = functools.partial(
            info_nce, temperature=c.temperature, gather=c.gather_negatives, report=report, drop_twins=c.drop_twins
        )

        # Eq. 4: places that T maps onto each other have alike features. One pass of the head for both views.
        if c.intra_weight:
            partner, distance, visible_rows = matched()
            z = self.mlp_intro_points(features.flatten(0, 1)).view(2, B, -1, c.embed_dim)
            f_alpha, f_beta = z[0], z[1].gather(1, partner[..., None].expand_as(z[1]))
            f_alpha, f_beta = f_alpha.flatten(0, 1), f_beta.flatten(0, 1)  # (B P, 128)
            intra, found = compare(f_alpha, f_beta.detach() if c.detach_keys else f_beta, spot=spot)
            loss = loss + c.intra_weight * intra
            stats |= {"intra": intra.detach(), **prefixed("intra_", found), "match_m": distance.mean()}
        else:
            visible_rows = visible.flatten().nonzero()[:, 0]

        # Eq. 7: a place and its pixel have alike features. The point encoder only teaches: its gradient is cropped.
        if c.inter_weight:
            if len(visible_rows) < 2:
                seen = f"{len(visible_rows)} places of a forward pass lie in its images"
                raise BadInput(f"{seen}: wrong calibration, or too much of --crop and --shift")
            f_gamma = self.at_pixels(maps, uv)  # (B, P, C)
            f_gamma = self.mlp_cross_img(f_gamma.flatten(0, 1)[visible_rows])  # (n, 128)
            f_alpha = self.mlp_cross_points(features[:B].detach().flatten(0, 1)[visible_rows])
            query, key = (f_alpha, f_gamma) if c.inter_query == "point" else (f_gamma, f_alpha.detach())
            inter, found = compare(query, key, spot=None if spot is None else spot[visible_rows])
            loss = loss + c.inter_weight * inter
            stats |= {"inter": inter.detach(), **prefixed("inter_", found), "visible": visible.float().mean()}
        if report:
            stats["twins"] = (spot[:, None] == spot).sum(1).gt(1).float().mean()
        return loss, stats


def prefixed(prefix, figures):
    return {prefix + name: value for name, value in figures.items()}


def build_optimizers(model, c):
    """AdamW for the point encoder; SGD (or AdamW) for the image encoder and the heads. Every parameter that learns is
    in exactly one of them.
    """
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    points = [p for name, p in learns.items() if name.startswith("pts_backbone.")]
    others = [p for name, p in learns.items() if not name.startswith("pts_backbone.")]
    optimizers = []
    if points:
        optimizers.append(torch.optim.AdamW(points, c.point_lr, betas=(0.95, 0.99), weight_decay=0.01, fused=True))
    if c.image_optimizer == "sgd":
        optimizers.append(torch.optim.SGD(others, c.image_lr, momentum=0.9, weight_decay=1e-4, fused=True))
    else:
        optimizers.append(torch.optim.AdamW(others, c.image_lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True))
    return optimizers


# -----------------------------------------------------------------------------
# training


def pool_frames(c, roots, splits, flag="--splits", named=True, limit=0, clouds=True):
    """Frames as the config wants them, and notes to print. Raises BadInput as data_sets.pool_frames does."""
    rules = c.cameras, c.version, c.frame_stride, c.skip_missing
    return data_sets.pool_frames(roots, splits, *rules, flag, named, limit, clouds)


def find_frames(c, roots, splits, named=False, limit=0):
    """Frames to judge on, as pool_frames finds them."""
    return pool_frames(c, roots, splits, named=named, limit=limit)[0]


def training_frames(c, run, clouds=True):
    """Frames to train on, and notes to print, as pool_frames has them. Built-in scenes are written where they are asked
    for.
    """
    synthetic.write_scenes(c, run)
    frames, notes = runtime.main_first(run, lambda: pool_frames(c, c.data_root, c.splits, clouds=clouds))
    return data.evenly_spread(frames, c.train_frames or len(frames)), notes


def load_frames(c, run):
    """-> frames to train on; frames of --eval-splits, none of them trained on; notes to print, as one text, or None.

    Raises BadInput as pool_frames does, for held-out frames that are trained on, and for fewer than two.
    """
    frames, notes = training_frames(c, run)
    if not (c.eval_splits or c.eval_root):
        return frames, [], "\n".join(notes) or None
    roots, flag = c.eval_root or c.data_root, "--eval-splits"
    judged = functools.partial(pool_frames, c, roots, c.eval_splits, flag, limit=c.eval_frames)
    held_out, more = runtime.main_first(run, judged)
    notes += [note for note in more if note not in notes]
    flag = runtime.held_out_flag(c)
    data.check_unseen(frames, held_out, flag)
    if len(held_out) < 2:
        raise BadInput(f"{flag}: judging needs two frames or more, for the other frame's image")
    notes += data.shared_drives(frames, held_out, flag)
    return frames, held_out, "\n".join(notes) or None


def check_config(c, world):
    """-> runtime.split_batch. Raises BadInput, naming the flag, for what cannot work."""
    split = runtime.split_batch(c, world)
    runtime.check_range(
        c, "places num_points epochs log_every save_every frame_stride eval_frames", 1, 1e9, "1 or more"
    )
    runtime.check_range(c, "point_hidden image_hidden embed_dim", 1, 1e6, "1 or more")
    runtime.check_range(c, "temperature image_lr point_lr", 1e-30, 1e30, "above 0")
    runtime.check_range(
        c, "seed workers max_steps eval_every keep_every synthetic_frames train_frames", 0, 1e9, "0 or more"
    )
    runtime.check_range(c, "intra_weight inter_weight translation", 0, 1e6, "0 or more")
    runtime.check_range(c, "rotation", 0, 180, "from 0 to 180")
    runtime.check_range(c, "lr_decay", 1e-6, 1, "above 0, and 1 or less")
    runtime.check_range(c, "shift jitter flip", 0, 1, "from 0 to 1")
    runtime.check_range(c, "crop scale", 0.2, 5, "from 0.2 to 5, the smaller first", rising=True)
    if c.places % 2 or 4 * c.places > c.num_points:
        raise BadInput(f"--places {c.places}: must be even, and --num-points {c.num_points} at least 4 times as many")
    for flag in ("point_features", "inter_stages"):
        given, flag = getattr(c, flag), f"--{flag.replace('_', '-')}"
        if not given:
            raise BadInput(f"{flag}: nothing given")
        if len(set(given)) < len(given):
            raise BadInput(f"{flag} {' '.join(map(str, given))}: give each once")
    data.check_image_scale(c.image_scale)
    if not c.inter_weight and not c.intra_weight:
        raise BadInput("--inter-weight 0: with --intra-weight 0 there is nothing to learn")
    if not c.inter_weight and (c.init or c.compile):
        raise BadInput("--inter-weight 0: there is no image encoder for --init or --compile")
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
    if c.inter_weight and run.device.type == "cuda" and run.world > 1:
        alone = encoders.share_batch_norm(model.img_backbone)
        if alone:
            notes.append(f"note: {alone} batch norms of {c.image_encoder} take their statistics on each GPU alone")
    optimizers = build_optimizers(model, c)
    if c.compile:
        model.img_backbone.compile(dynamic=True)

    # ============ data ============
    frames, held_out, note = load_frames(c, run)
    notes += [note] if note else []
    if len(frames) < max(c.batch_size, 2):
        raise BadInput(f"--batch-size {c.batch_size}: the {len(frames)} frames found are too few")
    lines = data.inventory(frames)
    inventory, fingerprint, drives = data.digests(lines), data.fingerprint(lines), sorted(data.drives_of(frames))
    steps_per_epoch = len(frames) // c.batch_size
    steps = c.max_steps or c.epochs * steps_per_epoch
    identity = runtime.as_json(c, without=FREE) | {"group": group, "frames": fingerprint}
    if c.gather_negatives:
        identity["processes"] = run.world
        notes += ["note: --gather-negatives: with one process there are no others"] if run.world == 1 else []
    # on every rank: recalibrating batch norm talks to the others
    judgement = (lambda: eval_match.match(model, held_out, c, run.device, run)) if held_out else None
    loop = Loop(c, run, model, optimizers, identity, data.Names(frames), "match", judgement)
    sweeps = None if c.same_sweep else data.sweeps_of(frames)
    batches = data.Batches(len(frames), c.batch_size, group, c.seed, run.rank, run.world, loop.start, steps, sweeps)
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
                with runtime.mixed_precision(c.amp, run.device):
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
            said += [f"gain {loop.judged['gain']:.2f}"] if "gain" in (loop.judged or ()) else []
            loop.bar.set_postfix_str(", ".join(said))
        if loop.saving:
            # first: a run that is finished by its last.pt has its last backbone.pt, too
            if c.inter_weight and run.main:
                about = {"step": loop.done, "git": loop.about["git"]}
                weights.save_backbone(model.img_backbone, c.image_encoder, about, loop.folder / "backbone.pt")
            # for eval.py: what it is not to be judged on
            loop.save(inventory=inventory, drives=drives)
        if loop.judging:
            loop.judge()
    if not loop.stopping:
        finish(model, c, run, frames, held_out, loop)
        loop.end()


def untrained(c, device):
    """A network like the run's with random weights, those of --init too: what the trained one is judged beside."""
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
        random = eval_match.match(untrained(c, run.device), held_out, c, run.device, run)
        if run.main:
            print("\n" + "\n".join(eval_match.match_table({"random": random, "trained": loop.judged})))


def main():
    runtime.command_line(lambda: tyro.extras.overridable_config_cli(PRESETS), train)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
