"""Tracking: what log.jsonl says, once, whatever became of the run. Stand-ins take the place of the packages."""

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_loop import MINI, at, losses, send
from test_loop import tiny as tiny  # a fixture: a run around a model of two numbers

import loop
import simipu
import track


def test_figures():
    line = {"step": 3, "moco": 0.5, "lr": [1, 2], "match": {"right_rank": 7, "gap_interval": [1, 2.5]}, "name": "x"}
    expected = {"moco": 0.5, "lr/0": 1, "lr/1": 2, "match/right_rank": 7}
    line["match"]["per_frame"] = {"places": [3, 4]}  # hundreds of numbers, of no use there
    assert track.figures(line) == expected | {"match/gap_interval/0": 1, "match/gap_interval/1": 2.5}
    assert track.parts_of({"step": 0, "config": {"lr": 1}, "data": {"frames": 3}}) == ({}, {})
    scalars, judged = track.parts_of({"step": 4, "match": {"gap": 2, "intra": {"top1": None, "rank": 1}}})
    assert scalars == {"match/gap": 2, "match/intra/rank": 1} and judged == {"match": {"gap": 2, "intra/rank": 1}}


class Writer:
    """TensorBoard's, whose events are lines of a file in its folder, another for each writer."""

    def __init__(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = Path(folder) / f"events.{len(os.listdir(folder))}"

    def keep(self, kind, name, value, step):
        with self.path.open("a") as f:
            f.write(json.dumps([kind, name, value, step]) + "\n")

    def add_scalar(self, name, value, step):
        self.keep("scalar", name, value, step)

    def add_text(self, name, text, step):
        self.keep("text", name, text, step)

    def add_image(self, name, pixels, step, dataformats):
        self.keep("image", name, [*pixels.shape, dataformats], step)

    def close(self):
        self.keep("closed", "", None, 0)


@pytest.fixture
def tensorboard(monkeypatch):
    """-> events(folder): all that is shown of a run."""
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)

    def events(folder):
        lines = [line for path in sorted(Path(folder, "tensorboard").iterdir()) for line in open(path)]
        return [tuple(json.loads(line)) for line in lines]

    return events


class Service:
    """wandb: what was told to the runs of each id."""

    def __init__(self):
        self.told, self.opened = {}, []

    def init(self, project, name, dir, id, resume):
        assert resume == "allow" and Path(dir).is_dir()
        self.opened.append((project, name, id))
        log = self.told.setdefault(id, [])
        run = types.SimpleNamespace(config={}, finish=lambda: log.append("closed"))
        run.config = types.SimpleNamespace(update=lambda line, allow_val_change: log.append("config"))
        run.log = lambda values, step: log.append((step, values))
        return run

    def Table(self, columns, data):
        return data

    def Image(self, path):
        return Image.open(path).size


@pytest.fixture
def wandb(monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


@pytest.fixture
def shown(tiny, monkeypatch):
    """shown(kind, steps, ...): tiny(steps, ...) with --track, up to its last picture."""

    def run(kind, steps, **flags):
        monkeypatch.setattr(loop.Loop, "tracked", kind)
        around = tiny(steps, **flags)
        Image.new("RGB", (8, 4)).save(around.folder / "curves.png")
        around.end()
        return around

    return run


def killed_at(step, shown, kind):
    """A run of 6 steps that dies without another word after its step, its last checkpoint at 3."""

    def die():
        raise KeyError("killed")

    with pytest.raises(KeyError):
        shown(kind, 6, save_every=3, after=at(step, die))


def test_tensorboard_shows_each_step_once(shown, tensorboard):
    """Of a run that was killed past its checkpoint, with judgement and picture."""
    killed_at(5, shown, "tensorboard")
    assert [step for kind, name, _, step in tensorboard("out/tiny") if name == "loss"] == [1, 2, 3, 4, 5]
    shown("tensorboard", 6, save_every=3, judgement=lambda: {"gap": 5.25})
    events = tensorboard("out/tiny")
    assert {step: value for kind, name, value, step in events if name == "loss"} == losses()
    assert [step for _, name, _, step in events if name == "loss"] == [1, 2, 3, 4, 5, 6]
    assert ("scalar", "match/gap", 5.25, 6) in events and ("image", "curves", [4, 8, 3, "HWC"], 6) in events
    table = [value for _, name, value, step in events if name == "match table"]
    assert table == ["| figure | |\n|---|---|\n| gap | 5.25 |"] and events[-1][0] == "closed"


def test_tensorboard_may_come_later(shown, tiny, tensorboard):
    """Asked for when a run goes on, it shows the steps before as well."""
    with pytest.raises(SystemExit):
        tiny(6, after=at(2, lambda: send(2)))
    assert not os.path.exists("out/tiny/tensorboard")
    shown("tensorboard", 6)
    assert [step for _, name, _, step in tensorboard("out/tiny") if name == "loss"] == [1, 2, 3, 4, 5, 6]


def test_wandb_is_told_each_step_once(shown, wandb):
    killed_at(5, shown, "wandb")
    around = shown("wandb", 6, save_every=3, judgement=lambda: {"gap": 5.25})
    (told,) = wandb.told.values()  # one run there, opened twice
    assert len(wandb.opened) == 2 and wandb.opened[0][:2] == ("simipu", "tiny")
    steps = [entry[0] for entry in told if "loss" in entry[1]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (6, {"match/gap": 5.25, "match table": [["gap", 5.25]]}) in told and (6, {"curves": (8, 4)}) in told
    assert told[-1] == "closed"
    assert json.loads((around.folder / "wandb.json").read_text())["step"] == 6


def test_wandb_is_told_what_a_killed_run_owed(wandb, tmp_path):
    """The step was told, and it died while it was judged."""
    report, judgement = {"step": 2, "lr": [1.0], "loss": 3.0}, {"step": 2, "match": {"gap": 1.5}}
    for lines in ([report], [report, {"step": 2, "config": {}}, judgement]):
        track.start("wandb", tmp_path, "x", lines)
    (told,) = wandb.told.values()
    assert [entry for entry in told if entry != "config"] == [
        (2, {"lr/0": 1.0, "loss": 3.0}),
        (2, {"match/gap": 1.5, "match table": [["gap", 1.5]]}),
    ]
    assert "config" in told


def test_wandb_that_refuses_is_one_line(shown, wandb, monkeypatch):
    def refuse(**_):
        raise RuntimeError("no API key\nlong advice")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(track.BadInput, match="^--track wandb: no API key; WANDB_MODE=offline needs no network$"):
        shown("wandb", 2)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_an_absent_package_is_one_line(run_here, scenes, tmp_path, monkeypatch, kind):
    """Before anything is written."""
    monkeypatch.setitem(sys.modules, track.PACKAGES[kind], None)
    status, _, err = run_here(simipu, "demo", "--data-root", scenes, *MINI, "--max-steps", 1, "--track", kind)
    assert status == 1 and err.startswith(f"error: --track {kind}: ") and err.count("\n") == 1
    assert f"pip install {kind}" in err and not (tmp_path / "out").exists()


def test_a_real_run(run_here, scenes, tmp_path, tensorboard):
    """Its losses are those of log.jsonl; its pictures are there; a run without the flag leaves nothing."""
    command = ["demo", "--data-root", scenes, *MINI, "--max-steps", 2]
    status, out, err = run_here(simipu, *command, "--track", "tensorboard")
    assert status == 0, err
    events = tensorboard(tmp_path / "out" / "demo")
    lines = map(json.loads, (tmp_path / "out" / "demo" / "log.jsonl").read_text().splitlines())
    assert [e[2] for e in events if e[1] == "inter"] == [line["inter"] for line in lines if "lr" in line]
    assert [e[1] for e in events if e[0] == "image"] == ["curves", "pairs"]
    assert "tensorboard" not in torch.load(tmp_path / "out" / "demo" / "last.pt", weights_only=True)["identity"]
    assert any(name == "config" for _, name, *_ in events)
