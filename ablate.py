"""What matters: one flag changed at a time, several seeds each, judged on frames of drives never trained on.

    python ablate.py --seeds 0 1 2 --jobs 2                                        # on the demo's built-in scenes
    python ablate.py --name mine --only "SimIPU" "wrong pairs" --data-root data/kitti --splits train --max-steps 500

Flags that are not this script's own go to simipu.py. Every run is `simipu.py demo FLAGS VARIANT --seed S`, in out/NAME/VARIANT/SEED,
and is left alone if it has been finished before with the same flags; so a table that was interrupted goes on where it stopped. The
table, in Markdown: mean over seeds, and their range, of the last step's matching (eval.py says what the figures are); no run and no
step is picked. `random` is the untrained network. --gather-negatives needs several processes; groups of 8 ask the same question.
"""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tyro
from tqdm import tqdm

import eval as evaluate
import runtime
import simipu
from data import BadInput

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


def parse(arguments):
    return tyro.extras.overridable_config_cli(simipu.PRESETS, args=arguments)


def judged(folder, c):
    """The last step's matching of a run, None if it is not there yet. Raises BadInput if it was another run."""
    log = runtime.read_log(folder / "log.jsonl")
    found = next((line["match"] for line in log if line["step"] == c.max_steps and "match" in line), None)
    free = simipu.FREE - {"data_root", "eval_splits", "eval_root", "eval_frames"}
    wanted, had = runtime.as_json(c, without=free), next((line["config"] for line in reversed(log) if "config" in line), {})
    differ = runtime.differences(had, wanted)
    if found and differ:
        raise BadInput(f"{folder}: made with {differ}; give another --name, or delete it")
    return found


def cell(values, scale=1.0):
    """mean (smallest to largest) over seeds."""
    values = [scale * v for v in values if v is not None]
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})" if values else "–"


def row(name, found):
    keys = (("right_rank", 1), ("wrong_rank", 1), ("gap", 1), ("right_top1", 100), ("right_excess", 1), ("intra_rank", 1), ("intra_top1", 100))
    return f"| {name} | " + " | ".join(cell([f.get(k) for f in found], scale) for k, scale in keys) + " |"


@dataclasses.dataclass
class Options:
    """One flag changed at a time, several seeds each: a table of matching on frames never trained on. Further flags go to simipu.py."""

    name: str = "ablation"
    """The runs live in out/NAME."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of every variant."""
    jobs: int = 1
    """Runs at a time; the cores are shared out among them."""
    only: tuple[str, ...] = ()
    """Names of variants; () for all of them."""


def main():
    def parse_both():
        options, flags = tyro.cli(Options, return_unknown_args=True)
        return options, flags, parse(["demo", *flags])

    runtime.command_line(parse_both, lambda parsed: ablate(*parsed))


def ablate(options, flags, base):
    """Run what has not been run, and print the table. flags: of `simipu.py demo`, which make the config `base`. Raises BadInput."""
    name, seeds, jobs, only = options.name, options.seeds, options.jobs, options.only
    unknown = set(only) - VARIANTS.keys()
    if unknown:
        raise BadInput(f"--only {', '.join(sorted(unknown))}: the variants are {', '.join(VARIANTS)}")
    variants = {v: VARIANTS[v] for v in only or VARIANTS}

    where = runtime.start_run(base.device)
    if not base.max_steps:
        raise BadInput("--max-steps 0: an ablation needs the same number of steps for all")
    if base.data_root != simipu.PRESETS["demo"][1].data_root:
        base.synthetic_frames, flags = 0, [*flags, "--synthetic-frames", "0"]  # real data that are not there are an error
    frames, held_out, note = simipu.load_frames(base, where)  # the scenes are written once, before jobs look for them

    def run(job):
        variant, seed = job
        folder = Path(base.out, name, re.sub(r"\W+", "_", variant), str(seed))
        arguments = ["demo", *flags, *shlex.split(variants[variant]), "--seed", str(seed), "--name", str(folder.relative_to(base.out))]
        steps = base.max_steps * base.batch_size // parse(arguments).batch_size  # other batches see as many frames
        arguments += ["--max-steps", str(steps)]
        c = parse(arguments)
        found = judged(folder, c)
        if found is None:
            threads = str(max(1, (os.cpu_count() or 1) // jobs))
            command = [sys.executable, str(Path(simipu.__file__)), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": threads, **os.environ})
            found = judged(folder, c)
            if done.returncode or found is None:
                lines = done.stderr.strip().splitlines()
                raise BadInput(f"{shlex.join(arguments)}: {lines[-1] if lines else 'ended without being judged; --eval-splits?'}")
        return job, found

    work = [(variant, seed) for seed in seeds for variant in variants]  # a seed at a time: an interrupted table has whole columns
    with ThreadPoolExecutor(jobs) as pool:
        found = dict(tqdm(pool.map(run, work), total=len(work), dynamic_ncols=True))

    print(f"{len(frames)} frames, {base.max_steps} steps of {base.batch_size}, judged on {len(held_out)} others; mean (range) over seeds {' '.join(map(str, seeds))}")
    print(note or "", end="\n" if note else "")
    print("| | rank, right image, % | rank, another's, % | gap, points | top1, % | excess | rank, other view, % | top1, % |")
    print("|---|---|---|---|---|---|---|---|")
    print(row("random", [evaluate.match_random(dataclasses.replace(base, seed=seed), held_out, where.device) for seed in seeds]))
    for variant in variants:
        print(row(f"{variant} `{variants[variant]}`" if variants[variant] else variant, [found[variant, seed] for seed in seeds]))


if __name__ == "__main__":
    main()
