"""Pictures: the arithmetic behind colours and close-ups, what is said to have been measured, and what is drawn."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_eval_match import TINY

import data_kitti
import eval_match
import ops_triton as ops
import pictures
import pictures_boxes
import simipu
from files import BadInput


@pytest.fixture(scope="module")
def model_and_view(scenes):
    """An untrained network, and a batch of one frame."""
    torch.manual_seed(0)
    view = eval_match.Unseen(data_kitti.find_frames(scenes, ["val"]), TINY, "cpu").batch([0])
    return simipu.SimIPU(TINY).eval(), view


def colourful(path):
    """Which pixels of a PNG are no grey."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.ptp(pixels, axis=2) > 30


# -----------------------------------------------------------------------------
# what is around the drawing


def test_a_notebooks_backend_does_not_matter(tmp_path):
    """R4: matplotlib refuses the MPLBACKEND that a notebook leaves for all that it starts, where its package is not
    installed. The pictures at the end of a run are drawn all the same, and a notebook's own plots stay what they were.
    """
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "lr": [1], "loss": 1.0, "abs_rel": 0.5}))
    program = (
        "import pathlib, sys, pictures\n"
        "log, png = map(pathlib.Path, sys.argv[1:])\n"
        "pictures.draw_depth_curves(log, png)\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = dict(os.environ) | {"MPLBACKEND": "module://a_notebook.that_is_not_here", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", program, tmp_path / "log.jsonl", tmp_path / "curves.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_curves(tmp_path):
    """A panel for each kind of figure that the log has; a run whose log was deleted has none."""
    keys = ("", "_chance", "_top1", "_positive", "_negative")
    log = [{"step": i, "lr": [1.0], **{f"intra{key}": i / 9 for key in keys}} for i in range(1, 4)]
    figures = {"gain": 1.0, "gain_interval": [0.5, 1.5], "right_rank": 5.0, "wrong_rank": 9.0}
    judged = [{"step": i, "match": figures} for i in (2, 3)]
    for lines, panels in ((log, 3), (log + judged[:1], 3), (log + judged, 5)):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        pictures.draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").width == 110 * (1 + 4 * panels)
    pictures.draw_curves(tmp_path / "nothing.jsonl", tmp_path / "no.png")
    pictures.draw_depth_curves(tmp_path / "nothing.jsonl", tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


# -----------------------------------------------------------------------------
# what the features of one frame say


@torch.no_grad()
def test_embeddings_are_those_of_eq_7(model_and_view):
    """On the grid's pixels, cell centres and pixels between cells alike, the dense embedding is the very feature that
    SimIPU.forward would sample there; at its places, `embed` has the features that it compares.
    """
    model, view = model_and_view
    feature_map = model.img_backbone(view["image"])[-1]
    grid = pictures.dense_embedding(model, view["image"], step=8)
    height, width = view["image"].shape[2:]
    assert grid.shape[:2] == (height / 8, width / 8)
    # two cell centres, between four cells, beyond the last
    for u, v in ((64, 32), (0, 0), (72, 40), (width - 8, height - 8)):
        feature = ops.bilinear_sample(feature_map, torch.tensor([[[u / 32, v / 32]]]))[0]
        expected = F.normalize(model.mlp_cross_img(feature), dim=1)[0]
        torch.testing.assert_close(grid[v // 8, u // 8], expected, rtol=1e-4, atol=1e-5)
    cell = F.normalize(model.mlp_cross_img(feature_map[:, :, 1, 2]), dim=1)[0]  # (2, 1), centred on pixel (64, 32)
    torch.testing.assert_close(grid[4, 8], cell, rtol=1e-4, atol=1e-5)

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
        "uv": torch.tensor([[60.0, 20], [90, 20], [50, 20], [51, 30], [50, 21]]),
        "depth": torch.tensor([10.0, 12, 30, 10, 11]),
        "visible": torch.tensor([True, True, True, True, False]),
    }

    def choose(**kwargs):
        return pictures.choose_place(found, 40, 100, data_kitti.RIG.things, **kwargs)[0]

    assert choose() == 0  # nearer the middle: one too far, one on the ground, one out of sight
    assert choose(point=(13, -3, 0)) == 1 and choose(pixel=(52, 29)) == 3
    for bad in (math.nan, math.inf):
        with pytest.raises(BadInput, match="^--point"):
            choose(point=(bad, 0, 0))
        with pytest.raises(BadInput, match="^--pixel"):
            choose(pixel=(5, bad))
    with pytest.raises(BadInput, match="100 x 40"):
        choose(pixel=(100, 0))


def test_close_ups_sit_on_depth_edges():
    """A post at 10 m before a wall at 30 m: the first close-up is on the post. The ground, whose depth jumps only from
    row to row, has none.
    """
    u, v = (x.flatten().astype(float) for x in np.meshgrid(np.arange(0, 400, 4), np.arange(0, 80, 4)))
    post = (abs(u - 200) < 10) & (v < 40)
    depth = np.where(post, 10.0, np.where(v < 40, 30.0, 30 - 0.6 * (v - 40)))
    spots = pictures.edges_in_depth(np.stack([u, v], 1), depth, v < 40, 400)
    assert len(spots) == 1 and abs(spots[0][0] - 200) < 10 and spots[0][1] < 40
    assert pictures.edges_in_depth(np.stack([u, v], 1), np.full(len(u), 20.0), np.ones(len(u), bool), 400) == []
    for few in (0, 1):  # points in the image
        assert pictures.edges_in_depth(np.ones((few, 2)), np.ones(few), np.ones(few, bool), 400) == []


# -----------------------------------------------------------------------------
# pictures of one frame


def test_a_frame_without_points_in_its_image_is_drawn(tmp_path):
    """Where a window (--crop, --shift) shows the sky alone."""
    behind = torch.rand(1, 20, 4) * torch.tensor([1.0, 1, -1, 1]) - torch.tensor([0.0, 0, 1, 0])
    view = {"image": torch.zeros(1, 3, 64, 160), "alpha": behind, "lidar2img": torch.eye(3, 4)[None]}
    said = pictures.draw_projection(view, tmp_path / "p.png", "a frame", things=0.0)
    assert said == "20 points, none in the image" and (tmp_path / "p.png").exists()


def test_branches_that_are_not_there(tmp_path, model_and_view):
    """Half of features.png is left out, and similarity.png compares points with points; both are said."""
    model, view = model_and_view
    found = pictures.embed(model, view)
    match_places = lambda alpha, beta: np.arange(len(alpha))
    draw = lambda found: pictures.draw_features(view, found, tmp_path / "f.png", "a frame", match_places)
    whole = draw(found)
    tall = Image.open(tmp_path / "f.png").height
    inter, intra = whole.split("; intra: ")
    for gone, said in (("point", f"intra: {intra}; no inter-modal"), ("alpha", f"{inter}; no intra-modal")):
        half = {key: value for key, value in found.items() if key != gone}
        assert draw(half) == f"{said} branch in this checkpoint, no picture of it"
        assert Image.open(tmp_path / "f.png").height < 0.7 * tall
    half = {key: value for key, value in found.items() if key not in ("point", "pixel", "grid")}
    said = pictures.draw_similarity(view, half, tmp_path / "s.png", 3, "a frame")
    assert said == "no inter-modal branch in this checkpoint: points against points"
    assert colourful(tmp_path / "s.png").mean() > 0.005


# -----------------------------------------------------------------------------
# depth maps


@pytest.mark.parametrize("share", [0.05, 0.9, 0.0])
def test_picture_of_depth(tmp_path, share):
    """Four panels, sparse ground truth as dots large enough to fill much of theirs. What was measured is said."""
    rng = np.random.default_rng(0)
    full = np.linspace(40, 4, 96)[:, None] * np.ones((96, 200))
    truth = full * (rng.random(full.shape) < share)
    grey = np.full((96, 200, 3), 128, np.uint8)
    said = pictures.draw_depth(grey, 1.1 * full, truth, tmp_path / "d.png", "one")
    coloured = colourful(tmp_path / "d.png")
    height, width = coloured.shape
    assert width == 1600
    upper, lower = coloured[: height // 2], coloured[height // 2 :]
    left, right = slice(width // 2 - 60), slice(width // 2, -200)  # without the bars
    image, error, prediction, known = (
        part.mean() for part in (upper[:, left], upper[:, right], lower[:, left], lower[:, right])
    )
    assert image < 0.01 and prediction > 0.6
    if share:
        found = f"{(truth > 0).sum()} pixels with ground truth, {100 * (truth > 0).mean():.1f} % of all"
        assert said.startswith(f"{found}: 10.0 % off on average")
        assert error > 0.4 and known > 0.4
    else:
        assert said == "0 pixels with ground truth, 0.0 % of all: no ground truth to compare with"
        assert error < 0.01 and known < 0.01


def test_picture_says_where_a_prediction_is_missing(tmp_path):
    truth, image = np.full((30, 50), 5.0), np.zeros((30, 50, 3))
    prediction = truth.copy()
    prediction[:3, :4] = np.nan
    prediction[0, 0] = np.inf
    prediction[10] *= 1.5  # 50 of the 1488 that are left
    said = pictures.draw_depth(image, prediction, truth, tmp_path / "d.png", "one", high=80)
    assert said.startswith("1488 pixels") and ": 1.7 % off on average, 0.0 % at the median;" in said
    assert said.endswith("prediction NaN or infinite at 12")
    with pytest.raises(BadInput, match="^one: prediction is 30 x 49 .* ground truth 30 x 50;"):
        pictures.draw_depth(image, prediction[:, 1:], truth, tmp_path / "e.png", "one")
    assert not (tmp_path / "e.png").exists()


def test_words_on_an_image_cover_no_others():
    """Two that would lie over each other: the second is left out, and takes no room. Beside and below there is room."""
    room = pictures_boxes.Room(100)
    assert [room.take(*at) for at in ((10, 50), (60, 55), (65, 66), (75, 50))] == [True, False, True, True]
