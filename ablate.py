"""What matters: one flag changed at a time, several seeds each, judged on frames of drives never trained on.

    python ablate.py --seeds 0 1 2 --jobs 2                                        # on the demo's built-in scenes
    python ablate.py --name mine --only "SimIPU" "wrong pairs" --data-root data/kitti --splits train --max-steps 500
    python ablate.py --task depth --inits none out/demo/backbone.pt --labels 1 0.25  # what is the initialisation worth, downstream?

Flags that are not this script's own go to the task's script: simipu.py for matching, finetune_depth.py for depth. Every
run is `SCRIPT demo FLAGS VARIANT --seed S` (another preset by --preset), in out/NAME/VARIANT/SEED, and is left alone if
it has been finished before with the same flags; so a table that was interrupted goes on where it stopped. The table, in
Markdown: mean over seeds, and their range, of the last step's figures (eval.py says what they are); no run and no step
is picked. `random` is the untrained network.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Literal

import tyro
from tqdm import tqdm

import eval_match
import finetune_depth
import runtime
import simipu
from files import BadInput, read_log

VARIANTS = {
    "SimIPU": "",
    "wrong pairs": "--pairs wrong",
    "without intra": "--intra-weight 0",
    "without inter": "--inter-weight 0",
    "greedy matching": "--matching greedy",
    "relative positions": "--use-xyz",
    "release's losses": "--detach-keys --inter-query image",
    "SGD": "--image-optimizer sgd --image-lr 0.03",
    "crops": "--crop 0.5 1",
    "wider scales": "--crop 0.5 1.5",
    "vertical shifts": "--shift 0 0.25",
    "colour jitter": "--jitter 0.4 0.4 0.4 0.1",
    "crops, shifts, jitter": "--crop 0.5 1 --shift 0 0.25 --jitter 0.4 0.4 0.4 0.1",
    "groups of 8": "--batch-size 8 --group 8",
}


@dataclasses.dataclass
class Task:
    """What is run, and which figures of its judgement (the key in log.jsonl) make the table: {title: (name of a figure,
    factor, decimals)}.
    """

    script: ModuleType
    key: str
    columns: dict

    def parse(self, preset, arguments):
        return tyro.extras.overridable_config_cli(self.script.PRESETS, args=[preset, *arguments])


TASKS = {
    "match": Task(
        simipu,
        "match",
        {
            "rank, right image, %": ("right_rank", 1, 1), "rank, another's, %": ("wrong_rank", 1, 1), "gap, points": ("gap", 1, 1),
            "top1, %": ("right_top1", 100, 1), "excess": ("right_excess", 1, 1), "rank, other view, %": ("intra_rank", 1, 1),
            "other view's top1, %": ("intra_top1", 100, 1),
        },
    ),
    "depth": Task(
        finetune_depth,
        "depth",
        {
            "abs_rel, %": ("eigen.abs_rel", 100, 1), "a1, %": ("eigen.a1", 100, 1), "rmse, m": ("eigen.rmse", 1, 2), "silog": ("eigen.silog", 1, 1),
            "log10, %": ("eigen.log10", 100, 1),
        },
    ),
}  # fmt: skip


def judged(folder, c, task):
    """The last step's judgement of a run, None if it is not there yet. Raises BadInput if it was another run."""
    log = read_log(folder / "log.jsonl")
    found = next((line[task.key] for line in reversed(log) if line["step"] == c.max_steps and task.key in line), None)
    free = task.script.FREE - {"data_root", "eval_splits", "eval_root", "eval_frames", "init"}
    wanted, had = (
        runtime.as_json(c, without=free),
        next((line["config"] for line in reversed(log) if "config" in line), {}),
    )
    differ = runtime.differences(had, wanted)
    if found and differ:
        raise BadInput(f"{folder}: made with {differ}; give another --name, or delete it")
    return found


def cell(values, scale=1.0, decimals=1):
    """mean (smallest to largest) over seeds."""
    values = [scale * v for v in values if v is not None]
    return (
        "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(sum(values) / len(values), min(values), max(values), d=decimals)
        if values
        else "–"
    )


def figure(found, name):
    """Of a judgement, a dict of figures or of dicts of them; None where there is none."""
    for part in name.split("."):
        found = (found or {}).get(part)
    return found


def row(name, found, task):
    return (
        f"| {name} | "
        + " | ".join(
            cell([figure(f, key) for f in found], scale, decimals) for key, scale, decimals in task.columns.values()
        )
        + " |"
    )


@dataclasses.dataclass
class Options:
    """One flag changed at a time, several seeds each: a table of figures on frames never trained on. Further flags go
    to the task's script.
    """

    task: Literal["match", "depth"] = "match"
    """match: pre-training, judged by matching. depth: fine-tuning, judged by depth metrics."""
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
    """Of depth: weights that the image encoder starts from. {seed} stands for the seed. A finished run is known by this
    path, not by what lies there.
    """
    labels: tuple[float, ...] = (1.0, 0.25)
    """Of depth: shares of the training pairs."""


def variants_of(options):
    """{name: flags}. Raises BadInput for unknown names."""
    if options.task == "depth" and options.only:
        raise BadInput("--only: of --task match; --inits and --labels say what is run for depth")
    if options.task == "depth":
        return {
            f"{init}, {share:g} of labels": f"--init {shlex.quote(init)} --labels {share:g}"
            for share in options.labels
            for init in options.inits
        }
    unknown = set(options.only) - VARIANTS.keys()
    if unknown:
        raise BadInput(f"--only {', '.join(sorted(unknown))}: the variants are {', '.join(VARIANTS)}")
    return {v: VARIANTS[v] for v in options.only or VARIANTS}


def without(flags, others):
    """A command's flags, less those that others give, too."""
    kept, keep = [], True
    for word in flags:
        if word.startswith("--"):
            keep = word.partition("=")[0].replace("_", "-") not in others
        kept += [word] if keep else []
    return kept


def main():
    def parse_both():
        options, flags = tyro.cli(Options, return_unknown_args=True)
        return options, flags, TASKS[options.task].parse(options.preset, flags)

    runtime.command_line(parse_both, lambda parsed: ablate(*parsed))


def ablate(options, flags, base):
    """Run what has not been run, and print the table. flags: of the task's script and preset, which make the config
    `base`. Raises BadInput.
    """
    task, variants, seeds = TASKS[options.task], variants_of(options), options.seeds
    where = runtime.start_run(base.device)
    if not base.max_steps:
        raise BadInput("--max-steps 0: an ablation needs the same number of steps for all")
    if base.data_root != task.script.PRESETS[options.preset][1].data_root:
        base.synthetic_frames, flags = (
            0,
            [*flags, "--synthetic-frames", "0"],
        )  # real data that are not there are an error
    frames, held_out, note = task.script.load_frames(
        base, where
    )  # the scenes are written once, before jobs look for them

    def run(job):
        variant, seed = job
        folder = Path(base.out, options.name, re.sub(r"[^\w.]+", "_", variant), str(seed))
        own = shlex.split(variants[variant].replace("{seed}", str(seed)))
        arguments = [*without(flags, own), *own, "--seed", str(seed), "--name", str(folder.relative_to(base.out))]
        steps = (
            base.max_steps * base.batch_size // task.parse(options.preset, arguments).batch_size
        )  # other batches see as many frames
        arguments += ["--max-steps", str(steps)]
        c = task.parse(options.preset, arguments)
        found = judged(folder, c, task)
        if found is None:
            threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
            command = [sys.executable, str(Path(task.script.__file__)), options.preset, *arguments]
            done = subprocess.run(
                command, capture_output=True, text=True, env={"OMP_NUM_THREADS": threads, **os.environ}
            )
            found = judged(folder, c, task)
            if done.returncode or found is None:
                lines = done.stderr.strip().splitlines()
                raise BadInput(
                    f"{shlex.join([options.preset, *arguments])}: {lines[-1] if lines else 'ended without being judged; --eval-splits?'}"
                )
        return job, found

    work = [
        (variant, seed) for seed in seeds for variant in variants
    ]  # a seed at a time: an interrupted table has whole columns
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(tqdm(pool.map(run, work), total=len(work), dynamic_ncols=True))

    print(
        f"{len(frames)} frames, {base.max_steps} steps of {base.batch_size}, judged on {len(held_out)} others; mean (range) over seeds {' '.join(map(str, seeds))}"
    )
    print(note or "", end="\n" if note else "")
    print(f"| | {' | '.join(task.columns)} |\n|{'---|' * (len(task.columns) + 1)}")
    if options.task == "match":
        configs = [dataclasses.replace(base, seed=seed) for seed in seeds]
        random = [eval_match.match(simipu.untrained(c, where.device), held_out, c, where.device) for c in configs]
        print(row("random", random, task))
    for variant in variants:
        name = f"{variant} `{variants[variant]}`" if variants[variant] and options.task == "match" else variant
        print(row(name, [found[variant, seed] for seed in seeds], task))


if __name__ == "__main__":
    main()
