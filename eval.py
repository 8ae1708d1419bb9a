"""Is it learning, and is it right: figures on frames never trained on, and pictures.

    python eval.py match out/demo/last.pt --control out/wrong/last.pt       # does a place point out its own pixel?
    python eval.py probe out/demo/last.pt --also imagenet.pth               # how much depth is in its features?
    python eval.py show out/demo/last.pt --frame 3                          # four pictures of a frame
    python eval.py depth out/depth_demo/last.pt                             # of finetune_depth.py; see eval_depth.py
    python eval.py det3d out/det3d_demo/last.pt                             # of finetune_det3d.py; see eval_boxes.py
    python eval.py det3d P.bin --protocol waymo --truth T.bin               # boxes for Waymo; see eval_waymo.py
    python eval.py mono3d out/mono3d_demo/last.pt                           # of finetune_mono3d.py; eval_mono3d.py
    python eval.py export out/demo/last.pt --format mmdet --out mmdet.pth   # the weights, for other people's code

The figures are functions of eval_match.py, which says what `match` and `probe` ask, eval_depth.py, eval_boxes.py,
eval_waymo.py, eval_mono3d.py and eval_nuscenes.py.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import functools
import os
from json import dumps as dump_json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

import data
import data_depth
import data_det3d
import data_kitti
import data_mono3d
import data_sets
import encoders
import eval_boxes
import eval_depth
import eval_match
import eval_mono3d
import eval_nuscenes
import eval_waymo
import finetune_depth
import finetune_det3d
import finetune_mono3d
import pictures
import pictures_boxes
import runtime
import simipu
import weights
import weights_named
from files import BadInput, read_checkpoint, writing

FEW = 8  # frames that batch norm statistics are taken from, for pictures
MAX_SEED = 2**63 - 1  # torch takes no larger one


# -----------------------------------------------------------------------------
# what the commands share


def at_least(low, **flags):
    """Raises BadInput for the first of the flags whose number is below `low`. None is no number."""
    for name, value in flags.items():
        if value is not None and value < low:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be {low} or more")


def make_folder(flag, folder):
    """Raises BadInput, naming the flag, where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--{flag} {folder}: {e.strerror or e}") from None


class Trained(NamedTuple):
    """A run of simipu.py."""

    model: simipu.SimIPU  # in eval mode
    c: simipu.Config
    saved: dict  # all that its last.pt says


def load_run(path, device="cpu"):
    """A run's last.pt -> Trained. Raises BadInput for any other file."""
    saved = read_checkpoint(path)
    c = runtime.config_of(saved, simipu.Config, path, "simipu.py")
    model = simipu.SimIPU(c)
    runtime.load_exactly(model, saved["model"], path, saved.get("git"))
    return Trained(model.to(device).eval(), c, saved)


def labels_of(paths, taken=()):
    """{name for a table: path}: a run's folder, or a file, with as much of the path before it as makes all of them
    different from each other and from the names that are `taken`.
    """
    tails = [p.parent.parts if p.name in ("last.pt", "backbone.pt") else p.parts for p in paths]
    longest = max(map(len, tails), default=0)
    for length in range(1, longest + 1):
        names = ["/".join(tail[-length:]) for tail in tails]
        all_differ = len({*names, *taken}) == len(names) + len(taken)
        if all_differ and not any(name.isdigit() for name in names):  # a seed alone says too little
            return dict(zip(names, paths))
    return {f"{path} (2)" if str(path) in taken else str(path): path for path in paths}


def choose_frames(c, data_root, splits, limit, frame_stride):
    """The frames to judge on, by default those of --eval-splits of the run with Config c, at most `limit` of them.
    Raises BadInput for fewer than two.
    """
    if not (data_root or splits or c.eval_root or c.eval_splits):
        raise BadInput("--data-root, --splits: the run has no --eval-splits, so say which frames to judge on")
    roots, named = data_root or c.eval_root or c.data_root, bool(splits)
    version = "auto" if data_root else c.version
    asked = dataclasses.replace(c, frame_stride=frame_stride or c.frame_stride, version=version)
    frames = simipu.find_frames(asked, roots, splits or c.eval_splits, named, limit or c.eval_frames)
    if len(frames) < 2:
        where = f"--data-root {' '.join(map(str, roots))}"
        need = "judging needs two or more, for the other frame's image"
        raise BadInput(f"{where}: {len(frames)} frames chosen; {need}")
    return frames


def seen_in_training(frames, files):
    """Notes to print about `files`, {name: contents of a last.pt}, that were trained on these frames, or on others of
    their drives.
    """
    notes = []
    whole, images = data.inventory(frames), data.inventory(frames, clouds=False)  # moco.py's is of images alone
    for name, saved in files.items():
        known = saved.get("inventory", ())
        seen = seen_before(name, whole, known) or seen_before(name, images, known)
        drives = data.drives_of(frames) & set(saved.get("drives", ()))
        if drives and not seen:
            seen = [flatters(name, f"other frames of {len(drives)} of these drives, {min(drives)} among them")]
        notes += seen
    return notes


def seen_before(name, lines, known, what="frames"):
    """A note to print, a list, where some of an inventory's lines are in that of the checkpoint `name`; else none."""
    seen = data.count_seen(lines, known)
    return [flatters(name, f"{seen} of these {len(lines)} {what}")] if seen else []


def flatters(name, where):
    return f"note: {name} was trained on {where}: its figures will flatter"


def load_trained(path, script, network, device):
    """The last.pt of a fine-tuning script, whose Config its `network` is made of -> model in eval mode, Config, the
    inventory of what it was trained on. Raises BadInput for any other file.
    """
    saved = read_checkpoint(path)
    c = runtime.config_of(saved, script.Config, path, Path(script.__file__).name)
    model = network(c)
    runtime.load_exactly(model, saved["model"], path, saved.get("git"))
    return model.to(device).eval(), c, saved.get("inventory", ())


# -----------------------------------------------------------------------------
# match


def match(
    checkpoints: tuple[Path, ...],
    /,
    control: Path | None = None,
    data_root: tuple[str, ...] = (),
    splits: tuple[str, ...] = (),
    frames: int | None = None,
    frame_stride: int | None = None,
    json: Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """Does a place point out its own pixel, on frames of drives not trained on? Beside a random network, always. Under
    torchrun every process judges its share.

    Args:
        checkpoints: A run's last.pt, or several.
        control: last.pt of a run with --pairs wrong and the same budget: what the pixel's position alone teaches.
        data_root: Folders with the frames, of any data set: it is known by what lies there. By default those of the
            first run.
        splits: Their splits; by default the first run's --eval-splits.
        frames: At most so many, evenly spread; by default the first run's --eval-frames.
        frame_stride: Keep every n-th frame of a raw drive or sequence, and of nuScenes' keyframes; by default as the
            first run did.
        json: File to write all figures to, and the sums of each frame: {name: eval_match.match's dict}.
        device: auto is the GPU if there is one.
    """
    at_least(1, frames=frames, frame_stride=frame_stride)
    if not checkpoints:
        raise BadInput("match: no checkpoint given")
    process = runtime.start_run(device)
    device = process.device
    names = labels_of(checkpoints, ("random", "wrong pairs"))
    runs = {name: load_run(path, device) for name, path in names.items()}
    first = next(iter(runs.values()))
    if control:
        wrong = load_run(control, device)
        if wrong.c.pairs != "wrong":
            raise BadInput(f"--control {control}: that run was not trained with --pairs wrong")
        runs = {"wrong pairs": wrong} | runs
    choose = functools.partial(choose_frames, first.c, data_root, splits, frames, frame_stride)
    chosen = runtime.main_first(process, choose)
    notes = seen_in_training(chosen, {name: run.saved for name, run in runs.items()})
    notes += other_settings(runs, first)
    if control:
        notes += unlike_control(wrong, first)

    rows = {"random": eval_match.match(simipu.untrained(first.c, device), chosen, first.c, device, process)}
    for name, run in runs.items():
        rows[name] = eval_match.match(run.model, chosen, run.c, device, process)
    if process.main:
        beside = beside_control(rows) if control else []
        print("\n".join(notes + eval_match.match_table(rows) + beside))
    if json and process.main:
        with writing(json) as temporary:
            temporary.write_text(dump_json(rows, indent=1) + "\n")


def beside_control(rows):
    """Lines on all runs of {name: result of eval_match.match} that have a branch for images, as the control must."""
    lines, control = [], rows["wrong pairs"]
    for name, figures in rows.items():
        if name not in ("random", "wrong pairs") and "gain" in figures and "gain" in control:
            better, low, high = eval_match.advantage([figures], [control])
            said = f"{better:z.2f} ({low:z.2f} to {high:z.2f})"
            lines.append(f"{name} reads the right image {said} nats better than wrong pairs")
    return lines


def other_settings(runs, first):
    """Notes to print about runs, {name: Trained}, that are not asked quite what the first one is."""
    notes = []
    for name, run in runs.items():
        differ = differing(run.c, first.c, "places", "num_points", "image_scale")
        if differ:
            notes.append(f"note: {name} is judged with its own {', '.join(differ)}, others than the first run's")
    return notes


def differing(c, other, *fields):
    """Which of these fields two Configs have other values of."""
    return [field for field in fields if getattr(c, field) != getattr(other, field)]


def unlike_control(control, first):
    """Notes to print where the control has not seen as much as the first run, or is another network."""
    notes = []
    control_saw, first_saw = (run.saved["step"] * run.c.batch_size for run in (control, first))
    if control_saw != first_saw:
        notes.append(f"note: the control has seen {control_saw} frames, the first run {first_saw}")
    differ = differing(control.c, first.c, "image_encoder", "point_features", "use_xyz", "inter_stages")
    if differ:
        notes.append(f"note: the control has another {', '.join(differ)} than the first run")
    return notes


# -----------------------------------------------------------------------------
# probe


def probe(
    checkpoint: Path,
    /,
    also: tuple[Path, ...] = (),
    data_root: tuple[str, ...] = (),
    splits: tuple[str, ...] = (),
    frames: int | None = None,
    frame_stride: int | None = None,
    points: int = 512,
    stage: Literal[0, 3, 4] = 0,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """How much depth can be read off frozen features, beyond what the pixel's position says? Differences under .03 are
    noise.

    Args:
        checkpoint: A run's last.pt.
        also: Other weights of the same architecture, anything that --init takes: imagenet, a control's last.pt.
        data_root: Folders with the frames, of any data set; by default those of the run.
        splits: Their splits; by default the run's --eval-splits.
        frames: At most so many, evenly spread; by default the run's --eval-frames.
        frame_stride: Keep every n-th frame of a raw drive or sequence, and of nuScenes' keyframes; by default as the
            run did.
        points: LiDAR points per frame.
        stage: Of the image encoder. 0 is the last, or the one before where images have fewer than 128 rows.
        device: auto is the GPU if there is one.
    """
    at_least(1, frames=frames, frame_stride=frame_stride, points=points)
    device = runtime.start_run(device).device
    run = load_run(checkpoint, device)
    c = run.c
    if not c.inter_weight:
        raise BadInput(f"{checkpoint}: trained without an image encoder (--inter-weight 0)")
    own, *others = labels_of([checkpoint, *also], ("position", "random")).items()
    chosen = choose_frames(c, data_root, splits, frames, frame_stride)
    if len(chosen) < 3:
        need = "probing needs three frames or more, to fit, to choose the ridge's strength, and to score"
        raise BadInput(f"{len(chosen)} frames chosen by --data-root, --splits and --frames: {need}")

    torch.manual_seed(c.seed)
    networks = {own[0]: run.model.img_backbone, "random": encoders.build_image_encoder(c.image_encoder).to(device)}
    files, loaded = {own[0]: run.saved}, []
    for name, path in others:
        encoder = encoders.build_image_encoder(c.image_encoder)
        loaded.append(weights.load_image_encoder(encoder, path, flag="--also"))
        networks[name] = encoder.to(device)
        files[name] = contents_of_run(weights_named.find(path, c.image_encoder, "--also").path)
    rows = eval_match.probe(networks, chosen, c, device, points, stage)
    fitted = f"fitted and scored on {len(chosen)} frames, {min(points, c.num_points)} points each"
    print("\n".join([*seen_in_training(chosen, files), *loaded, fitted, *eval_match.probe_table(rows)]))


def contents_of_run(path):
    """Contents of a last.pt, {} of other weights. Raises BadInput for what cannot be read."""
    saved = read_checkpoint(path)
    return saved if isinstance(saved, dict) and "inventory" in saved else {}


# -----------------------------------------------------------------------------
# show


def find_frame(frames, wanted):
    """Index of the frame that `wanted` (text) names: an index, a name such as training/000003, or the end of one name.
    Raises BadInput.
    """
    named = [i for i, f in enumerate(frames) if f.name == wanted]
    if not named:
        named = [i for i, f in enumerate(frames) if f.name.endswith(f"/{wanted}")]
    if len(named) == 1:
        return named[0]
    if not named and wanted in map(str, range(len(frames))):
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
):
    """Four pictures of one frame: projection, pairs, features, similarity. No augmentation in the last two but the
    second view's.

    Args:
        checkpoint: last.pt of a run.
        data_root: Folder of any data set. Not given: the folders that the run has the split in.
        split: Of that data set. Not given: the run's --eval-splits, or its --splits.
        frame: Index into the split, or a frame's name, such as training/000003.
        seed: Of the augmentation that is drawn: another seed, another image scale, flip and second view.
        point: Metres in the LiDAR's frame (x forward, y left, z up). similarity.png asks about the place nearest to it.
        pixel: The same by pixel (u v) of similarity.png's image. Neither given: something near the middle.
        out: Folder for the PNGs. Not given: show/FRAME beside the checkpoint.
        device: auto is the GPU if there is one.
    """
    if point is not None and pixel is not None:
        raise BadInput("--point and --pixel: give one of them")
    if not 0 <= seed <= MAX_SEED:
        raise BadInput(f"--seed {seed}: must be from 0 to {MAX_SEED}")
    model, c, _ = load_run(checkpoint)
    run = runtime.start_run(device, seed)
    frames = frames_to_show(c, data_root, split)
    index = find_frame(frames, frame)
    name, things = frames[index].name, frames[index].rig.things
    unseen = eval_match.Unseen(frames, c, run.device)
    few = [(index + i) % len(frames) for i in range(min(len(frames), FEW))]
    model = eval_match.recalibrated(model.to(run.device), unseen.groups(few), False)  # as `match` does

    # the frame as training sees it, and as it is judged
    augmented, how = augmented_frame(frames, index, c, seed, run.device)
    plain = unseen.batch([index])
    height, width = plain["image"].shape[2:]
    found = pictures.embed(model, plain)
    place, chosen = pictures.choose_place(found, height, width, things, point, pixel)
    x, y, z = found["places"][place].tolist()
    at = f"x {x:.1f} m, y {y:.1f} m, z {z:.1f} m"

    # nothing was written so far: wrong input leaves no trace
    folder = out or checkpoint.parent / "show" / name
    make_folder("out", folder)
    match_places = functools.partial(simipu.match_places, method=c.matching)
    question = f"{name}: what is like the place at {at} (star)?"
    said = {
        "projection.png": pictures.draw_projection(augmented, folder / "projection.png", f"{name} {how}", things),
        "pairs.png": pictures.draw_pairs(model, augmented, folder / "pairs.png", match_places),
        "features.png": pictures.draw_features(plain, found, folder / "features.png", name, match_places),
        "similarity.png": pictures.draw_similarity(plain, found, folder / "similarity.png", place, question),
    }
    said["similarity.png"] += f" (place at {at}: {chosen})"
    print(f"{folder}/")
    for picture, line in said.items():
        print(f"  {picture:<15} {line}")


def frames_to_show(c, data_root, split):
    """All frames of the split that was asked for, or of those that the run with Config c was judged on, or trained."""
    judged = split in c.eval_splits if split else bool(c.eval_splits or c.eval_root)
    roots, splits = (c.eval_root or c.data_root, c.eval_splits) if judged else (c.data_root, c.splits)
    if data_root:
        roots, c = [data_root], dataclasses.replace(c, version="auto")
    if split:
        splits = [split]
    return simipu.find_frames(c, roots, splits, named=bool(split))


def augmented_frame(frames, index, c, seed, device):
    """A batch of one frame as training with this seed sees it, and in words what was done to it. Raises BadInput."""
    dataset = data.PretrainFrames(frames, dataclasses.replace(c, seed=seed, pairs="true"))
    sample = dataset[0, index]
    if isinstance(sample, BadInput):
        raise sample
    box = data.random_image_scale(c.image_scale, seed, 0)
    batch = data.augment(data.collate([sample]), box, device)

    old_height, old_width = sample["image"].shape[:2]
    height, width = batch["image"].shape[2:]
    scale = min(box[0] / old_width, box[1] / old_height)
    done = [f"{old_width} x {old_height} pixels scaled by {scale:.2f}"]
    left, top, size = sample["window"]
    if size != 1 or any(c.shift):
        done.append(f"the part from {left:.0%}, {top:.0%} on of {size:.0%} of its edges")
    done.append("mirrored" if sample["flip"] else "not mirrored")
    done.append(f"padded to {width} x {height}")
    return batch, f"as training sees it with seed {seed}: {', '.join(done)}"


# -----------------------------------------------------------------------------
# depth


def depth(
    source: Path,
    /,
    preset: Literal["demo", "kitti", "nyu", "lidar"] | None = None,
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
            image, at its size or that of KITTI's crop, metres times 256 (NYU: 1000).
        preset: Data set, crops and range of depth: of a folder's predictions, or the toolbox's checkpoint. A last.pt
            has its own; with this it is judged on another data set.
        data_root: Folders of images; by default the run's, or the preset's.
        depth_root: Folder of ground truth; by default the run's, or where --data-root is given, the same.
        splits: Split files, or names in ImageSets/; by default the --eval-splits of the run or the preset.
        frames: At most so many images, evenly spread; 0 for all; by default the run's --eval-frames.
        frame_stride: Without split files: keep every n-th frame of a drive, a sequence, or of nuScenes' keyframes; by
            default as the run did.
        skip_missing: Leave out pairs that lack a file, instead of stopping at them.
        save: Folder to write predictions to, as 16-bit PNGs at the images' size, and pictures of some beside their
            ground truth.
        drawn: With --save, so many pictures, evenly spread.
        device: auto is the GPU if there is one.
    """
    at_least(0, frames=frames, drawn=drawn)
    at_least(1, frame_stride=frame_stride)
    run = runtime.start_run(device)
    if os.path.isdir(source):
        if not preset:
            presets = ", ".join(finetune_depth.PRESETS)
            raise BadInput(f"{source}: a folder of predictions; --preset must say of what: {presets}")
        model, c, trained_on = None, finetune_depth.PRESETS[preset][1], ()
    else:
        model, c, trained_on = load_depth_run(source, preset, run.device)
    pairs, notes = data_depth.find_pairs(
        c.dataset,
        data_root or c.eval_root or c.data_root,
        depth_root or ("" if data_root else c.depth_root),
        splits or c.eval_splits,
        frame_stride or c.frame_stride,
        skip_missing or c.skip_missing,
        named=bool(splits),
        limit=c.eval_frames if frames is None else frames,
    )
    notes += seen_before(source, data.inventory(pairs), trained_on, "images")

    files = []
    if not model:  # all of them at once: a missing one is known before the first is judged
        files = [eval_depth.find_prediction(source, p.name, eval_depth.bts_names(p.name)) for p in pairs]
    scale = data_depth.SCALE[c.dataset]
    pictured = set(data.evenly_spread(range(len(pairs)), drawn))
    scored = []
    for i, (image, truth) in enumerate(eval_depth.load_all(pairs, c)):
        if model:
            name = pairs[i].name
            prediction = eval_depth.predict(model, image, c, run.device)
        else:
            name = str(files[i])
            prediction = eval_depth.match_prediction(eval_depth.read_depth(name, scale), truth.shape, name)
        scored.append(eval_depth.score(prediction, truth, c, name))
        if save:
            make_folder("save", save / "pictures")
            flat = pairs[i].name.replace("/", "_") + ".png"
            eval_depth.write_depth(prediction, save / flat, scale)
            if i in pictured:
                pictures.draw_depth(image, prediction, truth, save / "pictures" / flat, pairs[i].name, c.max_depth)

    folder = source.resolve().parent if model else source.resolve()
    row = eval_depth.summary(scored, [p.name for p in pairs])
    print("\n".join([*notes, *eval_depth.report(c, {folder.name: row})]))
    if save:
        print(f"wrote {len(pairs)} predictions and {len(pictured)} pictures into {save}/")


def load_depth_run(path, preset, device):
    """finetune_depth's last.pt, or a checkpoint of the toolbox with a preset that says what it is of; a preset with a
    last.pt says what other data it is to be judged on. -> model in eval mode, Config, the inventory of what it was
    trained on. Raises BadInput for any other file.
    """
    saved = read_checkpoint(path)
    theirs = saved.get("state_dict") if isinstance(saved, dict) else None
    if isinstance(theirs, dict) and any(str(name).startswith("decode_head.") for name in theirs):
        if not preset:
            raise BadInput(f"{path}: a checkpoint of the toolbox; --preset must say of what: kitti or nyu")
        c, tensors = finetune_depth.PRESETS[preset][1], theirs
    else:
        c, tensors = runtime.config_of(saved, finetune_depth.Config, path, "finetune_depth.py"), saved["model"]
        if preset:
            fields = ("image_encoder", "decoder_width", "image_scale", "max_depth")
            own = {field: getattr(c, field) for field in fields}
            c = dataclasses.replace(finetune_depth.PRESETS[preset][1], **own)
    model = finetune_depth.DepthNet(c)
    runtime.load_exactly(model, tensors, path)
    return model.to(device, memory_format=torch.channels_last).eval(), c, saved.get("inventory", ())


def det3d(
    source: Path,
    /,
    protocol: Literal["kitti", "waymo"] | None = None,
    truth: Path | None = None,
    data_root: tuple[str, ...] = (),
    splits: tuple[str, ...] = (),
    frames: int | None = None,
    skip_missing: bool = False,
    save: Path | None = None,
    drawn: int = 8,
    json: Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """KITTI's AP or Waymo's mAP and mAPH of a detector, or of anybody's result files, with the objects that count.

    Args:
        source: last.pt of finetune_det3d.py; a folder of KITTI result files, 000123.txt, 16 columns, the score last; or
            a file PREDICTIONS.bin as it is handed in to Waymo (waymo.open_dataset.Objects).
        protocol: Whose rules. A last.pt has its own; result files are KITTI's, and .bin files are Waymo's.
        truth: Labels for PREDICTIONS.bin, a file of the same kind; by default those of --data-root.
        data_root: Folders in KITTI's object layout, with labels; by default the run's.
        splits: Names in ImageSets/; by default the run's --eval-splits, or val. test has no labels: what a detector
            finds there is written to --save, and not judged.
        frames: At most so many frames, evenly spread; 0 for all; by default the run's --eval-frames.
        skip_missing: Leave out frames that lack an image or a cloud, instead of stopping at them.
        save: Folder to write what a detector finds to, as it is handed in: a file a frame to KITTI, predictions.bin to
            Waymo; and pictures of some frames.
        drawn: With --save, so many pictures, evenly spread.
        json: File to write the figures to. KITTI: {"Car": {"3d": {"AP40": [easy, moderate, hard], "AP11": ...}, ...},
            ...} in percent. Waymo: {"VEHICLE": {"LEVEL_1": {"mAP": .., "mAPH": .., "n": labels}, "LEVEL_2": ..., "[0,
            30)": {"LEVEL_1": ..}, ...}, ...} as shares.
        device: auto is the GPU if there is one.
    """
    at_least(0, frames=frames, drawn=drawn)
    run = runtime.start_run(device)
    is_objects, is_folder = truth is not None or source.suffix == ".bin", os.path.isdir(source)
    if (is_objects and protocol == "kitti") or (is_folder and protocol == "waymo"):
        raise BadInput(f"--protocol {protocol}: folders of result files are KITTI's, files of Objects are Waymo's")
    if is_objects and (frames or save):
        raise BadInput(f"{source}: a file of predictions; --frames and --save are for detectors")
    if is_folder and save:
        raise BadInput(f"{source}: a folder of result files; --save is for detectors")
    if is_objects:
        found, lines = judge_objects(source, truth, data_root, splits or ("val",), skip_missing)
    elif is_folder:
        found, lines = judge_results(source, data_root, splits or ("val",), frames, skip_missing)
    else:
        model, c, trained_on = load_trained(source, finetune_det3d, finetune_det3d.Detector, run.device)
        if protocol and protocol != c.protocol:
            raise BadInput(f"--protocol {protocol}: {source} was trained for {c.protocol}")
        roots, named = data_root or c.eval_root or c.data_root, splits or c.eval_splits or ("val",)
        if c.protocol == "kitti":
            data_sets.refuse_waymo(roots)
        limit = c.eval_frames if frames is None else frames
        chosen = frames_to_detect(roots, named, limit, skip_missing or c.skip_missing)
        labelled = "test" not in named
        eval_boxes.check_frames(chosen, c, chosen if labelled else ())
        if not (labelled or save):
            raise BadInput("--splits test: has no labels to judge by; --save writes what is found there")
        if save:
            eval_boxes.check_numbers(chosen)
        for note in seen_before(source, data.inventory(chosen), trained_on):
            print(note)
        found, lines = judge_detector(model, chosen, c, run, save, drawn, labelled)
    print("\n".join(lines))
    if json and found:
        with writing(json) as temporary:
            temporary.write_text(dump_json(found, indent=1) + "\n")


def frames_to_detect(roots, splits, limit, skip_missing):
    """At most `limit` frames of the splits, 0 for all, evenly spread; with their labels, but for those of test."""
    data_det3d.check_layout(roots)
    find = data_kitti.pool_frames if "test" in splits else data_det3d.pool_frames
    chosen, _ = find(roots, splits, skip_missing=skip_missing, limit=limit)
    return chosen


def judge_objects(source, truth, roots, splits, skip_missing):
    """A file of Waymo's Objects beside another, or beside the labels of a folder -> figures, lines of text."""
    if not (truth or roots):
        raise BadInput(f"{source}: a file of predictions; --truth or --data-root must say of what")
    predictions = eval_waymo.read_objects(source)
    if truth:
        truths = eval_waymo.read_objects(truth)
    else:
        truths = eval_waymo.read_truth(data_det3d.find_frames(roots, splits, skip_missing))
    note = eval_waymo.check_frames(predictions, truths, source)
    found = eval_waymo.evaluate(predictions, truths)
    notes = [note] if note else []
    return found, notes + eval_waymo.table(found, eval_waymo.is_standard(truths.frames))


def judge_results(folder, roots, splits, limit, skip_missing):
    """A folder of KITTI's result files -> figures, lines of text. Frames that have none are not judged."""
    if not roots:
        raise BadInput(f"{folder}: a folder of result files; --data-root must say of what")
    chosen = frames_to_detect(roots, splits, limit, skip_missing)
    eval_boxes.check_numbers(chosen)
    files = {path.stem: path for path in folder.glob("*.txt") if not path.name.startswith(".")}
    judged = [frame for frame in chosen if frame.cloud.stem in files]
    if not judged:
        raise BadInput(f"{folder}: no result file of the {len(chosen)} frames, such as {chosen[0].cloud.stem}.txt")
    results = [eval_boxes.read_results(files[frame.cloud.stem]) for frame in judged]
    rules = eval_boxes.RULES["kitti"]
    found = rules.evaluate(judged, results)
    lines = rules.table(found, judged)
    if len(judged) < len(chosen):
        lines.append(f"{len(chosen) - len(judged)} of the {len(chosen)} frames have no result file, and are not judged")
    return found, lines


def judge_detector(model, frames, c, run, save, drawn, labelled):
    """-> figures, {} without labels; lines of text. With `save`, a folder, what is found is written there, and pictures
    of some frames."""
    rules, layout = eval_boxes.RULES[c.protocol], model.layout
    pictured = set(data.evenly_spread(range(len(frames)), drawn)) if save else set()
    if save:
        make_folder("save", save / "pictures")
    found = []
    detections = eval_boxes.detections(model, frames, range(len(frames)), c, run.device)
    for i, boxes in enumerate(tqdm(detections, "judging", len(frames), dynamic_ncols=True, mininterval=1)):
        found.append(rules.convert(frames[i], *boxes))
        if i in pictured:
            scene = data_det3d.read_scene(frames[i], c.keep_rows, layout.protocol, layout.columns)
            path = save / "pictures" / f"{frames[i].cloud.stem}.png"
            pictures_boxes.draw_boxes(scene, *boxes, path, frames[i].name)
    figures = rules.evaluate(frames, found) if labelled else {}
    lines = rules.table(figures, frames) if labelled else []
    if save:
        said = rules.write(save, frames, found)
        lines.append(f"wrote {said} and {len(pictured)} pictures into {save}/")
    return figures, lines


# -----------------------------------------------------------------------------
# mono3d


def mono3d(
    source: Path,
    /,
    data_root: tuple[str, ...] = (),
    version: str | None = None,
    splits: tuple[str, ...] = (),
    frames: int | None = None,
    skip_missing: bool = False,
    save: Path | None = None,
    drawn: int = 8,
    json: Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """nuScenes' detection figures of a monocular detector, or of anybody's results file: mAP by distance between
    centres, five errors, NDS. On KITTI's labels mAP and three errors, of three classes.

    Args:
        source: last.pt of finetune_mono3d.py; or a results file, .json, in the format of nuScenes' devkit.
        data_root: Folder of nuScenes, or folders in KITTI's object layout, with labels; by default the run's.
        version: Of nuScenes: the folder of tables, such as v1.0-mini; by default the run's, or the one that the splits
            are of.
        splits: Of nuScenes: val, mini_val, ...; of KITTI: names in ImageSets/; by default the run's --eval-splits, or
            val.
        frames: At most so many samples, evenly spread; 0 for all; by default the run's --eval-frames.
        skip_missing: Leave out frames that lack an image, instead of stopping at them.
        save: Folder to write a detector's results.json to, and pictures of some frames.
        drawn: With --save, so many pictures, evenly spread.
        json: File to write the figures to, under the devkit's own keys.
        device: auto is the GPU if there is one.
    """
    at_least(0, frames=frames, drawn=drawn)
    run = runtime.start_run(device)
    if source.suffix == ".json":
        c = finetune_mono3d.Config(version=version or "auto")
        if len(data_root) != 1:
            raise BadInput(f"{source}: a results file; --data-root must say of what, one folder of nuScenes")
        if frames or save:
            raise BadInput(f"{source}: a results file; --frames and --save are for detectors")
        truth = eval_nuscenes.read_truth(data_root[0], splits or ("val",), c.version)
        results = eval_nuscenes.read_results(source, truth)
    else:
        model, c, trained_on = load_trained(source, finetune_mono3d, finetune_mono3d.FCOS3D, run.device)
        own = {"data_root": data_root, "eval_root": ()} if data_root else {}
        own |= {"eval_splits": splits or c.eval_splits or ("val",), "version": version or c.version}
        own |= {"skip_missing": skip_missing or c.skip_missing}
        c = dataclasses.replace(c, **own)
        if c.dataset == "nuscenes" and len(c.eval_root or c.data_root) > 1:
            raise BadInput("--data-root: one folder of nuScenes")
        chosen, notes = data_mono3d.pool_frames(c, c.eval_root or c.data_root, c.eval_splits)
        chosen = data_mono3d.few_samples(chosen, c.eval_frames if frames is None else frames)
        notes += seen_before(source, data_mono3d.inventory(chosen), trained_on, "images")
        if notes:
            print("\n".join(notes))
        truth = eval_mono3d.read_truth(c, chosen)
        results = find_boxes(model, chosen, truth, c, run, save, drawn)
    figures = eval_mono3d.evaluate(c, results, truth)
    print("\n".join(eval_mono3d.report(c, figures, truth)))
    if json:
        eval_nuscenes.write_figures(json, figures)


def find_boxes(model, frames, truth, c, run, save, drawn):
    """-> results of all samples. With `save`, a folder, they are written there, and pictures of some frames."""
    pictured = set(data.evenly_spread(range(len(frames)), drawn)) if save else set()
    if save:
        make_folder("save", save / "pictures")

    def seen(i, found):
        if i in pictured:
            name = frames[i].name.replace("/", "_")
            eval_mono3d.draw_frame(frames[i], found, c, save / "pictures" / f"{name}.png")

    samples = list(data_mono3d.samples_of(frames).items())
    found = eval_mono3d.detect(model, frames, samples, c, run.device, seen)
    found = list(tqdm(found, "judging", len(samples), dynamic_ncols=True, mininterval=1))
    results = eval_nuscenes.collect(found, truth)
    if save:
        eval_nuscenes.write_results(save / "results.json", results, truth)
        print(f"wrote results.json and {len(pictured)} pictures into {save}/")
    return results


COMMANDS = {"match": match, "probe": probe, "show": show, "depth": depth, "det3d": det3d, "mono3d": mono3d}
COMMANDS |= {"export": weights.export}


def main():
    runtime.commands(COMMANDS, __doc__)


if __name__ == "__main__":
    main()
