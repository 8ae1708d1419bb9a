"""MoCo v2 (He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297) on the frames of simipu.py: the
paper's baseline. Cameras alone suffice: no cloud is read, and in KITTI's and nuScenes' layouts none need be there.

Two views of an image, cropped, coloured and blurred at random. A query encoder sees one. A key encoder, a running mean
of the query encoder, sees the other. The query is to find its key among those of a queue of earlier images.

Smoke run on built-in scenes, minutes on two CPU cores; then the recipe on one GPU and on eight (same global batch):

    torchrun --standalone moco.py demo                  # `python moco.py demo` is the same program
    torchrun --standalone moco.py kitti --data-root data/kitti
    torchrun --standalone --nproc_per_node=8 moco.py kitti --data-root data/kitti

Every other preset of simipu.py is here as well. What the run leaves is used like any other start:

    torchrun --standalone finetune_depth.py demo --init out/moco_demo/backbone.pt
    torchrun --standalone simipu.py demo --init out/moco_demo/backbone.pt --name double     # double fine-tuning
    python eval.py probe out/demo/last.pt --also out/moco_demo/backbone.pt

Resume: the same command again, on a CPU to the same bits. Every flag: `python moco.py kitti --help`. A run writes
out/NAME/: log.jsonl, last.pt, backbone.pt (the query's image encoder, torchvision's key names), curves.png.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import data
import data_nuscenes
import encoders
import pictures
import runtime
import simipu
import weights
from files import BadInput
from loop import Loop, stream


@dataclass
class Config:
    """Everything a run depends on. Defaults are MoCo v2's."""

    # ---- data: as in simipu.py ----
    data_root: tuple[str, ...] = ("data/kitti",)
    """Folders of any of the data sets, known by what lies in them (data_sets.py); several are pooled."""
    splits: tuple[str, ...] = ("train", "test")
    """Names of lists in ImageSets/: of frames, or of raw drives, where () takes them all. Of nuScenes: train, val,
    test, mini_train, mini_val. Of KITTI's odometry: train, val, test, or sequences such as 04.
    """
    cameras: tuple[str, ...] = data_nuscenes.CAMERAS
    """Of nuScenes: which cameras."""
    version: str = "auto"
    """Of nuScenes: the folder of tables, such as v1.0-mini. auto: the one that a split is of."""
    frame_stride: int = 1
    """Keep every n-th frame of a raw drive or sequence, and of nuScenes' keyframes."""
    train_frames: int = 0
    """Train on at most so many frames, evenly spread; 0: on all."""
    skip_missing: bool = False
    """Leave out frames that lack an image, instead of stopping at them."""
    synthetic_frames: int = 0
    """Write this many built-in scenes first, if data_root is data/synthetic and does not exist."""
    workers: int = 4
    """Loading processes per GPU; 0 loads in the training process."""
    # ---- the two views of an image ----
    view: tuple[int, int] = (640, 192)
    """Width and height of both, pixels. Its shape is that of the images, or crops would be squeezed."""
    area: tuple[float, float] = (0.2, 1.0)
    """A view shows U(area) of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of what it shows, over that of the view: log-uniform between these."""
    flip: float = 0.5
    """Probability that it is mirrored."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength of the jitter of brightness, contrast, saturation and hue."""
    jitter_p: float = 0.8
    """Probability that its colours are jittered."""
    grey: float = 0.2
    """Probability that it loses its colours."""
    blur_p: float = 0.5
    """Probability that it is blurred."""
    blur: tuple[float, float] = (0.1, 2.0)
    """By a Gaussian of U(blur) pixels."""
    # ---- networks, queue, loss ----
    image_encoder: str = "resnet50"
    """resnet18, 34, 50, 101, or timm:NAME when timm is installed."""
    hidden: int = 2048
    """Width of the projection head, of two layers on the mean of the last map."""
    embed_dim: int = 128
    """Dimensions in which views are compared."""
    queue: int = 65536
    """Keys of earlier images that are negatives."""
    own_negatives: bool = False
    """Take a frame's own older keys as negatives, too, as MoCo does. A queue that holds more keys than there are frames
    has them: KITTI's 11 thousand frames are in it six times.
    """
    batch_negatives: bool = False
    """Take the keys of the other images in the pass as negatives, too. Those of the queue are older: with a quick key
    encoder a query may tell new keys from old ones, and learn nothing of images.
    """
    momentum: float = 0.999
    """Of the key encoder: the share of itself that it keeps at a step."""
    temperature: float = 0.2
    """Of the loss. MoCo v1's is .07, with which short runs learn faster."""
    # ---- optimisation ----
    batch_size: int = 256
    """Images per step, over all GPUs. The rate is meant for this batch and is not rescaled."""
    group: int = 32
    """Images per forward pass, over which batch norm takes its statistics: 32 on each of 8 GPUs in MoCo. What of
    batch_size is left over the GPUs is accumulated.
    """
    epochs: int = 200
    """The rate follows one cosine over all of them, so another number is another run."""
    max_steps: int = 0
    """Steps of that cosine, in place of those epochs; 0: as many as they make."""
    lr: float = 0.03
    """Of SGD, momentum .9, weight decay 1e-4, at the start. With optimizer=adamw use 1e-3."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is MoCo's. adamw learns faster in short runs."""
    # ---- the run ----
    name: str = "moco"
    """The run lives in out/NAME."""
    out: str = "out"
    """Folder of all runs."""
    init: str | None = None
    """Weights the image encoder starts from: anybody's, see weights.py, or by name: imagenet, timm:NAME, see
    weights_named.py.
    """
    init_pixels: Literal["auto", "rgb", "bgr", "rgb_mean", "bgr_mean"] = "auto"
    """How that file's pixels were normalised, where it does not say."""
    seed: int = 0
    """Of weights, order, queue and views."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    amp: Literal["gpu", "always", "never"] = "gpu"
    """bfloat16 autocast: on GPUs, on CPUs too, or not at all. Logits and loss stay in float32."""
    compile: bool = False
    """torch.compile the query's image encoder."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    save_every: int = 200
    """Steps between checkpoints. The last step and a polite kill save too."""
    keep_every: int = 0
    """Every so many steps, keep the checkpoint as step_N.pt beside last.pt. 0: none."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Show what log.jsonl says there, too, if that package is installed."""


SHARED = (
    "data_root splits cameras version frame_stride train_frames skip_missing synthetic_frames workers image_encoder"
)
OWN = {  # what a preset has beside what it shares with simipu.py's of that name
    "demo": {
        "view": (192, 64), "area": (0.6, 1.0), "flip": 0.0, "jitter": (0.1, 0.1, 0.0, 0.0), "grey": 0.0, "blur_p": 0.0,
        "queue": 128, "hidden": 512, "batch_negatives": True, "momentum": 0.99, "temperature": 0.07,
        "batch_size": 16, "group": 16, "optimizer": "adamw", "lr": 3e-4,
        "epochs": 1000, "max_steps": 140, "log_every": 5, "save_every": 35,
    },
    "waymo": {"view": (480, 320)},
    "nuscenes": {"view": (512, 288)},
}  # fmt: skip


def preset(name):
    """A preset of simipu.py as (description, Config) of this script: the same frames."""
    theirs = simipu.PRESETS[name][1]
    words = f"The frames of `simipu.py {name}`."
    if name == "demo":
        words = "Built-in scenes, ResNet-18, a short queue, AdamW, minutes on two CPU cores."
    return words, Config(
        name=f"moco_{name}", **{field: getattr(theirs, field) for field in SHARED.split()}, **OWN.get(name, {})
    )


PRESETS = {name: preset(name) for name in simipu.PRESETS}

# a checkpoint may be continued with other values of these; any other difference is another experiment
FREE = {"data_root", "workers", "name", "out", "device", "compile", "log_every", "save_every", "keep_every", "track"}
FREE |= {"cameras", "version"}  # as data_root: the frames that they find must be the same

TRIES = 10  # at a window that lies in the image
GREY = np.outer(np.ones(3), (0.299, 0.587, 0.114))


# -----------------------------------------------------------------------------
# views: random numbers on the host, a pure function of (seed, epoch, frame), and matrices on the device


def random_crop(rng, size, view, area, ratio):
    """The window that a view shows: (left, top, width, height) in shares of an image of `size` (width, height).

    As torchvision's random resized crop: its share of the area is U(*area), and its shape, width over height in pixels,
    that of the `view` times a log-uniform factor of `ratio`. If ten draws do not fit into the image, the largest window
    of the view's shape, in the middle.
    """
    shape = (view[0] / view[1]) / (size[0] / size[1])  # of a window like the view: share of width over that of height
    for _ in range(TRIES):
        share = rng.uniform(*area)
        factor = shape * math.exp(rng.uniform(*map(math.log, ratio)))
        width, height = math.sqrt(share * factor), math.sqrt(share / factor)
        corner = rng.uniform(0, 1, 2)
        if width <= 1 and height <= 1:
            break
    else:
        width, height, corner = min(1.0, shape), min(1.0, 1 / shape), (0.5, 0.5)
    return np.array([corner[0] * (1 - width), corner[1] * (1 - height), width, height])


def random_view(rng, size, c):
    """All that a view of an image of `size` depends on. -> dict: window (4,), flip, colour (3, 4), blur, its deviation
    in pixels, 0 for none.
    """
    window = random_crop(rng, size, c.view, c.area, c.ratio)
    colour = data.random_colour(rng, c.jitter)
    if rng.random() >= c.jitter_p:
        colour = np.eye(3, 4)
    if rng.random() < c.grey:
        colour = GREY @ colour
    blur = rng.uniform(*c.blur)
    if rng.random() >= c.blur_p:
        blur = 0.0
    return {"window": window, "flip": bool(rng.random() < c.flip), "colour": colour, "blur": blur}


def shrunk(image, view):
    """An image (H, W, 3) uint8, reduced by blocks of pixels, so far that a view of a quarter of its area still has a
    pixel for each: less to move, and less that plain bilinear sampling would skip.
    """
    height, width = image.shape[:2]
    k = min(width // (2 * view[0]), height // (2 * view[1]))
    return image if k < 2 else np.asarray(Image.fromarray(image).reduce(k))


class ViewFrames(torch.utils.data.Dataset):
    """Images with the random numbers of their two views, by (epoch, index). A broken image comes back as a BadInput, as
    data.PretrainFrames says. No cloud is read.
    """

    def __init__(self, frames, c):
        self.frames, self.c = frames, c

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([data.SAMPLE, self.c.seed, epoch, index])
        try:
            image = shrunk(self.frames[index].read_image(), self.c.view)
        except BadInput as e:
            return e
        views = [random_view(rng, image.shape[1::-1], self.c) for _ in range(2)]
        drawn = {name: np.stack([view[name] for view in views]) for name in views[0]}
        return {"image": image, **drawn, "index": index}


def crop_affine(size, view, window, flip):
    """The affine A of a view: old pixels to those of the view, data.image_affine's convention.

    size (B, 2) (width, height), view (width, height), window (B, 4) of `random_crop`, flip (B,) bool -> (B, 3, 3)
    float64.
    """
    out = torch.tensor(view, dtype=torch.float64)
    s = out / (window[:, 2:] * size)  # (B, 2)
    A = torch.eye(3, dtype=torch.float64).repeat(len(size), 1, 1)
    A[:, 0, 0], A[:, 1, 1] = s[:, 0], s[:, 1]
    A[:, :2, 2] = (0.5 - window[:, :2] * size) * s - 0.5
    A[flip, 0] *= -1  # u becomes W - 1 - u
    A[flip, 0, 2] += out[0] - 1
    return A


def blur_matrices(sigma, n):
    """Gaussian blur of n pixels in a row as a matrix, one for each sigma (B,) in pixels: (B, n, n). 0: the identity.

    Edges are mirrored, so a matrix is symmetric and its rows and columns sum to 1: the mean stays what it is. Exact for
    sigma below n / 6.
    """
    i = torch.arange(n, device=sigma.device, dtype=torch.float32)
    apart, mirrored = i[:, None] - i, i[:, None] + i + 1  # to a pixel; to its image behind the first one's edge
    scale = -0.5 / sigma.clamp(min=1e-3).square()[:, None, None]
    parts = (apart, mirrored, mirrored - 2 * n)
    kernel = sum(torch.exp(scale * distance.square()) for distance in parts)
    return kernel / kernel.sum(2, keepdim=True)


def blurred(image, sigma):
    """Each image of (B, 3, H, W) blurred by its own sigma (B,), in pixels: two products with matrices."""
    rows, columns = (blur_matrices(sigma, n)[:, None] for n in image.shape[2:])  # symmetric
    return rows @ image @ columns


def augment(batch, view, device):
    """A collated batch of ViewFrames to two views of each image, on `device`. -> dict: query, key (B, 3, H, W) float32
    normalised, channels last; index (B,), the frames.
    """
    images = batch["image"].to(device, non_blocking=True)
    views = []
    for v in range(2):
        A = crop_affine(batch["size"], view, batch["window"][:, v], batch["flip"][:, v])
        image = data.warp_images(images, batch["size"], A, batch["colour"][:, v], view)
        image = blurred(image, data.on_device(batch["blur"][:, v], device))
        views.append(image.contiguous(memory_format=torch.channels_last))
    return {"query": views[0], "key": views[1], "index": batch["index"]}


# -----------------------------------------------------------------------------
# the method


class Head(nn.Module):
    """MoCo v2's: the mean of the last map, then an MLP of two layers without batch norm. Maps -> (B, cout)."""

    def __init__(self, cin, hidden, cout):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(cin, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, cout))

    def forward(self, maps):
        return self.mlp(maps[-1].mean((2, 3)))


def contrast(query, key, others, temperature, own, report=True):
    """InfoNCE of each query with its key among others, the queue's. -> loss, stats.

    query, key (n, D), l2-normalised here; others (K, D), normalised; own (n, K) bool: of the query's own frame, no
    candidates. -1/n sum_i log( exp(q_i.k_i / tau) / (exp(q_i.k_i / tau) + sum_j exp(q_i.others_j / tau)) ).
    stats, {} without `report`, as simipu.info_nce names them.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k = (F.normalize(t.float(), dim=1) for t in (query, key))
        positive, negative = (q * k).sum(1, keepdim=True), q @ others.T  # (n, 1), (n, K)
        logits = torch.cat([positive, negative.masked_fill(own, -torch.inf)], 1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        if not report:
            return loss, {}
        with torch.no_grad():
            candidates = 1 + (~own).sum(1)
            beaten = ((negative >= positive) & ~own).any(1)
            stats = {
                "chance": candidates.float().log().mean(),
                "top1": (~beaten).float().mean(),
                "positive": positive.mean(),
                "negative": negative.masked_fill(own, 0).sum() / (candidates - 1).sum().clamp(min=1),
            }
            for name, z in (("", q), ("key_", k)):
                stats[name + "std"] = z.std(0, correction=0).mean() * math.sqrt(z.shape[1])
                stats[name + "rank"] = simipu.effective_rank(z)
    return loss, stats


class MoCo(nn.Module):
    """forward(batch of `augment`) -> loss, stats. After the optimiser's step, `follow` ends the step.

    Batch norm leaks: where a key shares its batch with the query's images, their common statistics give it away, and
    nothing need be learned from images. MoCo shuffles keys among GPUs, which takes several, and sends images between
    them. Here the key encoder is normalised by statistics of the steps before, measured on its own inputs; so a key
    depends on its image alone, on one GPU too, and is the same however many processes share the batch. (Cai et al.
    2021, EMAN, arXiv 2101.08482, leave the keys' statistics out of the batch as well, and take the mean of the
    query's.) The very first step has none before it, and takes its own.
    """

    def __init__(self, c):
        super().__init__()
        self.c = c
        image = encoders.build_image_encoder(c.image_encoder)
        self.encoder_q = nn.Sequential(image, Head(image.channels, c.hidden, c.embed_dim))
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(c.queue, c.embed_dim), dim=1))
        self.register_buffer("queue_frames", torch.full((c.queue,), -1))  # whose keys they are; -1: random, of none
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # in the queue, of the oldest
        for norm in self.encoder_k.modules():
            if isinstance(norm, _BatchNorm):
                norm.register_forward_pre_hook(self.measure)
        self.steps = 0  # done: without any there are no statistics of steps before
        self.fresh, self.seen = [], {}  # of this step's passes: (keys, frames); {norm: statistics of its inputs}

    def train(self, mode=True):
        super().train(mode)
        self.encoder_k.train(mode and not self.steps)
        return self

    def start_keys(self):
        """The key encoder becomes the query encoder's copy: where training starts."""
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())

    def measure(self, norm, inputs):
        x = encoders.full_precision(inputs[0])
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
        self.seen.setdefault(norm, []).append(torch.stack([mean, var]))  # (2, C)

    def forward(self, batch, report=True):
        query = self.encoder_q(batch["query"])
        with torch.no_grad():
            key = F.normalize(self.encoder_k(batch["key"]).float(), dim=1)
        frames = batch["index"].to(key.device, non_blocking=True)
        self.fresh.append((key, frames))
        others, whose = self.queue, self.queue_frames
        if self.c.own_negatives:
            whose = torch.full_like(whose, -1)  # nobody's: none is left out
        if self.c.batch_negatives:
            others, whose = torch.cat([others, key]), torch.cat([whose, frames])
        own = frames[:, None] == whose  # (n, K), or (n, K + n)
        loss, found = contrast(query, key, others, self.c.temperature, own, report)
        return loss, {"moco": loss.detach(), **simipu.prefixed("moco_", found)} if report else {}

    @torch.no_grad()
    def follow(self):
        """After the optimiser: this step's keys into the queue, in the batch's order, and the key encoder a little
        after the query encoder. On several processes all end up with the same.
        """
        keys, frames = zip(*self.fresh)
        self.enqueue(*(in_order(torch.stack(rows)) for rows in (keys, frames)))
        if self.seen:
            found = torch.cat([torch.stack(passes).mean(0) for passes in self.seen.values()], 1)
            self.keep_statistics(over_ranks(found))
        self.fresh, self.seen = [], {}
        self.steps += 1
        self.encoder_k.eval()
        own, theirs = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_lerp_(own, theirs, 1 - self.c.momentum)

    def enqueue(self, keys, frames):
        """The oldest make room. keys (n, D), frames (n,), n at most the queue's length."""
        at = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[at], self.queue_frames[at] = keys, frames
        self.position.copy_((self.position + len(keys)) % len(self.queue))

    def keep_statistics(self, statistics):
        """statistics (2, sum of C): mean and variance of the inputs of the norms in `seen`, one after the other.

        They are the mean of all steps so far, and later a running one as slow as the weights. Were they quicker, all
        keys of some steps would have something in common, and queries would learn that: new keys from old ones.
        """
        weight = max(1 / (self.steps + 1), 1 - self.c.momentum)
        means, variances = (part.split([norm.num_features for norm in self.seen]) for part in statistics)
        for norm, mean, var in zip(self.seen, means, variances):
            norm.running_mean.lerp_(mean, weight)
            norm.running_var.lerp_(var, weight)


def in_order(rows):
    """Rows (passes, n, ...) of all ranks as the batch had them, (passes ranks n, ...): data.Batches deals out its
    groups in turn.
    """
    ranks = [rows]
    if dist.is_initialized():
        ranks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, rows.contiguous())
    return torch.stack(ranks, 1).flatten(0, 2)


def over_ranks(x):
    """The mean of all ranks' x."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def cosine(step, steps):
    """The rate at a step, as a share of the first."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def build_optimizer(model, c):
    """Of the query encoder; the key encoder has no gradient."""
    parameters = list(model.encoder_q.parameters())
    if c.optimizer == "sgd":
        return torch.optim.SGD(parameters, c.lr, momentum=0.9, weight_decay=1e-4, fused=True)
    return torch.optim.AdamW(parameters, c.lr, weight_decay=0.01, fused=True)


# -----------------------------------------------------------------------------
# training


def check_config(c, world):
    """-> runtime.split_batch. Raises BadInput, naming the flag, for what cannot work."""
    split = runtime.split_batch(c, world)
    runtime.check_range(c, "epochs log_every save_every frame_stride hidden embed_dim", 1, 1e9, "1 or more")
    runtime.check_range(c, "view", 32, 1e5, "32 or more")
    runtime.check_range(c, "lr temperature", 1e-30, 1e30, "above 0")
    runtime.check_range(c, "seed workers max_steps keep_every synthetic_frames train_frames", 0, 1e9, "0 or more")
    runtime.check_range(c, "area", 1e-3, 1, "above 0, and 1 or less, the smaller first", rising=True)
    runtime.check_range(c, "ratio", 0.1, 10, "from 0.1 to 10, the smaller first", rising=True)
    runtime.check_range(c, "blur", 0, min(c.view) / 6, "from 0 to a sixth of --view, the smaller first", rising=True)
    runtime.check_range(c, "flip jitter jitter_p grey blur_p momentum", 0, 1, "from 0 to 1")
    runtime.check_range(c, "queue", c.batch_size, 1e9, f"--batch-size {c.batch_size} or more")
    return split


def train(c):
    run = runtime.start_run(c.device, c.seed)
    group, accumulate, a_step = check_config(c, run.world)

    # ============ networks and optimiser ============
    model = MoCo(c).to(run.device, memory_format=torch.channels_last)
    notes = []
    if c.init:
        notes.append(weights.load_image_encoder(model.encoder_q[0], c.init, c.init_pixels))
        model.start_keys()
    torch.backends.cudnn.benchmark = True  # views are of one size
    optimizer = build_optimizer(model, c)
    if c.compile:
        model.encoder_q[0].compile()

    # ============ data ============
    frames, found = simipu.training_frames(c, run, clouds=False)
    notes += found
    if len(frames) < c.batch_size:
        raise BadInput(f"--batch-size {c.batch_size}: the {len(frames)} frames found are too few")
    inventory = data.inventory(frames, clouds=False)
    steps_per_epoch = len(frames) // c.batch_size
    steps = c.max_steps or c.epochs * steps_per_epoch
    identity = runtime.as_json(c, without=FREE) | {"group": group, "frames": data.fingerprint(inventory)}
    loop = Loop(c, run, model, [optimizer], identity, data.Names(frames))
    model.steps = loop.start
    batches = data.Batches(len(frames), c.batch_size, group, c.seed, run.rank, run.world, loop.start, steps)
    loaded = stream(ViewFrames(frames, c), batches, data.collate, c.workers, run)

    def next_batch(step):
        """The next forward pass's two views of each image; None after the last step."""
        if step < steps:
            return augment(next(loaded), c.view, run.device)

    # ============ the loop ============
    batch = next_batch(loop.start)  # before anything is written: a broken data set leaves no trace
    about = runtime.provenance(run, __file__)
    about |= {"config": runtime.as_json(c), "data": {"frames": len(frames), "fingerprint": identity["frames"]}}
    million = sum(p.numel() for p in loop.owned) / 1e6
    lines = [
        *notes,
        f"{c.name}: {len(frames)} frames, {million:.1f} M parameters, {run.world} x {run.device.type}",
        f"{a_step}, {c.queue} keys in the queue",
        f"steps {loop.start} to {steps}, {steps_per_epoch} an epoch, into {loop.folder}/",
    ]
    loop.begin(steps, about, lines)
    for step in loop:
        loop.set_rate(cosine(step, steps))

        # forward and backward, pass by pass; the next batch is fetched while a GPU still computes
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with loop.sharing(last):
                with runtime.mixed_precision(c.amp, run.device):
                    loss, stats = loop.model(batch, loop.reporting and last)
                (loss / accumulate).backward()
            loop.watch(loss, batch["index"])
            batch = loop.waiting(next_batch, step + last)

        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.follow()
        loop.stepped()

        # once in a while: write how it goes, save
        if loop.reporting:
            stats = loop.report(step // steps_per_epoch, stats)
            said = f"loss {stats['moco']:.2f} (chance {stats['moco_chance']:.2f}), top1 {stats['moco_top1']:.0%}"
            loop.bar.set_postfix_str(said)
        if loop.saving:
            if run.main:  # first: a run that is finished by its last.pt has its last backbone.pt, too
                about = {"step": loop.done, "git": loop.about["git"]}
                weights.save_backbone(model.encoder_q[0], c.image_encoder, about, loop.folder / "backbone.pt")
            loop.save(inventory=data.digests(inventory), drives=sorted(data.drives_of(frames)))
    if not loop.stopping:
        finish(run, loop)
        loop.end()


def finish(run, loop):
    """The curves."""
    if run.main:
        folder = loop.folder
        pictures.draw_curves(folder / "log.jsonl", folder / "curves.png")
        print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} into {folder}/")


def main():
    runtime.command_line(lambda: tyro.extras.overridable_config_cli(PRESETS), train)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
