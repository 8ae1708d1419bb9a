"""What matters: one flag changed at a time, several seeds each, judged on frames of drives never trained on.

    python ablate.py --seeds 0 1 2 --jobs 2                                     # on the demo's built-in scenes
    python ablate.py --name mine --only "SimIPU" "wrong pairs" --data-root data/kitti --splits train --max-steps 500
    python ablate.py --task depth --inits none out/demo/backbone.pt --labels 1 0.25     # of what use is the start?
    python ablate.py --task det3d --inits no-image none out/demo/backbone.pt --labels 1 # the same for detection
    python ablate.py --task mono3d --inits none out/demo/backbone.pt --labels 1         # and from images alone

How much do more frames help? Pre-training on 30, 100 and 300 of them, the same number of steps, then depth from each:

    python ablate.py --name more --only SimIPU --frames 30 100 300 --curve gain.png --data-root data/scenes400
    python ablate.py --task depth --name more_depth --frames 30 100 300 --curve depth.png --data-root data/scenes400 \
        --labels 1 --inits none "out/more/SimIPU_{frames}_frames/{seed}/backbone.pt"

Flags that are not this script's own go to the task's script: simipu.py for matching, finetune_depth.py for depth,
finetune_det3d.py for det3d, finetune_mono3d.py for mono3d. Every run is `SCRIPT demo FLAGS VARIANT --seed S` (another
preset by --preset), in out/NAME/VARIANT/SEED. It is left alone if it has been finished before with the same flags, so a
table that was interrupted goes on where it stopped.

The table, in Markdown, has the mean over seeds, and in brackets their range, of the last step's figures (eval.py says
what they are). No run and no step is picked. `random` is the untrained network. With --control "wrong pairs" it also
says how much better than that variant each one reads the right image, with its 95 % interval over frames.
--gather-negatives needs several processes; groups of 8 ask the same question.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import tyro
from tqdm import tqdm

import data
import eval_match
import finetune_depth
import finetune_det3d
import finetune_mono3d
import pictures
import runtime
import simipu
from files import BadInput, read_log

VARIANTS = {
    "SimIPU": "",
    "wrong pairs": "--pairs wrong",
    "without intra": "--intra-weight 0",
    "without inter": "--inter-weight 0",
    "greedy, nearest first": "--matching greedy",
    "greedy, row by row": "--matching rowwise",
    "no twins": "--drop-twins",
    "relative positions": "--use-xyz",
    "release's losses": "--detach-keys --inter-query image",
    "SGD": "--image-optimizer sgd --image-lr 0.03",
    "crops, shifts, jitter": "--crop 0.5 1 --shift 0 0.25 --jitter 0.4 0.4 0.4 0.1",
    "groups of 8": "--batch-size 8 --group 8",
    "height": "--point-features reflectance height",
    "shape": "--point-features reflectance shape",
    "height, shape": "--point-features reflectance height shape",
    "without reflectance": "--point-features height shape",
    "height, wrong pairs": "--point-features reflectance height --pairs wrong",
    "shape, wrong pairs": "--point-features reflectance shape --pairs wrong",
    "height, shape, wrong pairs": "--point-features reflectance height shape --pairs wrong",
    "strides 16 and 32": "--inter-stages 3 4",
    "strides 16 and 32, height, shape": "--inter-stages 3 4 --point-features reflectance height shape",
}


@dataclass
class Task:
    """What is run, and which figures of its judgement make the table."""

    script: ModuleType
    key: str  # of the judgement, in a line of log.jsonl
    columns: dict  # {title: (name of a figure, factor, decimals)}

    def parse(self, preset, arguments):
        """-> the script's Config."""
        return tyro.extras.overridable_config_cli(self.script.PRESETS, args=[preset, *arguments])


TASKS = {
    "match": Task(
        simipu,
        "match",
        {
            "gain, nats": ("gain", 1, 2),
            "right image": ("right_excess", 1, 2),  # and position: cross-entropy less chance, nats
            "position": ("position_excess", 1, 2),
            "rank, right image, %": ("right_rank", 1, 1),
            "rank, another's, %": ("wrong_rank", 1, 1),
            "gap, points": ("gap", 1, 1),
            "top1, %": ("right_top1", 100, 1),
            "rank, other view, %": ("intra_rank", 1, 1),
            "other view's top1, %": ("intra_top1", 100, 1),
        },
    ),
    "depth": Task(
        finetune_depth,
        "depth",
        {
            "abs_rel, %": ("eigen.abs_rel", 100, 1),
            "a1, %": ("eigen.a1", 100, 1),
            "rmse, m": ("eigen.rmse", 1, 2),
            "silog": ("eigen.silog", 1, 1),
            "log10, %": ("eigen.log10", 100, 1),
        },
    ),
    "det3d": Task(
        finetune_det3d,
        "det3d",
        {  # all moderate; loose: an overlap of .5 for cars, .25 for people
            "Car 3D": ("Car.3d.AP40.1", 1, 1),
            "Car 3D, loose": ("Car.3d loose.AP40.1", 1, 1),
            "Pedestrian 3D, loose": ("Pedestrian.3d loose.AP40.1", 1, 1),
            "Cyclist 3D, loose": ("Cyclist.3d loose.AP40.1", 1, 1),
            "objects: cars": ("Car.n.1", 1, 0),
            "pedestrians": ("Pedestrian.n.1", 1, 0),
            "cyclists": ("Cyclist.n.1", 1, 0),
        },
    ),
    "mono3d": Task(
        finetune_mono3d,
        "mono3d",
        {
            "mAP, %": ("mean_ap", 100, 1),
            "AP car, %": ("mean_dist_aps.car", 100, 1),
            "pedestrian, %": ("mean_dist_aps.pedestrian", 100, 1),
            "bicycle, %": ("mean_dist_aps.bicycle", 100, 1),
            "ATE, m": ("tp_errors.trans_err", 1, 2),
            "ASE": ("tp_errors.scale_err", 1, 2),
            "AOE": ("tp_errors.orient_err", 1, 2),
            "NDS, %": ("nd_score", 100, 1),
        },
    ),
}


@dataclass
class Options:
    """One flag changed at a time, several seeds each: a table of figures on frames never trained on. Further flags go
    to the task's script.
    """

    task: Literal["match", "depth", "det3d", "mono3d"] = "match"
    """match: pre-training, judged by matching. The others: fine-tuning, judged by the metrics of the task."""
    preset: str = "demo"
    """Of the task's script."""
    name: str = "ablation"
    """The runs live in out/NAME."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of every variant."""
    jobs: int = 1
    """Runs at a time; the cores are shared out among them."""
    only: tuple[str, ...] = ()
    """Of match: names of variants; () for all of them."""
    inits: tuple[str, ...] = ("none", "out/demo/backbone.pt")
    """Of the others: weights that the image encoder starts from. {seed} stands for the seed. A finished run is
    known by this path, not by what lies there. no-image, of det3d: points alone.
    """
    control: str = ""
    """Of match: the variant that the others are compared with, frame by frame. Give it in --only, too."""
    labels: tuple[float, ...] = (1.0, 0.25)
    """Of the others: shares of the training frames."""
    frames: tuple[int, ...] = ()
    """Of match: pre-train every variant on so many frames, each number in turn; () for all that there are. Of the
    others: what {frames} in --inits stands for.
    """
    curve: Path | None = None
    """PNG to draw the first column of the table into, against --frames."""


# -----------------------------------------------------------------------------
# what is to be run


def check_options(options):
    """Raises BadInput, naming the flag, for what cannot work."""
    runtime.check_range(options, "seeds", 0, 2**63 - 1, "from 0 to 2^63 - 1")
    runtime.check_range(options, "jobs", 1, 1000, "from 1 to 1000")
    runtime.check_range(options, "labels", 1e-30, 1, "above 0, and 1 at most")
    runtime.check_range(options, "frames", 2, 1e9, "2 or more")
    for flag in ("name", "seeds", "inits", "labels"):
        if not getattr(options, flag):
            raise BadInput(f"--{flag}: nothing given")
    if options.control and (options.task != "match" or options.control not in variants_of(options)):
        raise BadInput(f"--control {options.control}: not a variant of --only; of --task match alone")
    if options.curve and not options.frames:
        raise BadInput("--curve: give --frames, which it is drawn against")
    counted = any("{frames}" in init for init in options.inits)
    if options.task != "match" and counted != bool(options.frames):
        raise BadInput("--frames: wants {frames} in --inits, and is wanted by it")


def variants_of(options):
    """{name: flags}. Raises BadInput for unknown names."""
    return {name: flags for lines in series_of(options).values() for name, flags in lines.values()}


def series_of(options):
    """What a curve has a line for: {name: {number of --frames, or None: (name of the variant, flags)}}. Raises BadInput
    for unknown names.
    """
    if options.task != "match":
        if options.only:
            raise BadInput("--only: of --task match; --inits and --labels say what is run for the others")
        series = {}
        for share in options.labels:
            for init in options.inits:
                line = series[f"{init}, {share:g} of labels"] = {}
                for count in options.frames if "{frames}" in init else (None,):
                    own = init.replace("{frames}", str(count))
                    start = "--no-image" if own == "no-image" else f"--init {shlex.quote(own)}"
                    line[count] = f"{own}, {share:g} of labels", f"{start} --labels {share:g}"
        return series
    unknown = set(options.only) - VARIANTS.keys()
    if unknown:
        raise BadInput(f"--only {', '.join(sorted(unknown))}: the variants are {', '.join(VARIANTS)}")
    series = {}
    for name in options.only or VARIANTS:
        line = series[name] = {} if options.frames else {None: (name, VARIANTS[name])}
        for count in options.frames:
            line[count] = f"{name}, {count} frames", f"{VARIANTS[name]} --train-frames {count}".strip()
    return series


def flag_of(word):
    """The flag that a word of a command line gives: --use-xyz for --no-use-xyz, --use_xyz or --use-xyz=True, too."""
    return word.split("=")[0].replace("_", "-").replace("--no-", "--", 1)


def overridden(flags, own):
    """The words `flags`, then `own`, without what `own` gives again: no flag stands there twice."""
    again = {flag_of(word) for word in own if word.startswith("--")}
    kept, keeping = [], True
    for word in flags:
        if word.startswith("--"):
            keeping = flag_of(word) not in again
        if keeping:  # a flag, or one of its values
            kept.append(word)
    return [*kept, *own]


@dataclass
class Job:
    """One run: a variant with a seed."""

    variant: str
    seed: int
    arguments: list  # of the task's script, after the preset
    c: object  # the Config that they make
    folder: Path


def job_of(options, flags, base, variant, own, seed):
    """The job of a variant, whose own flags are `own`. It sees as many frames as `base`, the Config of the user's
    `flags`, whatever its batches. Raises BadInput.
    """
    task = TASKS[options.task]
    name = Path(options.name, re.sub(r"[^\w.]+", "_", variant), str(seed))
    own = shlex.split(own.replace("{seed}", str(seed)))
    arguments = overridden(flags, [*own, "--seed", str(seed), "--name", str(name)])
    steps = base.max_steps * base.batch_size // task.parse(options.preset, arguments).batch_size
    if not steps:
        raise BadInput(f"--max-steps {base.max_steps}: too few for {variant}, whose batches are larger")
    arguments = overridden(arguments, ["--max-steps", str(steps)])
    return Job(variant, seed, arguments, task.parse(options.preset, arguments), Path(base.out) / name)


def jobs_of(options, flags, base, variants):
    """All jobs, a seed at a time: an interrupted table has whole columns. Raises BadInput."""
    jobs = [job_of(options, flags, base, name, own, seed) for seed in options.seeds for name, own in variants.items()]
    for folder, count in Counter(job.folder for job in jobs).items():
        if count > 1:
            raise BadInput(f"{folder}: {count} runs would be made there; give every seed and variant once")
    return jobs


# -----------------------------------------------------------------------------
# running


def judged(folder, c, task):
    """The last step's judgement of a run, None if it is not there yet. Raises BadInput if it was another run."""
    log = read_log(folder / "log.jsonl")
    found = [line[task.key] for line in log if line["step"] == c.max_steps and task.key in line]
    if not found:
        return None
    configs = [line["config"] for line in log if "config" in line]
    had = configs[-1] if configs else {}
    # what a script lets a resumed run change, but for what decides the figures
    free = task.script.FREE - {"data_root", "eval_splits", "eval_root", "eval_frames", "init"}
    differ = runtime.differences(had, runtime.as_json(c, without=free))
    if differ:
        raise BadInput(f"{folder}: made with {differ}; give another --name, or delete it")
    return found[-1]


def run(job, options):
    """A job's judgement. It is run unless it was before. Raises BadInput with the last words of one that fails."""
    task = TASKS[options.task]
    found = judged(job.folder, job.c, task)
    if found is not None:
        return found
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment = {"OMP_NUM_THREADS": str(threads)} | dict(os.environ)
    words = [options.preset, *job.arguments]
    command = [sys.executable, str(Path(task.script.__file__)), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BadInput(f"{shlex.join(words)}: {said[-1]}")
    found = judged(job.folder, job.c, task)
    if found is None:
        raise BadInput(f"{shlex.join(words)}: ended without being judged")
    return found


def ablate(options, flags, base):
    """Run what has not been run, and print the table. flags: of the task's script and preset, which make the config
    `base`. Raises BadInput.
    """
    check_options(options)
    task, variants = TASKS[options.task], variants_of(options)
    if "--seed" in map(flag_of, flags):
        raise BadInput("--seed: give --seeds")
    if not base.max_steps:
        raise BadInput("--max-steps 0: an ablation needs the same number of steps for all")
    if getattr(base, "protocol", "kitti") == "waymo":
        raise BadInput("--protocol waymo: the table is of KITTI's figures")
    where = runtime.start_run(base.device)
    if base.data_root != task.script.PRESETS[options.preset][1].data_root:  # no scenes in place of data that are amiss
        flags = overridden(flags, ["--synthetic-frames", "0"])
        base = task.parse(options.preset, flags)
    task.script.check_config(base, where.world)
    jobs = jobs_of(options, flags, base, variants)
    for job in jobs:
        task.script.check_config(job.c, where.world)
    # the scenes are written once, before jobs look for them
    frames, held_out, note = task.script.load_frames(base, where)
    if not held_out:
        raise BadInput("--eval-splits: an ablation needs frames to judge on")
    if options.task == "match" and options.frames and max(options.frames) > len(frames):
        raise BadInput(f"--frames {max(options.frames)}: there are {len(frames)}")

    found = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda job: run(job, options), jobs)
        for result, job in zip(tqdm(results, total=len(jobs), dynamic_ncols=True), jobs):
            found[job.variant, job.seed] = result

    seeds = " ".join(map(str, options.seeds))
    counts = options.frames or [len(frames)]
    if options.task != "match":
        counts = [len(data.share_of(frames, share)) for share in options.labels]
    trained = f"{', '.join(map(str, counts))} frames, {base.max_steps} steps of {base.batch_size}"
    print(f"{trained}, judged on {len(held_out)} others; mean [range] over seeds {seeds}")
    if note:
        print(note)
    rows = {}
    if options.task == "match":
        configs = [dataclasses.replace(base, seed=seed) for seed in options.seeds]
        rows["random"] = [
            eval_match.match(simipu.untrained(c, where.device), held_out, c, where.device) for c in configs
        ]
    for variant, own in variants.items():
        name = f"{variant} `{own}`" if own and options.task == "match" else variant
        rows[name] = [found[variant, seed] for seed in options.seeds]
    control = [found[options.control, seed] for seed in options.seeds] if options.control else None
    print("\n".join(table(rows, task, control, options.control)))
    if options.curve:
        draw_curve(options, found, task)


def draw_curve(options, found, task):
    """The first column of the table against --frames: found, the judgements {(variant, seed): figures}, -> a PNG."""
    column, (key, factor, _) = next(iter(task.columns.items()))
    lines = {}
    for name, line in series_of(options).items():
        lines[name] = {}
        for count in sorted(options.frames):
            variant, _ = line.get(count) or line[None]  # a start that needs no frames lies flat
            values = [figure(found[variant, seed], key) for seed in options.seeds]
            if None not in values:  # it is, where a branch is missing
                lines[name][count] = [factor * value for value in values]
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        print(f"{options.curve} is not written: there is no {column} in any judgement")
        return
    pictures.draw_against_frames(lines, column, options.curve)
    print(f"wrote {options.curve}")


# -----------------------------------------------------------------------------
# the table


def table(rows, task, control=None, name=""):
    """Its lines, of {name of a row: the judgements of all seeds}. control: those of the variant `name`, which a last
    column compares with.
    """
    titles = ["", *task.columns]
    if control:
        titles.append(f"beyond {name}")
    head = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    return head + [row(name, found, task, control) for name, found in rows.items()]


def row(name, found, task, control=None):
    """A line of the table, of the judgements of all seeds."""
    cells = [name]
    for key, factor, decimals in task.columns.values():
        cells.append(cell([figure(judgement, key) for judgement in found], factor, decimals))
    if control:
        compared = found != control and "gain" in found[0] and "gain" in control[0]  # both have a branch for images
        cells.append(bracketed(*eval_match.advantage(found, control), 2) if compared else "–")
    return f"| {' | '.join(cells)} |"


def cell(values, factor=1.0, decimals=1):
    """mean [smallest, largest] over seeds."""
    values = [factor * value for value in values if value is not None]
    if not values:
        return "–"
    return bracketed(sum(values) / len(values), min(values), max(values), decimals)


def bracketed(value, low, high, decimals):
    """What a cell says: value [low, high], and never -0.0."""
    value, low, high = (f"{x:z.{decimals}f}" for x in (value, low, high))
    return f"{value} [{low}, {high}]"


def figure(found, name):
    """Of a judgement, a dict of figures, of lists and of dicts of them; None where there is none."""
    for part in name.split("."):
        if isinstance(found, list):
            found = found[int(part)]
        else:
            found = (found or {}).get(part)
    return found


def parse():
    """-> Options, the words for the task's script, the Config that they make."""
    options, flags = tyro.cli(Options, return_unknown_args=True)
    return options, flags, TASKS[options.task].parse(options.preset, flags)


def main():
    runtime.command_line(parse, lambda parsed: ablate(*parsed))


if __name__ == "__main__":
    main()
