"""Is a figure what it says it is: matching, the probe, and their commands."""

import json
import math
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_loop import SMALL

import ablate
import data
import data_kitti
import eval as evaluate
import eval_match
import simipu

TINY = replace(simipu.PRESETS["demo"][1], places=32, num_points=512, image_scale=(160, 64), point_hidden=16, image_hidden=16, embed_dim=16)


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """last.pt of a run on the built-in scenes, and of one on wrong pairs."""
    out = tmp_path_factory.mktemp("runs")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name in ("true", "wrong"):
        c = replace(TINY, data_root=(str(scenes),), out=str(out), name=name, pairs=name, max_steps=2, workers=0, eval_splits=("val",), synthetic_frames=0)
        simipu.train(c)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return out / "true" / "last.pt", out / "wrong" / "last.pt"


# -----------------------------------------------------------------------------
# matching


def test_ranks_by_hand():
    """Unit vectors at angles, query at 0: a key's cosine falls with its angle."""
    at = lambda *degrees: torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])
    query, key = at(0, 0, 0, 0), 3 * at(10, 50, 30, 30)
    beaten_by, best, excess = eval_match.ranks(query, key, 0.5)
    np.testing.assert_allclose(beaten_by, [0, 100, 50, 50], atol=1e-4)  # equals share a rank: 30 degrees is beaten by 10, and half by its equal
    assert best.tolist() == [1, 0, 0, 0]
    logits = torch.cos(torch.deg2rad(torch.tensor([10.0, 50, 30, 30]))) / 0.5
    np.testing.assert_allclose(excess, -torch.log_softmax(logits, 0) - math.log(4), atol=1e-5)


def key(image):
    """Tells images apart, whatever their layout in memory: a row of pixels."""
    return tuple(image[0, 40].tolist())


class Seer(torch.nn.Module):
    """A network whose answers are known. Points and pixels give their position in the image, and with `sees` also which frame they are of."""

    def __init__(self, c, sees):
        super().__init__()
        self.c, self.sees, self.frames, self.clouds = c, sees, {}, {}
        self.mlp_cross_points = self.mlp_cross_img = torch.nn.Identity()
        self.img_backbone = lambda image: self.see(image)
        self.img_backbone.strides, self.img_backbone.offsets = (4,), (0,)

    def see(self, image):
        v, u = torch.meshgrid(torch.arange(0, image.shape[2], 4), torch.arange(0, image.shape[3], 4), indexing="ij")
        return [torch.stack([self.answer(torch.stack([u, v], -1), self.frames[key(x)]) for x in image]).permute(0, 3, 1, 2).contiguous()]

    def answer(self, uv, frame):
        """Positions as angles, so that near ones are alike; what is seen turns them."""
        angle = uv / torch.tensor([160.0, 64.0]) * 2.5 + (1.7 * frame if self.sees else 0.0)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def pts_backbone(self, views):
        places = views[:, : self.c.places, :3]
        lidar2img, frame = self.clouds[tuple(views[0, 0].tolist())]
        uv, _ = data.project(places, lidar2img)
        return places, self.answer(uv, frame)

    def forward(self, batch, report=True): ...


@pytest.mark.parametrize("sees", [False, True])
def test_only_what_is_seen_in_the_image_makes_a_gap(scenes, monkeypatch, sees):
    """A network that knows nothing but position matches well in the right image, and as well in the wrong one. One that sees which
    image it is matches in the right one alone."""
    frames = data_kitti.find_frames(scenes, ["trainval"])
    c = replace(TINY, intra_weight=0.0)
    seer = Seer(c, sees)
    real = eval_match.Unseen.batch

    def batch(self, indices):
        out = real(self, indices)
        for k, i in enumerate(indices):
            seer.frames[key(out["image"][k])] = i
            seer.clouds[tuple(out["alpha"][k, 0].tolist())] = out["lidar2img"][k : k + 1], i
        return out

    monkeypatch.setattr(eval_match.Unseen, "batch", batch)
    monkeypatch.setattr(eval_match, "recalibrated", lambda model, inputs, *a: (list(inputs), model)[1])
    found = eval_match.match(seer, frames, c, "cpu")
    assert found["right_rank"] < 2 and found["right_excess"] < -0.3 and found["frames"] == len(frames)
    if sees:
        assert found["wrong_rank"] > 15 and found["gap"] > 15 and found["gap_interval"][0] > 5
    else:
        assert found["wrong_rank"] < 3 and abs(found["gap"]) < 1


def test_matching_of_a_random_network_is_chance_and_always_the_same(scenes):
    torch.manual_seed(0)
    model, frames = simipu.SimIPU(TINY), data_kitti.find_frames(scenes, ["trainval"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = eval_match.match(model, frames, TINY, "cpu")
    assert found == eval_match.match(model, frames, TINY, "cpu")
    assert 30 < found["right_rank"] < 70 and abs(found["gap"]) < 20 and found["gap_interval"][0] <= found["gap"] <= found["gap_interval"][1]
    assert found["intra_rank"] < 35  # reflectance alone tells something across views
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training  # judged on a copy
    torch.manual_seed(0)
    assert "right_rank" not in eval_match.match(simipu.SimIPU(replace(TINY, inter_weight=0.0)), frames[:3], TINY_INTRA, "cpu")


TINY_INTRA = replace(TINY, inter_weight=0.0)


def test_match_command(run_script, run_here, runs, scenes, tmp_path):
    true, wrong = runs
    done = run_script("eval.py", "match", true, "--control", wrong)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "matching on 2 frames" in lines[0] and [line.split()[0] for line in lines[2:]] == ["random", "wrong", "true"]
    model, c, _ = evaluate.load_run(true)
    expected = eval_match.match(model, data_kitti.find_frames(scenes, ["val"]), c, "cpu")
    assert f"{expected['right_rank']:.1f} %" in lines[-1] and f"{expected['wrong_rank']:.1f} %" in lines[-1]
    status, out, _ = run_here(evaluate, "match", true, "--splits", "trainval")
    assert status == 0 and "note: true was trained on 6 of these 8 frames: its figures will flatter" in out
    status, out, _ = run_here(evaluate, "match", true, true.parent / ".." / "true" / "last.pt", "--control", wrong, "--splits", "train")
    assert status == 0 and "note: wrong pairs was trained on 6 of these 6 frames" in out and len(out.splitlines()) == 3 + 2 + 4


def test_names_in_tables():
    """As short as they can be and still be different from each other, and from the rows that are always there."""
    paths = [Path(p) for p in ("out/a/last.pt", "out/b/backbone.pt", "out/random/last.pt", "x/imagenet.pth")]
    assert list(evaluate.names_of(paths)) == ["a", "b", "random", "imagenet.pth"]
    assert list(evaluate.names_of(paths, ["random"])) == ["out/a", "out/b", "out/random", "x/imagenet.pth"]
    assert list(evaluate.names_of([Path("out/SimIPU/0/last.pt"), Path("out/SimIPU/1/last.pt")])) == ["SimIPU/0", "SimIPU/1"]
    assert list(evaluate.names_of([Path("random")], ["random"])) == ["random (2)"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["match", "nowhere.pt"], "nowhere.pt: no such file"),
        (["match", "TRUE", "--control", "TRUE"], "was not trained with --pairs wrong"),
        (["match", "TRUE", "--frames", "1"], "1 frames chosen; judging needs two or more"),
        (["match", "TRUE", "--frames", "-5"], "--frames -5"),
        (["match", "TRUE", "--frame-stride", "0"], "--frame-stride 0"),
        (["match", "ODD"], "not a last.pt"),
        (["probe", "TRUE", "--splits", "trainval", "--points", "0"], "--points 0"),
        (["show", "TRUE", "--seed", "-1"], "--seed -1"),
        (["match", "TRUE", "--splits", "nonsense"], "nonsense.txt: missing"),
        (["match", "BACKBONE"], "not a last.pt"),
        (["probe", "TRUE", "--frames", "2"], "probing needs three frames or more"),
        (["probe", "TRUE", "--splits", "trainval", "--also", "nowhere.pth"], "nowhere.pth: no such file"),
        (["probe", "TRUE", "--stage", "5"], "--stage"),
        (["match"], "checkpoint"),
        (["guess"], "guess"),
    ],
)
def test_commands_that_cannot_work(run_here, runs, arguments, says):
    odd = runs[0].with_name("odd.pt")
    torch.save({"model": {}, "config": None}, odd)  # as somebody else's code may write it
    names = {"TRUE": runs[0], "BACKBONE": runs[0].with_name("backbone.pt"), "ODD": odd}
    status, out, err = run_here(evaluate, *(names.get(a, a) for a in arguments))
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err, (out, err)


# -----------------------------------------------------------------------------
# the probe


def test_positions():
    uv = torch.tensor([[-0.5, -0.5], [159.5, 63.5], [79.5, 31.5]])
    p = eval_match.positions(uv, 160, 64)
    assert p.shape == (3, 21) and p[:, 0].tolist() == [1, 1, 1] and p[2, 1:].abs().max() < 1e-12  # the middle is (0, 0)
    assert p[1].tolist() == [1] * 21 and sorted(set(p[0].tolist())) == [-1, 1]


def test_ridge_equals_the_textbook():
    """min |y - X w|^2 / n + strength |standardised part of w|^2, by stacking the penalty under the data, in float64."""
    torch.manual_seed(0)
    n, free, C, strength = 200, 4, 7, 0.3
    X = torch.cat([torch.ones(n, 1), torch.randn(n, free - 1), torch.randn(n, C) * torch.linspace(0.1, 9, C) + torch.arange(C)], 1).double()
    X[:, -1] = 5.0  # a feature that never changes
    y = X @ torch.randn(free + C).double() + torch.randn(n)
    Z = torch.cat([X, y[:, None]], 1)
    w = eval_match.ridge(Z.T @ Z, free, [strength])[strength]
    features = X[:, free:-1]
    S = torch.cat([X[:, :free], (features - features.mean(0)) / features.std(0, correction=0)], 1)
    penalty = torch.diag(torch.tensor([0.0] * free + [math.sqrt(n * strength)] * (C - 1)).double())
    by_hand = torch.linalg.lstsq(torch.cat([S, penalty]), torch.cat([y, torch.zeros(len(penalty)).double()])).solution
    torch.testing.assert_close(X @ w, S @ by_hand, rtol=1e-6, atol=1e-6)


def test_errors_are_of_frames_not_fitted():
    """A feature that tells the target is found; one that only tells the frame, whose target has an offset of its own, is no help on
    frames never fitted; noise costs little, for cross-validation shrinks it."""
    torch.manual_seed(0)
    frames, n = 10, 60
    base = [torch.cat([torch.ones(n, 1), torch.randn(n, 2)], 1) for _ in range(frames)]
    truth, offset = [torch.randn(n) for _ in range(frames)], torch.randn(frames) * 2
    target = [(b[:, 1] + t + o).double() for b, t, o in zip(base, truth, offset)]
    score = lambda extra: float(torch.cat(eval_match.fit_and_score([torch.cat([b, e], 1) for b, e in zip(base, extra)], target, 3)).mean())
    floor = score([torch.zeros(n, 1)] * frames)
    assert floor == pytest.approx(1 + float(offset.var()), rel=0.3)
    assert score([t[:, None] for t in truth]) < 0.8 * floor
    assert score([torch.eye(frames)[i].expand(n, frames) for i in range(frames)]) > 0.95 * floor
    assert score([torch.randn(n, 100) for _ in range(frames)]) < 1.15 * floor
    assert len(eval_match.fit_and_score(base, target, 3)) == frames


def test_probe_command(run_script, runs, scenes):
    true, wrong = runs
    command = ["eval.py", "probe", true, "--also", wrong.with_name("backbone.pt"), "--data-root", scenes, "--splits", "trainval", "--points", 100]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("was trained on 6 of these 8 frames" in line for line in lines) and any("fitted and scored on 8 frames, 100 points each" in line for line in lines)
    rows = [re.match(r"(.*?) +(-?\d\.\d+) \(", line).groups() for line in lines[-5:]]
    assert [name for name, _ in rows] == ["position", "true", "true, wrong image", "random", "wrong"]
    position, *others = (float(r2) for _, r2 in rows)
    assert 0.1 < position < 0.95 and all(abs(r2 - position) < 0.3 for r2 in others)  # an image's rows tell depth on a street


def test_probe_finds_depth_where_it_is(scenes):
    """An encoder that paints log-depth itself, from the frame's own points, explains what position leaves; in another frame's image
    it does not."""
    frames = data_kitti.find_frames(scenes, ["trainval"])
    unseen = eval_match.Unseen(frames, TINY, "cpu")
    maps = {}
    for i in range(len(frames)):
        batch = unseen.batch([i])
        uv, depth = data.project(batch["alpha"], batch["lidar2img"])
        v, u = torch.meshgrid(torch.arange(0, 64, 4), torch.arange(0, 160, 4), indexing="ij")
        cells = torch.stack([u, v], -1).view(-1, 2).float()
        nearest = torch.cdist(cells, uv[0]).argmin(1)
        maps[key(batch["image"][0])] = depth[0][nearest].log().view(1, 1, 16, 40)

    class Painter(torch.nn.Module):
        stride = 8  # so that stage 3 has stride 4

        def forward(self, image):
            return [None] * 3 + [torch.cat([maps.get(key(x), torch.zeros(1, 1, 16, 40)) for x in image]), None]

    rows = eval_match.probe({"painter": Painter()}, frames, TINY, "cpu", points=200, stage=3)
    assert rows["painter"]["all_gain"] > 0.15 and rows["painter"]["all"] > 0.75
    assert rows["painter, wrong image"]["all_gain"] < 0.05 and rows["position"]["all_gain"] == 0
    low, high = rows["painter"]["all_gain_interval"]
    assert 0 < low < rows["painter"]["all_gain"] < high
    assert rows["painter"]["off_ground"] != rows["painter"]["all"]


# -----------------------------------------------------------------------------
# ablations


def test_ablation_table(run_here, scenes, tmp_path):
    """Means over two seeds; the second time nothing is run again."""
    arguments = ["--name", "t", "--only", "SimIPU", "--data-root", scenes, *SMALL, "--max-steps", 1, "--workers", 0, "--synthetic-frames", 0]
    status, out, err = run_here(ablate, "--seeds", 0, 1, *arguments)
    assert status == 0, err
    table = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in table] == ["| random", "| SimIPU"]
    mean, low, high = (float(x) for x in table[1][1].replace("(", "").replace(")", "").split() if x != "to")
    logs = [[json.loads(line) for line in (tmp_path / "out" / "t" / "SimIPU" / str(seed) / "log.jsonl").read_text().splitlines()] for seed in (0, 1)]
    ranks = [log[-1]["match"]["right_rank"] for log in logs]
    assert mean == pytest.approx(sum(ranks) / 2, abs=0.051) and [low, high] == [round(x, 1) for x in sorted(ranks)]
    assert ablate.row("x", [{"intra_rank": 1.0, "intra_top1": 0.5}, {"intra_rank": 2.0, "intra_top1": 0.25}], ablate.TASKS["match"]) == "| x | – | – | – | – | – | 1.5 (1.0 to 2.0) | 37.5 (25.0 to 50.0) |"
    before = (tmp_path / "out" / "t" / "SimIPU" / "0" / "log.jsonl").stat().st_mtime
    assert run_here(ablate, "--seeds", 0, 1, *arguments)[1] == out
    assert (tmp_path / "out" / "t" / "SimIPU" / "0" / "log.jsonl").stat().st_mtime == before


def test_ablations_do_not_mix(run_here, run_script, scenes, tmp_path):
    """A finished run with other flags is refused by naming them; a bad argument is one line."""
    start = ["--name", "u", "--only", "SimIPU", "--seeds", 0, "--data-root", scenes, *SMALL, "--max-steps", 1, "--workers", 0]
    assert run_here(ablate, *start)[0] == 0
    status, _, err = run_here(ablate, *start, "--image-lr", 0.01)
    assert status == 1 and "image_lr=0.001, not 0.01; give another --name" in err
    done = run_script("ablate.py", "--seeds", "x")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--seeds" in done.stderr


def test_ablations_that_cannot_work(run_here, scenes):
    for arguments, says in ((["--only", "nonsense"], "--only nonsense: the variants are SimIPU"), (["--placse", 3], "--placse"), (["--only", "SimIPU", "--data-root", "nowhere", "--synthetic-frames", 0], "nowhere: no such folder")):
        status, _, err = run_here(ablate, *arguments)
        last = err.strip().splitlines()[-1]
        assert status == 1 and "error: " in last and says in last, err


def test_ablation_of_depth(run_here, scenes, tmp_path):
    """One row for each initialisation and share of labels; the figures are those of the runs' last lines."""
    small = ["--image-scale", 0.25, "--decoder-width", 32, "--batch-size", 2, "--max-steps", 1, "--workers", 0, "--synthetic-frames", 0]
    status, out, err = run_here(ablate, "--task", "depth", "--inits", "none", "--labels", 1, 0.5, "--seeds", 0, "--data-root", scenes, *small)
    assert status == 0, err
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["none, 1 of labels", "none, 0.5 of labels"]
    for row, folder, pairs in zip(rows, ("none_1_of_labels", "none_0.5_of_labels"), (6, 3)):
        first, *_, last = map(json.loads, (tmp_path / "out" / "ablation" / folder / "0" / "log.jsonl").read_text().splitlines())
        assert first["data"]["frames"] == pairs
        eigen = last["depth"]["eigen"]
        assert float(row[1].split()[0]) == pytest.approx(100 * eigen["abs_rel"], abs=0.051) and float(row[3].split()[0]) == pytest.approx(eigen["rmse"], abs=0.0051)
