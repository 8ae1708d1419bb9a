"""Monocular depth, the first downstream task: what is a pre-trained image encoder worth?

    torchrun --standalone finetune_depth.py demo --init out/demo/backbone.pt    # built-in scenes, minutes on two cores
    torchrun --standalone finetune_depth.py demo --init none --name scratch     # the same from scratch

KITTI's Eigen split and NYU by the toolbox's recipe, on one GPU or several (same global batch); any sweeps, with no
annotation at all:

    torchrun --standalone finetune_depth.py kitti --init out/kitti/backbone.pt --data-root data/kitti_raw \\
        --depth-root data/kitti_depth --splits kitti_eigen_train.txt --eval-splits kitti_eigen_test.txt
    torchrun --standalone --nproc_per_node=2 finetune_depth.py nyu --init resnet50-imagenet.pth --data-root data/nyu
    torchrun --standalone finetune_depth.py lidar --init out/kitti/backbone.pt --data-root data/kitti \\
        --splits train --eval-splits val

Resume: the same command again. Every flag: `python finetune_depth.py kitti --help`. A run ends with its metrics on
held-out frames, and writes out/NAME/: log.jsonl, last.pt, curves.png, depth.png. `python eval.py depth
out/NAME/last.pt` judges it again, or on other data.

Network and recipe are those of the depth toolbox (zhyever/Monocular-Depth-Estimation-Toolbox, configs/simipu), whose
logs of KITTI and NYU are the published rows: ResNet-50, the decoder of DenseDepth (Alhashim and Wonka 2018), SigLoss
(Eigen et al. 2014, weighted as in AdaBins), AdamW in one cycle.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import nn

import data
import data_depth
import encoders
import eval_depth
import pictures
import runtime
import synthetic
import weights
from files import BadInput
from loop import Loop, stream


@dataclass
class Config:
    """Everything a run depends on. Defaults are the toolbox's for KITTI."""

    # ---- data ----
    dataset: Literal["kitti", "nyu", "lidar", "scenes"] = "kitti"
    """How images and depths are found and cropped: data_depth.py says what each means."""
    data_root: tuple[str, ...] = ("data/kitti_raw",)
    """Folders of images; several are pooled."""
    depth_root: str = ""
    """Folder of the ground truth of kitti and nyu. Not given: it lies in data_root."""
    splits: tuple[str, ...] = ("kitti_eigen_train.txt",)
    """What is trained on: split files for kitti and nyu, here or in data_root; for the others the splits of their data
    set.
    """
    eval_splits: tuple[str, ...] = ("kitti_eigen_test.txt",)
    """What the run ends by judging itself on. () for nothing."""
    eval_root: tuple[str, ...] = ()
    """Folders that eval_splits are looked up in; () for data_root."""
    eval_frames: int = 0
    """At most so many of them, evenly spread; 0 for all."""
    eval_every: int = 0
    """Steps between judgements, each a line in log.jsonl. 0: only after the last step, which is the one to report."""
    labels: float = 1.0
    """Share of the training pairs that is used, evenly spread: how much annotation does pre-training save?"""
    frame_stride: int = 1
    """Without split files: keep every n-th frame of a drive, a sequence, or of nuScenes' keyframes."""
    skip_missing: bool = False
    """Leave out pairs that lack a file, instead of stopping at them."""
    synthetic_frames: int = 0
    """Write this many built-in scenes first, if data_root is data/synthetic and does not exist."""
    workers: int = 4
    """Loading processes per GPU; 0 loads in the training process."""
    resident: bool = False
    """Decode everything once, and keep it on the device, five bytes a pixel: 50 GB for all of KITTI, 29 for NYU."""
    # ---- augmentation ----
    rotation: float = 2.5
    """Degrees: the image turns about its centre by U(-rotation, rotation)."""
    rotation_p: float = 0.5
    """Probability that it does."""
    flip: float = 0.5
    """Probability that it is mirrored."""
    crop: tuple[int, int] = (704, 352)
    """Window of the image that is trained on (width, height), pixels; 0 for the whole edge. Metrics are of whole
    images.
    """
    image_scale: float = 1.0
    """Edges of the images that the network sees, over those of the files; its maps are brought back to the files' size
    before they are scored.
    """
    colour_p: float = 0.5
    """Probability that an image's colours change, by the next three."""
    gamma: tuple[float, float] = (0.9, 1.1)
    """Pixels of 0..255 are taken to the power U(gamma)."""
    brightness: tuple[float, float] = (0.9, 1.1)
    """They are multiplied by U(brightness)."""
    channel_gain: tuple[float, float] = (0.9, 1.1)
    """Red, green and blue are each multiplied by U(channel_gain)."""
    # ---- network ----
    init: str = "none"
    """Weights the image encoder starts from: anybody's, see weights.py, or by name: imagenet, simipu-kitti, timm:NAME,
    see weights_named.py. none: from scratch.
    """
    zero_init_residual: bool = True
    """From scratch, the last batch norm of every residual block starts at 0 (Goyal et al. 2017), as in the toolbox.
    Short runs learn faster without.
    """
    init_pixels: Literal["auto", "rgb", "bgr", "rgb_mean", "bgr_mean"] = "auto"
    """How that file's pixels were normalised, where it does not say."""
    image_encoder: str = "resnet50"
    """resnet18, 34, 50, 101, or timm:NAME when timm is installed."""
    freeze: encoders.Freeze = "none"
    """What of the image encoder stays as it is, statistics included: none, its first stage, or all of it: what does it
    know by itself?"""
    decoder_width: int = 0
    """Channels of the decoder at its deepest, halved at each of the four levels after it. 0: as many as the encoder has
    there (2048 for ResNet-50, as in the toolbox).
    """
    max_depth: float = 80.0
    """Metres: the most that the network can say, and that is scored."""
    min_depth: float = 1e-3
    """Metres: what predictions are cut to, and the least that is scored."""
    # ---- optimisation ----
    batch_size: int = 16
    """Images per step, over all GPUs."""
    group: int = 8
    """Images per forward pass, over which SigLoss and batch norm take their statistics: 8 on each of two GPUs in the
    toolbox. If the GPUs together take less than batch_size in a pass, passes are accumulated; a batch_size of less than
    this for each GPU makes groups smaller.
    """
    epochs: int = 24
    """The rate follows one cycle over all of them, so another number is another run."""
    max_steps: int = 0
    """Steps of that cycle, in place of those epochs; 0: as many as they make."""
    lr: float = 1e-4
    """AdamW's, at the top of the cycle; betas (.95, .99)."""
    weight_decay: float = 0.01
    """On all parameters, as in the toolbox."""
    clip: float = 35.0
    """Norm that gradients are cut to; 0 for not at all."""
    # ---- the run ----
    name: str = "depth_kitti"
    """The run lives in out/NAME."""
    out: str = "out"
    """Folder of all runs."""
    seed: int = 0
    """Of weights, order and augmentation."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    amp: Literal["gpu", "always", "never"] = "gpu"
    """bfloat16 autocast: on GPUs, on CPUs too, or not at all. The last layer's answer and the loss stay in float32."""
    compile: bool = False
    """torch.compile the network."""
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
            name="depth_demo", dataset="scenes", data_root=("data/synthetic",), synthetic_frames=64,
            splits=("train",), eval_splits=("val",), workers=1, image_scale=1 / 3,
            image_encoder="resnet18", batch_size=8, max_steps=150, lr=5e-4, log_every=5, save_every=50,
        ),
    ),
    "kitti": ("KITTI's Eigen split: the toolbox's recipe.", Config()),
    "nyu": (
        "NYU Depth v2: the toolbox's recipe.",
        Config(
            name="depth_nyu", dataset="nyu", data_root=("data/nyu",), splits=("nyu_train.txt",),
            eval_splits=("nyu_test.txt",), crop=(544, 416), max_depth=10.0, brightness=(0.75, 1.25),
        ),
    ),
    "lidar": (
        "Any data set of simipu.py's, its own sweeps projected into the images as ground truth.",
        Config(
            name="depth_lidar", dataset="lidar", data_root=("data/kitti",), splits=("train",), eval_splits=("val",),
        ),
    ),
}  # fmt: skip

BETAS = (0.95, 0.99)  # of AdamW
LOG_OFFSET, MEAN_WEIGHT = 1e-3, 0.15  # of SigLoss: metres added before logarithms; share of the squared mean
# of the cycle: share of the steps that it rises; first and last rate, as shares of the highest
WARM_UP, START, END = 0.3, 1 / 25, 1 / 2500

# a checkpoint may be continued with other values of these; any other difference is another experiment
FREE = {"data_root", "depth_root", "workers", "resident", "name", "out", "device", "compile", "init"}
FREE |= {"log_every", "save_every", "keep_every", "track", "eval_splits", "eval_root", "eval_frames", "eval_every"}


# -----------------------------------------------------------------------------
# network


class Conv(nn.Module):
    """A convolution with bias and no normalisation, and a ReLU after it. Named as mmcv's ConvModule, and initialised
    like it.
    """

    def __init__(self, cin, cout, size, relu=True):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, size, padding=size // 2)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return F.relu(self.conv(x), inplace=True) if self.relu else self.conv(x)


class UpSample(nn.Module):
    """Enlarge to the size of a skip connection, corners aligned; concatenate; two convolutions."""

    def __init__(self, cin, cout):
        super().__init__()
        self.convA, self.convB = Conv(cin, cout, 3), Conv(cout, cout, 3)

    def forward(self, x, skip):
        x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=True)
        return self.convB(self.convA(torch.cat([x, skip], 1)))


class DenseDepth(nn.Module):
    """The decoder: 1x1 convolution with no ReLU on the deepest map, then once per map before it, halving the channels
    each time; one channel at the end (toolbox, densedepth_head.py). channels: of the encoder's maps, shallowest first.
    forward: those maps -> float32 (B, 1, h, w) logits of the first map's size, float32 under autocast too.
    """

    def __init__(self, channels, width=0):
        super().__init__()
        width = width or channels[-1]
        self.conv_list = nn.ModuleList([Conv(channels[-1], width, 1, relu=False)])
        for skip in reversed(channels[:-1]):
            self.conv_list.append(UpSample(skip + width, width // 2))
            width //= 2
        self.conv_depth = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, maps):
        x = self.conv_list[0](maps[-1])
        for up, skip in zip(list(self.conv_list)[1:], reversed(maps[:-1])):
            x = up(x, skip)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would leave depth in steps of 1 %
            return self.conv_depth(x.float())


class DepthNet(nn.Module):
    """Image encoder and decoder, with the toolbox's parameter names."""

    def __init__(self, c):
        super().__init__()
        self.max_depth = c.max_depth
        self.backbone = encoders.build_image_encoder(c.image_encoder)
        maps = len(self.backbone.map_channels)
        if maps != 5:
            wanted = "the decoder wants five, of strides 2 to 32"
            raise BadInput(f"--image-encoder {c.image_encoder}: has {maps} maps; {wanted}")
        self.decode_head = DenseDepth(self.backbone.map_channels, c.decoder_width)
        self.frozen = encoders.freeze_parts(self.backbone, c.freeze)

    def train(self, mode=True):
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def depth(self, image):
        """image (B, 3, H, W) -> metres in (0, max_depth), float32 (B, 1, H / 2, W / 2)."""
        return self.decode_head(self.backbone(image)).sigmoid() * self.max_depth

    def forward(self, batch, report=True):
        """batch of data_depth.augment -> loss, stats."""
        truth = batch["depth"]  # (B, H, W)
        depth = self.depth(batch["image"])  # (B, 1, H / 2, W / 2)
        prediction = F.interpolate(depth, truth.shape[1:], mode="bilinear", align_corners=True)[:, 0]
        loss = sig_loss(prediction, truth)
        if not report:
            return loss, {}
        known = truth > 0
        error = (prediction.detach() - truth).abs() / truth.clamp(min=1e-6)
        abs_rel = error[known].mean() if known.any() else truth.new_zeros(())
        return loss, {"loss": loss.detach(), "abs_rel": abs_rel, "known": known.float().mean()}


def sig_loss(prediction, truth):
    """The scale-invariant logarithmic loss, over all pixels of the batch that have ground truth (truth > 0), in
    float32: g = log(p + 1e-3) - log(t + 1e-3), sqrt(var(g) + .15 mean(g)^2), the variance unbiased (toolbox,
    sigloss.py).

    prediction, truth: metres, of one shape. 0, with a gradient of zeros, for fewer than two such pixels; at a perfect
    prediction the root's infinite slope is cut off.
    """
    known = truth > 0
    g = torch.where(known, torch.log(prediction.float() + LOG_OFFSET) - torch.log(truth.float() + LOG_OFFSET), 0.0)
    n = known.sum()  # by sums, not by indexing: no GPU is waited for
    mean = g.sum() / n.clamp(min=1)
    variance = torch.where(known, g - mean, 0.0).square().sum() / (n - 1).clamp(min=1)
    return torch.where(n > 1, (variance + MEAN_WEIGHT * mean.square()).clamp(min=1e-12).sqrt(), g.sum() * 0.0)


def one_cycle(step, steps):
    """The rate at a step, as a share of the highest: from 1/25 along a cosine to 1 at 30 % of the steps, and along
    another to 1/2500 (Smith and Topin 2018, with the constants of mmcv's OneCycle and the toolbox's schedule).
    """
    top = WARM_UP * steps - 1
    low, high, at = (START, 1.0, step / top) if step < top else (1.0, END, (step - top) / max(steps - 1 - top, 1e-9))
    return high + (low - high) * (1 + math.cos(math.pi * min(at, 1.0))) / 2


# -----------------------------------------------------------------------------
# training


def check_config(c, world):
    """-> runtime.split_batch. Raises BadInput, naming the flag, for what cannot work."""
    split = runtime.split_batch(c, world)
    runtime.check_range(c, "epochs log_every save_every frame_stride", 1, 1e9, "1 or more")
    runtime.check_range(c, "lr max_depth min_depth", 1e-30, 1e30, "above 0")
    runtime.check_range(c, "image_scale", 1e-3, 8, "above 0, and 8 or less")
    runtime.check_range(c, "gamma brightness channel_gain", 1e-30, 1e3, "above 0, the smaller first", rising=True)
    runtime.check_range(c, "seed workers max_steps eval_every eval_frames synthetic_frames crop", 0, 1e9, "0 or more")
    runtime.check_range(c, "keep_every", 0, 1e9, "0 or more")
    runtime.check_range(c, "weight_decay clip decoder_width", 0, 1e6, "0 or more")
    runtime.check_range(c, "rotation", 0, 180, "from 0 to 180")
    runtime.check_range(c, "labels", 1e-30, 1, "above 0, and 1 or less")
    runtime.check_range(c, "rotation_p flip colour_p", 0, 1, "from 0 to 1")
    if c.decoder_width % 16:
        raise BadInput(f"--decoder-width {c.decoder_width}: must be a multiple of 16, as it is halved four times")
    if c.min_depth >= c.max_depth:
        raise BadInput(f"--min-depth {c.min_depth}: must be below --max-depth {c.max_depth:g}")
    return split


def start_encoder(encoder, c):
    """Load --init, or see to --zero-init-residual. -> a line for the user."""
    if c.init != "none":
        return weights.load_image_encoder(encoder, c.init, c.init_pixels)
    if c.zero_init_residual:
        for block in encoder.modules():
            if isinstance(block, encoders.BasicBlock):
                nn.init.zeros_(block.bn2.weight)
            if isinstance(block, encoders.Bottleneck):
                nn.init.zeros_(block.bn3.weight)
    return "image encoder: from scratch"


def build_optimizer(model, c):
    """AdamW over all parameters that learn alike, as in the toolbox; one kernel for all of them."""
    learns = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learns, c.lr, betas=BETAS, weight_decay=c.weight_decay, fused=True)


def load_frames(c, run):
    """-> pairs to train on, pairs held out, a note to print or None.

    Raises BadInput as data_depth.find_pairs does, and for held-out pairs that are trained on.
    """
    synthetic.write_scenes(c, run)
    find = functools.partial(data_depth.find_pairs, frame_stride=c.frame_stride, skip_missing=c.skip_missing)
    train, notes = runtime.main_first(run, lambda: find(c.dataset, c.data_root, c.depth_root, c.splits))
    held_out = []
    if c.eval_splits or c.eval_root:
        where = c.dataset, c.eval_root or c.data_root, c.depth_root, c.eval_splits
        judged = functools.partial(find, *where, flag="--eval-splits", limit=c.eval_frames)
        held_out, more = runtime.main_first(run, judged)
        notes += more
    flag = runtime.held_out_flag(c)
    data.check_unseen(train, held_out, flag)
    notes += data.shared_drives(train, held_out, flag)
    train = data.share_of(train, c.labels)
    return train, held_out, "\n".join(notes) or None


def train(c):
    run = runtime.start_run(c.device, c.seed)
    group, accumulate, a_step = check_config(c, run.world)

    # ============ network and optimiser ============
    model = DepthNet(c).to(run.device, memory_format=torch.channels_last)
    notes = [start_encoder(model.backbone, c)]
    torch.backends.cudnn.benchmark = True  # crops are of one size
    optimizer = build_optimizer(model, c)
    if c.compile:
        model.compile()

    # ============ data ============
    pairs, held_out, note = load_frames(c, run)
    notes += [note] if note else []
    if len(pairs) < c.batch_size:
        raise BadInput(f"--batch-size {c.batch_size}: the {len(pairs)} pairs found are too few")
    lines = data.inventory(pairs)
    inventory, fingerprint = data.digests(lines), data.fingerprint(lines)
    steps_per_epoch = len(pairs) // c.batch_size
    steps = c.max_steps or c.epochs * steps_per_epoch
    # the encoder's start is part of the experiment, the path it lay at is not
    start = {"init": "none" if c.init == "none" else runtime.hash_of(model.backbone.state_dict())}
    identity = runtime.as_json(c, without=FREE) | {"group": group, "frames": fingerprint} | start
    judgement = (lambda: eval_depth.judge(model, held_out, c, run)) if held_out else None
    loop = Loop(c, run, model, [optimizer], identity, data.Names(pairs), "depth", judgement)
    dataset = data_depth.DepthFrames(pairs, c)
    batches = data.Batches(len(pairs), c.batch_size, group, c.seed, run.rank, run.world, loop.start, steps)
    if c.resident:
        loaded = data_depth.resident(dataset, batches, run.device)
    else:
        loaded = stream(dataset, batches, data.collate, c.workers, run)

    def next_batch(step):
        """The next forward pass's batch, augmented; None after the last step."""
        if step < steps:
            return data_depth.augment(next(loaded), data_depth.SCALE[c.dataset], run.device)

    # ============ the loop ============
    batch = next_batch(loop.start)  # before anything is written: a broken data set leaves no trace
    about = runtime.provenance(run, __file__)
    about |= {"config": runtime.as_json(c), "data": {"frames": len(pairs), "fingerprint": identity["frames"]}}
    million = sum(p.numel() for p in loop.owned) / 1e6
    counts = f"{len(pairs)} pairs, {len(held_out)} held out, {million:.1f} M parameters"
    lines = [
        *notes,
        f"{c.name}: {counts}, {run.world} x {run.device.type}",
        a_step,
        f"steps {loop.start} to {steps}, {steps_per_epoch} an epoch, into {loop.folder}/",
    ]
    loop.begin(steps, about, lines)
    for step in loop:
        loop.set_rate(one_cycle(step, steps))

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
            loop.bar.set_postfix_str(f"loss {stats['loss']:.3f}, abs_rel {stats['abs_rel']:.3f}")
        if loop.saving:  # first: judging may stop at a broken file
            loop.save(inventory=inventory)
        if loop.judging:
            loop.judge()
    if not loop.stopping:
        finish(model, c, run, pairs, held_out, loop)
        loop.end()


def finish(model, c, run, pairs, held_out, loop):
    """The nine metrics on held-out frames, and a picture of one of them."""
    if run.main:
        folder = loop.folder
        pictures.draw_depth_curves(folder / "log.jsonl", folder / "curves.png")
        said = eval_depth.draw(model, (held_out or pairs)[0], c, run.device, folder / "depth.png")
        print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} into {folder}/\ndepth.png: {said}")
    if held_out and run.main:
        print("\n" + "\n".join(eval_depth.report(c, {c.name: loop.judged})))


def main():
    runtime.command_line(lambda: tyro.extras.overridable_config_cli(PRESETS), train)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
