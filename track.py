"""Where else a run is shown: `--track tensorboard` or `--track wandb`, if that package is installed.

    python simipu.py demo --track tensorboard && tensorboard --logdir out
    WANDB_MODE=offline python simipu.py demo --track wandb

What they show is log.jsonl, which stays the truth: its scalars, the figures of every judgement as a table, and at the
end the run's pictures. A run that goes on does not show its steps twice: for TensorBoard the folder tensorboard/ is
written anew from log.jsonl, and what wandb was told last stands in wandb.json.
"""

import contextlib
import importlib
import json
import shutil
import uuid

import numpy as np
from PIL import Image

from files import BadInput, writing

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # what is imported


def imported(kind):
    """The module that does it, None for "none". Raises BadInput where it is not installed."""
    if kind == "none":
        return None
    try:
        return importlib.import_module(PACKAGES[kind])
    except ImportError as e:
        raise BadInput(f"--track {kind}: {e}; pip install {kind}, or leave the flag away") from None


def start(kind, folder, name, lines):
    """Show a run in `folder`, whose log.jsonl has these lines so far. -> None, TensorBoard or WandB. Raises BadInput
    where that cannot be.
    """
    module = imported(kind)
    if module is None:
        return None
    tracker = TensorBoard(module, folder) if kind == "tensorboard" else WandB(module, folder, name)
    for line in lines:
        tracker.add(line)
    return tracker


def figures(line):
    """The numbers in a line of log.jsonl, those of nested dicts and lists too: {"match/right_rank": 7.5}. Those of each
    frame that a judgement has are too many to show.
    """
    found = {}
    items = line.items() if isinstance(line, dict) else enumerate(line)
    for key, value in items:
        if key == "per_frame":
            continue
        if isinstance(value, (dict, list)):
            found |= {f"{key}/{inner}": number for inner, number in figures(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            found[str(key)] = value
    return found


def parts_of(line):
    """-> scalars of a line of log.jsonl, {name: number}; its judgement as {name: {figure: number}}, mostly {}.

    The first line of a start, which holds its config and no figures, has neither.
    """
    if "config" in line:
        return {}, {}
    judged = {} if "lr" in line else {key: figures(value) for key, value in line.items() if isinstance(value, dict)}
    return figures(line), judged


class TensorBoard:
    def __init__(self, module, folder):
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = module.SummaryWriter(str(folder / "tensorboard"))

    def add(self, line):
        """A line of log.jsonl."""
        scalars, judged = parts_of(line)
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, line["step"])
        for name, found in judged.items():
            rows = [f"| {figure} | {value:.5g} |" for figure, value in found.items()]
            self.writer.add_text(f"{name} table", "\n".join(["| figure | |", "|---|---|", *rows]), line["step"])
        if "config" in line:
            self.writer.add_text("config", f"```\n{json.dumps(line, indent=1)}\n```", line["step"])

    def picture(self, path, step):
        self.writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self):
        self.writer.close()


class WandB:
    def __init__(self, module, folder, name):
        self.module, self.state = module, folder / "wandb.json"
        self.id, self.step = uuid.uuid4().hex[:8], -1  # of the run there; the last step that it was told
        with contextlib.suppress(OSError, ValueError, KeyError):
            told = json.loads(self.state.read_text())
            self.id, self.step = told["id"], told["step"]
        try:
            where = {"project": "simipu", "name": name, "dir": str(folder)}
            self.run = module.init(**where, id=self.id, resume="allow")
        except Exception as e:  # its own errors, and those of the network
            said = str(e).strip().splitlines() or [type(e).__name__]
            raise BadInput(f"--track wandb: {said[0]}; WANDB_MODE=offline needs no network") from None
        self.start = self.step  # figures up to this step are there, but its judgement may be owed

    def add(self, line):
        """A line of log.jsonl. Several may be of one step."""
        if "config" in line:
            self.run.config.update(line, allow_val_change=True)
        if line["step"] < self.start + ("lr" in line):
            return
        scalars, judged = parts_of(line)
        tables = {}
        for name, found in judged.items():
            rows = [[figure, value] for figure, value in found.items()]
            tables[f"{name} table"] = self.module.Table(columns=["figure", "value"], data=rows)
        if scalars:
            self.run.log({**scalars, **tables}, step=line["step"])
            self.tell(line["step"])

    def tell(self, step):
        self.step = step
        with writing(self.state) as temporary:
            temporary.write_text(json.dumps({"id": self.id, "step": step}) + "\n")

    def picture(self, path, step):
        self.run.log({path.stem: self.module.Image(str(path))}, step=step)

    def close(self):
        self.run.finish()
