"""Is it learning, and is it right: figures on frames never trained on, and pictures.

    python eval.py match out/demo/last.pt --control out/wrong/last.pt       # does a place point out its own pixel?
    python eval.py probe out/demo/last.pt --also imagenet.pth               # how much depth can be read off the features?
    python eval.py show out/demo/last.pt --frame 3                          # four pictures of a frame
    python eval.py depth out/depth_demo/last.pt                             # of finetune_depth.py: eval_depth.py says what
    python eval.py export out/demo/last.pt --format mmdet --out mmdet.pth   # the weights, for other people's code

`match` asks of every place in an unseen frame how well the trained image encoder points it out: the place's own image
feature is ranked among all of the frame's by its similarity to the place's point feature. Asked twice, of the right
image and of *another frame's image at the same pixels*. A fixed camera lets a network guess depth from the pixel's
position alone, which lowers both; only the gap between the two is what the network sees in the image.

`probe` fits a ridge regression of log-depth on frozen features at the pixels of LiDAR points. Position, which every row
has for free, explains most of it, and a network trained on wrong pairs lifts it nearly as much as one trained on true
ones: so it is never shown without its baselines, and differences under .03 are noise.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

import data
import data_depth
import eval_depth
import eval_match
import finetune_depth
import pictures
import runtime
import simipu
import weights
from files import BadInput, read_checkpoint

FEW = 8  # frames that batch norm statistics are taken from, for pictures


def load_run(path, device="cpu"):
    """A run's last.pt: the whole model, in eval mode, its Config, and all that the file says. Raises BadInput for any
    other file.
    """
    saved = read_checkpoint(path)
    c = runtime.config_of(saved, simipu.Config, path, "simipu.py")
    model = simipu.SimIPU(c)
    runtime.load_exactly(model, saved["model"], path, saved.get("git"))
    return model.to(device).eval(), c, saved


def names_of(paths, taken=()):
    """{name for a table: path}: a run's folder, or a file, with as much of the path before it as makes all of them
    different.
    """
    tails = [p.parent.parts if p.name in ("last.pt", "backbone.pt") else p.parts for p in paths]
    for length in range(1, max(map(len, tails), default=0) + 1):
        names = ["/".join(t[-length:]) for t in tails]
        if len({*names, *taken}) == len(names) + len(taken) and not any(n.isdigit() for n in names):
            return dict(zip(names, paths))
    return {str(p) if str(p) not in taken else f"{p} (2)": p for p in paths}


def choose_frames(c, runs, data_root=(), splits=(), limit=0, frame_stride=1):
    """The frames to judge on, by default the run's own --eval-splits. -> frames, notes to print: what the runs, {name:
    contents of a last.pt}, were trained on is said. Raises BadInput for fewer than two.
    """
    if limit < 0 or frame_stride < 1:
        raise BadInput(f"--frames {limit} --frame-stride {frame_stride}: must be above 0")
    if not (data_root or splits or c.eval_root or c.eval_splits):
        raise BadInput("--data-root, --splits: the run has no --eval-splits, so say which frames to judge on")
    roots, splits = data_root or c.eval_root or c.data_root, splits or c.eval_splits
    frames = simipu.find_frames(dataclasses.replace(c, frame_stride=frame_stride), roots, splits)
    frames = data.evenly_spread(frames, limit or c.eval_frames)
    if len(frames) < 2:
        raise BadInput(
            f"--data-root {' '.join(map(str, roots))}: {len(frames)} frames chosen; judging needs two or more, for the other frame's image"
        )
    notes = []
    for name, saved in runs.items():
        seen = set(data.inventory(frames)) & set(saved.get("inventory", ()))
        drives = {f.drive for f in frames} & set(saved.get("drives", ()))
        if seen:
            notes.append(
                f"note: {name} was trained on {len(seen)} of these {len(frames)} frames: its figures will flatter"
            )
        elif drives:
            notes.append(
                f"note: {name} was trained on other frames of {len(drives)} of these drives, {min(drives)} among them: its figures will flatter"
            )
    return frames, notes


# -----------------------------------------------------------------------------
# commands


def match_command(
    checkpoints: tyro.conf.Positional[tuple[Path, ...]],
    control: Path | None = None,
    data_root: tuple[str, ...] = (),
    splits: tuple[str, ...] = (),
    frames: int = 0,
    frame_stride: int = 1,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """Does a place point out its own pixel, on frames of drives not trained on? Beside a random network, always.

    Args:
        checkpoints: A run's last.pt, or several.
        control: last.pt of a run with --pairs wrong and the same budget: what the pixel's position alone teaches.
        data_root: Folders with the frames; by default those of the first run.
        splits: Their splits; by default the first run's --eval-splits.
        frames: At most so many, evenly spread; by default the first run's --eval-frames.
        frame_stride: Of the raw layout, keep every n-th frame of a drive.
        device: auto is the GPU if there is one.
    """
    if not checkpoints:
        raise BadInput("match: no checkpoint given")
    device = runtime.start_run(device).device
    loaded = {name: load_run(path, device) for name, path in names_of(checkpoints, ("random", "wrong pairs")).items()}
    _, c, saved = next(iter(loaded.values()))
    if control:
        loaded = {"wrong pairs": load_run(control, device)} | loaded
    chosen, notes = choose_frames(
        c, {name: run[2] for name, run in loaded.items()}, data_root, splits, frames, frame_stride
    )
    for name, (_, other, _) in loaded.items():
        differ = [
            field for field in ("places", "num_points", "image_scale") if getattr(other, field) != getattr(c, field)
        ]
        if differ:
            notes.append(f"note: {name} is judged with its own {', '.join(differ)}, others than the first run's")
    if control:
        _, wrong, budget = loaded["wrong pairs"]
        if wrong.pairs != "wrong":
            raise BadInput(f"--control {control}: that run was not trained with --pairs wrong")
        if budget["step"] * wrong.batch_size != saved["step"] * c.batch_size:
            notes.append(
                f"note: the control has seen {budget['step'] * wrong.batch_size} frames, the first run {saved['step'] * c.batch_size}"
            )
    rows = {"random": eval_match.match(simipu.untrained(c, device), chosen, c, device)}
    rows |= {name: eval_match.match(model, chosen, c, device) for name, (model, c, _) in loaded.items()}
    print("\n".join(notes + eval_match.match_table(rows)))


def probe_command(
    checkpoint: tyro.conf.Positional[Path],
    also: tuple[Path, ...] = (),
    data_root: tuple[str, ...] = (),
    splits: tuple[str, ...] = (),
    frames: int = 0,
    frame_stride: int = 1,
    points: int = 512,
    stage: Literal[0, 3, 4] = 0,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """How much depth can be read off frozen features, beyond what the pixel's position says? Differences under .03 are
    noise.

    Args:
        checkpoint: A run's last.pt. also: Other weights of the same architecture, anything that --init takes:
        imagenet.pth, the last.pt of a control. data_root: Folders with the frames; by default those of the run. splits:
        Their splits; by default the run's --eval-splits. frames: At most so many, evenly spread; by default the run's
        --eval-frames. frame_stride: Of the raw layout, keep every n-th frame of a drive. points: LiDAR points per
        frame. stage: Of the image encoder. 0 is the last, or the one before where images have fewer than 128 rows.
        device: auto is the GPU if there is one.
    """
    device = runtime.start_run(device).device
    model, c, saved = load_run(checkpoint, device)
    if not c.inter_weight:
        raise BadInput(f"{checkpoint}: trained without an image encoder (--inter-weight 0)")
    names = names_of([checkpoint, *also], ("position", "random"))
    files = {name: saved if path == checkpoint else read_checkpoint(path) for name, path in names.items()}
    runs = {name: file for name, file in files.items() if isinstance(file, dict) and "inventory" in file}
    chosen, notes = choose_frames(c, runs, data_root, splits, frames, frame_stride)
    if points < 1:
        raise BadInput(f"--points {points}: must be above 0")
    if len(chosen) < 3:
        raise BadInput(
            f"--frames {len(chosen)}: probing needs three frames or more, to fit, to choose the ridge's strength, and to score"
        )
    torch.manual_seed(c.seed)
    encoders = {next(iter(names)): model.img_backbone, "random": simipu.build_image_encoder(c.image_encoder).to(device)}
    for name, path in list(names.items())[1:]:
        encoders[name] = simipu.build_image_encoder(c.image_encoder)
        notes.append(weights.load_image_encoder(encoders[name], path))
        encoders[name].to(device)
    rows = eval_match.probe(encoders, chosen, c, device, points, stage)
    print(
        "\n".join(
            [
                *notes,
                f"fitted and scored on {len(chosen)} frames, {min(points, c.num_points)} points each",
                *eval_match.probe_table(rows),
            ]
        )
    )


def find_frame(frames, wanted):
    """Index of the frame that `wanted` (text) names: an index, a name such as training/000003, or the end of one name.
    Raises BadInput.
    """
    named = [i for i, f in enumerate(frames) if wanted == f.name] or [
        i for i, f in enumerate(frames) if f.name.endswith("/" + wanted)
    ]
    if len(named) == 1:
        return named[0]
    if wanted in map(str, range(len(frames))) and not named:
        return int(wanted)
    what = f"{len(named)} frames of that name" if named else "no such frame"
    raise BadInput(f"--frame {wanted}: {what}; there are 0 to {len(frames) - 1}, {frames[0].name} to {frames[-1].name}")


def show(
    checkpoint: Path,
    /,
    data_root: Path | None = None,
    split: str | None = None,
    frame: str = "0",
    seed: int = 0,
    point: tuple[float, float, float] | None = None,
    pixel: tuple[float, float] | None = None,
    out: Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> None:
    """Four pictures of one frame: projection, pairs, features, similarity. No augmentation in the last two but the
    second view's.

    Args:
        checkpoint: last.pt of a run.
        data_root: Folder in KITTI's object or raw layout. Not given: the folders the run was trained on.
        split: Of the object layout: a file in ImageSets/. Not given: the run's --eval-splits, or its --splits.
        frame: Index into the split, or a frame's name, such as training/000003.
        seed: Of the augmentation that is drawn: another seed, another image scale, flip and second view.
        point: Metres in the LiDAR's frame (x forward, y left, z up). similarity.png asks about the place nearest to it.
        pixel: The same by pixel (u v) of similarity.png's image. Neither given: something near the middle.
        out: Folder for the PNGs. Not given: show/FRAME beside the checkpoint.
        device: auto is the GPU if there is one.
    """
    if point is not None and pixel is not None:
        raise BadInput("--point and --pixel: give one of them")
    model, c, _ = load_run(checkpoint)
    run = runtime.start_run(device, seed)
    judged = c.eval_root or c.data_root if c.eval_splits or c.eval_root else c.data_root
    roots, splits = [data_root] if data_root else judged, [split] if split else c.eval_splits or c.splits
    if seed < 0:
        raise BadInput(f"--seed {seed}: must be 0 or more")
    frames = simipu.find_frames(c, roots, splits)
    index = find_frame(frames, frame)
    things = frames[index].rig.things
    few = [i % len(frames) for i in range(index, index + min(len(frames), FEW))]  # as `match` does, from fewer frames
    unseen = eval_match.Unseen(frames, c, run.device)
    model = eval_match.recalibrated(model.to(run.device), unseen.groups(few), False)

    # as training sees it, and as it is judged
    sample = data.PretrainFrames(frames, dataclasses.replace(c, seed=seed, pairs="true"))[(0, index)]
    if isinstance(sample, BadInput):
        raise sample
    box = data.random_image_scale(c.image_scale, seed, 0)
    trained_on = data.augment(data.collate([sample]), box, run.device)
    plain = unseen.batch([index])
    found, (height, width) = pictures.embed(model, plain), plain["image"].shape[2:]
    place, chosen = pictures.choose_place(found, height, width, things, point, pixel)

    # nothing was written so far: wrong input leaves no trace
    name = frames[index].name
    folder = out or checkpoint.parent / "show" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {folder}: {e.strerror}") from None
    pairs = functools.partial(simipu.match_places, method=c.matching)
    old, new = sample["image"].shape[1::-1], trained_on["image"].shape[:1:-1]
    scale = min(b / o for b, o in zip(box, old))
    how = f"{name} as training sees it with seed {seed}: {old[0]} x {old[1]} pixels scaled by {scale:.2f}, "
    left, top, size = sample["window"]
    how += f"the part from {left:.0%}, {top:.0%} on of {size:.0%} of its edges, " * (size != 1 or any(c.shift))
    how += f"{'mirrored' if sample['flip'] else 'not mirrored'}, padded to {new[0]} x {new[1]}"
    at = "x {:.1f} m, y {:.1f} m, z {:.1f} m".format(*found["places"][place].tolist())
    said = {
        "projection.png": pictures.draw_projection(trained_on, folder / "projection.png", how, things),
        "pairs.png": pictures.draw_pairs(model, trained_on, folder / "pairs.png", pairs),
        "features.png": pictures.draw_features(plain, found, folder / "features.png", name, pairs),
        "similarity.png": pictures.draw_similarity(
            plain, found, folder / "similarity.png", place, f"{name}: what is like the place at {at} (star)?"
        ),
    }
    said["similarity.png"] += f" (place at {at}: {chosen})"
    print(f"{folder}/")
    print("\n".join(f"  {picture:<15} {line}" for picture, line in said.items()))


def load_depth_run(path, preset, device):
    """finetune_depth's last.pt, or a checkpoint of the toolbox with a preset that says what it is of; a preset with a
    last.pt says what other data it is to be judged on. -> model in eval mode, Config, names and sizes of the files it
    was trained on. Raises BadInput for any other file.
    """
    saved = read_checkpoint(path)
    if isinstance(saved, dict) and any(str(k).startswith("decode_head.") for k in saved.get("state_dict", ())):
        if not preset:
            raise BadInput(f"{path}: a checkpoint of the toolbox; --preset must say of what: kitti or nyu")
        c, tensors = finetune_depth.PRESETS[preset][1], saved["state_dict"]
    else:
        c, tensors = runtime.config_of(saved, finetune_depth.Config, path, "finetune_depth.py"), saved["model"]
        if preset:
            own = {f: getattr(c, f) for f in ("image_encoder", "decoder_width", "image_scale", "max_depth")}
            c = dataclasses.replace(finetune_depth.PRESETS[preset][1], **own)
    model = finetune_depth.DepthNet(c)
    runtime.load_exactly(model, tensors, path)
    return model.to(device, memory_format=torch.channels_last).eval(), c, set(saved.get("inventory", ()))


def depth_command(
    source: tyro.conf.Positional[Path],
    preset: Literal["demo", "kitti", "nyu", "kitti_lidar"] | None = None,
    data_root: tuple[str, ...] = (),
    depth_root: str = "",
    splits: tuple[str, ...] = (),
    frames: int | None = None,
    frame_stride: int | None = None,
    skip_missing: bool = False,
    save: Path | None = None,
    drawn: int = 8,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """Depth metrics of a network, or of anybody's predictions: Eigen style, and as KITTI's benchmark has them.

    Args:
        source: last.pt of finetune_depth.py; a checkpoint of the depth toolbox; or a folder of 16-bit PNGs, one an
        image, at its size or that
            of KITTI's crop, metres times 256 (NYU: 1000).
        preset: Data set, crops and range of depth: of a folder's predictions, or the toolbox's checkpoint. A last.pt
        has its own; with this it is
            judged on another data set.
        data_root: Folders of images; by default the run's, or the preset's. depth_root: Folder of ground truth; by
        default the run's, or where --data-root is given, the same. splits: Split files, or names in ImageSets/; by
        default the --eval-splits of the run or the preset. frames: At most so many images, evenly spread; 0 for all; by
        default the run's --eval-frames. frame_stride: Of raw drives without split files: keep every n-th frame; by
        default the run's. skip_missing: Leave out pairs that lack a file, instead of stopping at them. save: Folder to
        write predictions to, as 16-bit PNGs at the images' size, and pictures of some beside their ground truth. drawn:
        With --save, so many pictures, evenly spread. device: auto is the GPU if there is one.
    """
    run = runtime.start_run(device)
    for flag, value, low in (("frames", frames, 0), ("frame-stride", frame_stride, 1), ("drawn", drawn, 0)):
        if value is not None and value < low:
            raise BadInput(f"--{flag} {value}: must be {low} or more")
    if source.is_dir():
        if not preset:
            raise BadInput(
                f"{source}: a folder of predictions; --preset must say of what: {', '.join(finetune_depth.PRESETS)}"
            )
        model, c, trained_on = None, finetune_depth.PRESETS[preset][1], set()
    else:
        model, c, trained_on = load_depth_run(source, preset, run.device)
    roots, depth_root = data_root or c.eval_root or c.data_root, depth_root or ("" if data_root else c.depth_root)
    pairs, notes = data_depth.find_pairs(
        c.dataset,
        roots,
        depth_root,
        splits or c.eval_splits,
        frame_stride or c.frame_stride,
        skip_missing or c.skip_missing,
    )
    pairs = data.evenly_spread(pairs, (c.eval_frames if frames is None else frames) or len(pairs))
    seen = len(trained_on & set(data.inventory(pairs)))
    notes += (
        [f"note: {source} was trained on {seen} of these {len(pairs)} images: its figures will flatter"] if seen else []
    )
    scale = data_depth.SCALE[c.dataset]
    pictured = set(data.evenly_spread(range(len(pairs)), drawn))
    paths = [
        None if model else eval_depth.find_prediction(source, pair.name, eval_depth.bts_names(pair.name))
        for pair in pairs
    ]  # missing ones are known at once

    scored = []
    loaded = tqdm(
        runtime.ahead(lambda pair: eval_depth.load(pair, c), pairs), total=len(pairs), dynamic_ncols=True, mininterval=1
    )
    for i, ((image, truth), pair) in enumerate(zip(loaded, pairs)):
        if model:
            prediction, name = eval_depth.predict(model, image, c, run.device), pair.name
        else:
            prediction, name = (
                eval_depth.match_prediction(eval_depth.read_depth(paths[i], scale), truth.shape, paths[i]),
                str(paths[i]),
            )
        scored.append(eval_depth.score(prediction, truth, c, name))
        if save:
            flat = pair.name.replace("/", "_") + ".png"
            try:
                (save / "pictures").mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise BadInput(f"--save {save}: {e.strerror}") from None
            eval_depth.write_depth(prediction, save / flat, scale)
            if i in pictured:
                pictures.draw_depth(image, prediction, truth, save / "pictures" / flat, pair.name, c.max_depth)
    print(
        "\n".join(
            [
                *notes,
                *eval_depth.report(
                    c,
                    {
                        (source.resolve().parent if model else source.resolve()).name: eval_depth.summary(
                            scored, [p.name for p in pairs]
                        )
                    },
                ),
            ]
        )
    )
    if save:
        print(f"wrote {len(pairs)} predictions and {len(pictured)} pictures into {save}/")


def main():
    runtime.commands(
        {
            "match": match_command,
            "probe": probe_command,
            "show": show,
            "depth": depth_command,
            "export": weights.export,
        },
        __doc__,
    )


if __name__ == "__main__":
    main()
