"""Pictures of one frame: the command as a user gives it, and the arithmetic behind the colours."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_loop import MINI

import data
import data_kitti
import eval as evaluate
import eval_match
import ops_triton as ops
import pictures
from files import BadInput

PICTURES = ["features.png", "pairs.png", "projection.png", "similarity.png"]


def script(name, *arguments):
    command = [sys.executable, str(Path(evaluate.__file__).parent / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """The folder of a run of two steps on the built-in scenes."""
    out = tmp_path_factory.mktemp("out")
    done = script("simipu.py", "demo", "--data-root", scenes, *MINI, "--max-steps", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    return out / "demo"


def test_four_pictures(run, scenes):
    """By index, into show/FRAME beside the checkpoint; each a picture, with much of it drawn."""
    done = script("eval.py", "show", run / "last.pt", "--data-root", scenes, "--split", "val", "--frame", 1, "--point", 12, -3, -1)
    assert done.returncode == 0, done.stderr
    name = data_kitti.find_frames(scenes, ["val"])[1].name
    folder = run / "show" / name
    assert sorted(p.name for p in folder.iterdir()) == PICTURES
    lines = done.stdout.splitlines()
    assert lines[0] == f"{folder}/" and sorted(line.split()[0] for line in lines[1:]) == PICTURES
    assert "nearest to --point" in done.stdout and "100.0 % in the image" in done.stdout
    for picture in PICTURES:
        pixels = np.asarray(Image.open(folder / picture).convert("RGB")).astype(float)
        assert pixels.shape[1] >= 1200 and pixels.shape[0] >= 500
        colourful = np.ptp(pixels, axis=2) > 30
        assert pixels.std() > 20 and colourful.mean() > 0.01, picture
        assert colourful[: len(pixels) // 2].any() and colourful[len(pixels) // 2 :].any(), picture


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["last.pt", "--frame", 99], "--frame 99: no such frame; there are 0 to 1, training/"),
        (["last.pt", "--frame", "training/999999"], "--frame training/999999: no such frame"),
        (["last.pt", "--split", "nonsense"], "nonsense.txt: missing"),
        (["last.pt", "--pixel", 5000, 5], "--pixel 5000 5: outside the image, which is 160 x 64"),
        (["nothing.pt"], "nothing.pt: no such file"),
        (["backbone.pt"], "backbone.pt: not a last.pt of simipu.py"),
        (["last.pt", "--point", 1, 2], "--point"),
    ],
)
def test_wrong_arguments(run, scenes, tmp_path, monkeypatch, capsys, arguments, says):
    """One line, exit status 1, and nothing written. In this process: the script's own `main`, without five seconds of imports."""
    if "--split" not in arguments:
        arguments = [*arguments, "--split", "val"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "show", str(run / arguments[0]), "--data-root", str(scenes), "--out", str(tmp_path / "out"), *map(str, arguments[1:])])
    with pytest.raises(SystemExit) as e:
        evaluate.main()
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: ") and says in e.value.code and "\n" not in e.value.code
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_by_subprocess(run, scenes):
    done = script("eval.py", "show", run / "backbone.pt", "--data-root", scenes)
    assert done.returncode == 1 and done.stdout == "" and done.stderr == f"error: {run / 'backbone.pt'}: not a last.pt of simipu.py\n"


def test_find_frame():
    frames = [data.Frame(f"{folder}/{i:06d}", Path(), Path(), (), data_kitti.RIG) for folder, i in (("training", 7), ("training", 3), ("testing", 7))]
    assert [evaluate.find_frame(frames, w) for w in ("0", "2", "testing/000007", "000003")] == [0, 2, 2, 1]
    for wrong in ("000007", "000000", "3", "-1", "", "training"):  # two of that name; names that are not there
        with pytest.raises(BadInput, match="^--frame " + wrong):
            evaluate.find_frame(frames, wrong)


@pytest.fixture(scope="module")
def model_and_view(run, scenes):
    model, c, _ = evaluate.load_run(run / "last.pt")
    return model, eval_match.Unseen(data_kitti.find_frames(scenes, ["val"]), c, "cpu").batch([0])


@torch.no_grad()
def test_embeddings_are_those_of_eq_7(model_and_view):
    """On the grid's pixels, cell centres and pixels between cells alike, the dense embedding is the very feature that SimIPU.forward
    would sample there; at its places, `embed` has the features that it compares."""
    model, view = model_and_view
    feature_map = model.img_backbone(view["image"])[-1]
    grid = pictures.dense_embedding(model, view["image"], step=8)
    height, width = view["image"].shape[2:]
    assert grid.shape[:2] == (height / 8, width / 8)
    for u, v in ((64, 32), (0, 0), (72, 40), (width - 8, height - 8)):  # two cell centres, between four cells, beyond the last
        feature = ops.bilinear_sample(feature_map, torch.tensor([[[u / 32, v / 32]]]))[0]
        torch.testing.assert_close(grid[v // 8, u // 8], F.normalize(model.mlp_cross_img(feature), dim=1)[0], rtol=1e-4, atol=1e-5)
    cell = F.normalize(model.mlp_cross_img(feature_map[:, :, 1, 2]), dim=1)[0]
    torch.testing.assert_close(grid[4, 8], cell, rtol=1e-4, atol=1e-5)  # cell (2, 1) is centred on pixel (64, 32)

    found = pictures.embed(model, view)
    seen, temperature = found["visible"], model.c.temperature
    _, stats = model(view)
    logits = found["point"][seen] @ found["pixel"][seen].T / temperature
    torch.testing.assert_close(F.cross_entropy(logits, torch.arange(len(logits))), stats["inter"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits.diagonal().mean() * temperature, stats["inter_positive"], rtol=1e-3, atol=1e-4)
    by_hand = [(logits[i] > logits[i, i]).sum().item() for i in range(len(logits))]
    assert pictures.ranks(found)[seen].tolist() == by_hand


def test_similarity_map_is_the_cosine_at_the_right_pixel():
    """Cell (i, j) is centred on pixel u = step j, v = step i; between, bilinear; beyond the last cell, constant."""
    rng = torch.Generator().manual_seed(0)
    grid = F.normalize(torch.randn(5, 9, 16, generator=rng), dim=2)  # of an image of 40 x 72, step 8
    heat = pictures.similarity_map(grid, grid[3, 6], 40, 72, step=8)
    assert heat.shape == (40, 72) and divmod(int(heat.argmax()), 72) == (24, 48)
    assert heat[24, 48].item() == pytest.approx(1, abs=1e-6)
    for i, j in ((0, 0), (4, 8), (2, 5)):
        assert heat[8 * i, 8 * j].item() == pytest.approx((grid[i, j] @ grid[3, 6]).item(), abs=1e-6)
    assert heat[20, 48].item() == pytest.approx((heat[16, 48] + heat[24, 48]).item() / 2, abs=1e-6)
    assert heat[24, 50].item() == pytest.approx((0.75 * heat[24, 48] + 0.25 * heat[24, 56]).item(), abs=1e-6)
    assert torch.equal(heat[39], heat[32]) and torch.equal(heat[:, 71], heat[:, 64])


def test_shared_colours():
    """Equal features have equal colours in every set; the direction that varies most is spread over a whole channel."""
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(200, 8, generator=rng) * torch.tensor([5.0, 2, 1, 0.1, 0.1, 0.1, 0.1, 0.1])
    fit = torch.cat([a, torch.randn(100, 8, generator=rng)])
    of_a, of_grid, again = pictures.shared_colours(fit, a, a[:60].view(6, 10, 8), a.flip(0))
    assert of_a.shape == (200, 3) and of_grid.shape == (6, 10, 3) and 0 <= of_a.min() and of_a.max() <= 1
    assert torch.equal(of_grid.flatten(0, 1), of_a[:60]) and torch.equal(again.flip(0), of_a)
    assert abs(np.corrcoef(of_a[:, 0], a[:, 0])[0, 1]) > 0.95 and of_a[:, 0].min() == 0 and of_a[:, 0].max() == 1
    same = torch.ones(4, 8)
    assert torch.isfinite(pictures.shared_colours(same, same)[0]).all()  # collapsed features


def test_choose_place():
    found = {
        "places": torch.tensor([[10.0, 0, 0], [12, -3, 0], [30, 0, 0], [10, 1, -1.6], [11, 0, 0]]),
        "uv": torch.tensor([[60.0, 20], [90, 20], [50, 20], [51, 30], [50, 21]]), "depth": torch.tensor([10.0, 12, 30, 10, 11]),
        "visible": torch.tensor([True, True, True, True, False]),
    }  # fmt: skip

    def choose(**kwargs):
        return pictures.choose_place(found, 40, 100, data_kitti.RIG.things, **kwargs)[0]

    assert choose() == 0  # nearer the middle: one too far, one on the ground, one out of sight
    assert choose(point=(13, -3, 0)) == 1 and choose(pixel=(52, 29)) == 3
    with pytest.raises(BadInput, match="--point"):
        choose(point=(math.nan, 0, 0))
    with pytest.raises(BadInput, match="100 x 40"):
        choose(pixel=(100, 0))


def test_close_ups_sit_on_depth_edges():
    """A post at 10 m before a wall at 30 m: the first close-up is on the post; the ground, whose depth jumps only from row to row, has none."""
    u, v = (x.flatten().astype(float) for x in np.meshgrid(np.arange(0, 400, 4), np.arange(0, 80, 4)))
    post = (abs(u - 200) < 10) & (v < 40)
    depth = np.where(post, 10.0, np.where(v < 40, 30.0, 30 - 0.6 * (v - 40)))
    spots = pictures.edges_in_depth(np.stack([u, v], 1), depth, v < 40, 400)
    assert len(spots) == 1 and abs(spots[0][0] - 200) < 10 and spots[0][1] < 40
    assert pictures.edges_in_depth(np.stack([u, v], 1), np.full(len(u), 20.0), np.ones(len(u), bool), 400) == []
