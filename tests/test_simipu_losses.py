"""Eq. 4 and Eq. 7 against a direct transcription, what may flow where, and every documented flag."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import data
import data_kitti
import ops_triton as ops
import simipu
from simipu import Config

TINY = Config(
    num_points=1024,
    places=32,
    image_encoder="resnet18",
    point_hidden=16,
    image_hidden=16,
    embed_dim=8,
    image_scale=(160, 64),
    batch_size=2,
    group=2,
)


def tiny(**changes):
    return dataclasses.replace(TINY, **changes)


def build(c, seed=0):
    torch.manual_seed(seed)
    return simipu.SimIPU(c).train()


class Learned(NamedTuple):
    """What one backward pass left in a model."""

    loss: float
    stats: dict
    norms: dict
    """Norm of the gradient of each part of the model; None where no parameter of the part has one."""
    model: simipu.SimIPU


def gradients(c, view):
    """-> Learned, of a new model. Models of equal shapes start from equal weights."""
    model = build(c)
    loss, stats = model(view)
    loss.backward()
    norms = {}
    for name, part in model.named_children():
        grads = [p.grad.norm() for p in part.parameters() if p.grad is not None]
        norms[name] = torch.stack(grads).norm().item() if grads else None
    return Learned(loss.item(), stats, norms, model)


@pytest.fixture(scope="module")
def view(scenes):
    """Two augmented frames, as one batch."""
    frames = data.PretrainFrames(data_kitti.find_frames(scenes), TINY)
    batch = data.collate([frames[(0, i)] for i in range(2)])
    return data.augment(batch, TINY.image_scale, "cpu")


@pytest.fixture(scope="module")
def base(view):
    """What TINY, with no flag changed, learns: for reading alone, by many tests."""
    return gradients(TINY, view)


# -----------------------------------------------------------------------------
# InfoNCE


def transcription(query, key, tau):
    """-1/n sum_i log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) ), pair by pair, in float64."""
    q = [v / np.sqrt((v**2).sum()) for v in query.detach().double().numpy()]
    k = [v / np.sqrt((v**2).sum()) for v in key.detach().double().numpy()]
    terms = []
    for i in range(len(q)):
        positive = math.exp(q[i] @ k[i] / tau)
        everything = sum(math.exp(q[i] @ k[j] / tau) for j in range(len(k)))
        terms.append(math.log(positive / everything))
    return -np.mean(terms)


def test_info_nce_equals_the_equation():
    q, k = torch.randn(40, 12), torch.randn(40, 12)
    k[:20] = q[:20] + 0.3 * k[:20]
    loss, stats = simipu.info_nce(q, k, 0.07)
    assert abs(loss.item() - transcription(q, k, 0.07)) < 1e-5
    cosines = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(k, dim=1).T
    hits = cosines.argmax(1) == torch.arange(40)
    others = cosines[~torch.eye(40, dtype=torch.bool)]
    assert stats["top1"].item() == pytest.approx(hits.float().mean().item())
    assert 0.4 < stats["top1"].item() < 0.9
    assert stats["positive"].item() == pytest.approx(cosines.diagonal().mean().item(), abs=1e-6)
    assert stats["negative"].item() == pytest.approx(others.mean().item(), abs=1e-6)
    assert stats["chance"].item() == pytest.approx(math.log(40))


def test_random_features_score_chance_and_collapsed_ones_no_top1():
    torch.manual_seed(0)
    loss, stats = simipu.info_nce(torch.randn(4096, 128), torch.randn(4096, 128), 1.0)
    assert stats["chance"].item() == pytest.approx(8.318, abs=1e-3)
    assert loss.item() == pytest.approx(8.318, abs=0.02)
    assert stats["std"].item() == pytest.approx(1, abs=0.01)
    assert stats["rank"] > 120
    loss, stats = simipu.info_nce(torch.ones(64, 8), torch.ones(64, 8), 0.07)
    assert loss.item() == pytest.approx(math.log(64), abs=1e-4)
    assert stats["top1"] == 0
    assert stats["std"].item() == pytest.approx(0, abs=1e-6)
    assert stats["rank"].item() == stats["key_rank"].item() == pytest.approx(1, abs=1e-6)


def test_effective_rank():
    """It is what numpy's singular values give; d equal directions are d dimensions. report=False leaves out the stats
    and changes nothing else.
    """
    torch.manual_seed(0)
    z = torch.randn(300, 16) * torch.linspace(0.1, 2, 16)
    s = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = s / s.sum()
    entropy = -(p * np.log(p)).sum()
    assert simipu.effective_rank(z).item() == pytest.approx(np.exp(entropy), rel=1e-6)
    five = torch.eye(16)[:5].repeat(7, 1)
    assert simipu.effective_rank(five).item() == pytest.approx(5, rel=1e-3)
    q, k = torch.randn(50, 16), torch.randn(50, 16)
    loss, stats = simipu.info_nce(q, k, 0.07, report=False)
    assert stats == {}
    assert torch.equal(loss, simipu.info_nce(q, k, 0.07)[0])


def test_half_precision_features_are_compared_in_float32():
    q, k = torch.randn(50, 16), torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = simipu.info_nce(q, k, 0.07)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - transcription(q, k, 0.07)) < 1e-5


# -----------------------------------------------------------------------------
# the model's losses, and what each of them teaches


@torch.no_grad()
def embeddings(model, view):
    """What the losses compare, step by step as the paper says it, from the parts of the model: f_alpha, f_beta (Eq. 4),
    f_alpha, f_gamma (Eq. 7).
    """
    c, B = model.c, len(view["alpha"])
    height, width = view["image"].shape[2:]
    places, features = model.pts_backbone(torch.cat([view["alpha"], view["beta"]]))
    z = model.mlp_intro_points(features.flatten(0, 1)).view(2 * B, c.places, -1)
    f_alpha, f_beta, rows, gamma = [], [], [], []
    feature_map = model.img_backbone(view["image"])[-1]
    for b in range(B):
        T = view["T"][b].double().numpy()
        alpha_seen_by_beta = places[b].double().numpy() @ T[:3, :3].T + T[:3, 3]
        beta = places[B + b].double().numpy()
        partner = torch.from_numpy(simipu.match_places(alpha_seen_by_beta, beta, c.matching))
        f_alpha.append(z[b])
        f_beta.append(z[B + b][partner])
        uv, depth = data.project(places[b], view["lidar2img"][b])
        inside = data.inside_image(uv, depth, width, height)
        sampled = ops.bilinear_sample(feature_map[b : b + 1], uv[None] / 32)[0]
        rows.append(features[b][inside])
        gamma.append(sampled[inside])
    f_point = model.mlp_cross_points(torch.cat(rows))
    f_image = model.mlp_cross_img(torch.cat(gamma))
    return torch.cat(f_alpha), torch.cat(f_beta), f_point, f_image


@pytest.mark.parametrize("crop", [False, True])
def test_model_losses_equal_the_equations(view, crop):
    """With `crop` the image has moved, so that a third of the places fall outside. Those pairs leave Eq. 7, and only
    that.
    """
    if crop:
        moved = torch.tensor([[1.0, 0, 50], [0, 1, 10], [0, 0, 1]])
        view = dict(view, lidar2img=moved @ view["lidar2img"])
    model = build(TINY)
    loss, stats = model(view)
    # in training, batch norm looks at nothing but the batch: a second pass through the same model repeats the first
    f_alpha, f_beta, f_point, f_image = embeddings(model, view)
    assert stats["intra"].item() == pytest.approx(transcription(f_alpha, f_beta, 0.07), abs=2e-4)
    assert stats["inter"].item() == pytest.approx(transcription(f_point, f_image, 0.07), abs=2e-4)
    assert loss.item() == pytest.approx(stats["intra"].item() + stats["inter"].item(), abs=1e-5)
    assert stats["inter_chance"].item() == pytest.approx(math.log(len(f_point)))
    if crop:
        assert len(f_point) < 60
        assert stats["visible"] < 0.95
    else:
        assert len(f_point) == 64
        assert stats["visible"] == 1


def test_inter_loss_teaches_no_points_and_intra_loss_no_image(view, base):
    inter = gradients(tiny(intra_weight=0.0), view)
    assert inter.norms["pts_backbone"] is None
    assert inter.norms["img_backbone"] > 0
    assert inter.norms["mlp_cross_points"] > 0
    assert inter.norms["mlp_cross_img"] > 0
    assert "mlp_intro_points" not in inter.norms
    assert "intra" not in inter.stats
    intra = gradients(tiny(inter_weight=0.0), view)
    assert intra.norms["pts_backbone"] > 0
    assert intra.norms["mlp_intro_points"] > 0
    assert "img_backbone" not in intra.norms
    assert "inter" not in intra.stats
    # and in the full model the point encoder's gradient is the intra loss's alone
    alone = build(TINY)
    alone.c = tiny(inter_weight=0.0)
    alone(view)[0].backward()
    both = dict(base.model.pts_backbone.named_parameters())
    for name, p in alone.pts_backbone.named_parameters():
        torch.testing.assert_close(p.grad, both[name].grad, rtol=1e-3, atol=1e-6)


def test_weights_scale_their_loss(view, base):
    weighed = gradients(tiny(intra_weight=2.0, inter_weight=0.5), view)
    expected = 2 * base.stats["intra"].item() + 0.5 * base.stats["inter"].item()
    assert weighed.loss == pytest.approx(expected, abs=1e-4)
    assert weighed.norms["pts_backbone"] == pytest.approx(2 * base.norms["pts_backbone"], rel=1e-2)
    assert weighed.norms["img_backbone"] == pytest.approx(0.5 * base.norms["img_backbone"], rel=1e-2)


def test_detach_keys_changes_gradients_of_the_intra_loss_and_nothing_else(view, base):
    cut = gradients(tiny(detach_keys=True), view)
    assert cut.loss == pytest.approx(base.loss, abs=1e-6)
    assert cut.norms["pts_backbone"] > 0
    change = abs(cut.norms["pts_backbone"] - base.norms["pts_backbone"])
    assert change > 0.02 * base.norms["pts_backbone"]
    assert cut.norms["img_backbone"] == pytest.approx(base.norms["img_backbone"], rel=1e-3)


def test_inter_query_image_is_the_releases_loss(view, base):
    image = gradients(tiny(inter_query="image"), view)
    _, _, f_point, f_image = embeddings(base.model, view)
    assert image.stats["inter"].item() == pytest.approx(transcription(f_image, f_point, 0.07), abs=2e-4)
    assert image.stats["inter"].item() != pytest.approx(base.stats["inter"].item(), abs=1e-4)
    assert image.stats["intra"].item() == pytest.approx(base.stats["intra"].item(), abs=1e-5)
    assert image.norms["img_backbone"] > 0
    # the point head stays as it was drawn
    assert image.norms["mlp_cross_points"] is None
    learning = owned(simipu.build_optimizers(image.model, image.model.c))
    assert not any(id(p) in learning for p in image.model.mlp_cross_points.parameters())


def test_stages_that_eq_7_compares(view):
    """Strides 16 and 32, side by side, each sampled at its own stride."""
    model = build(tiny(inter_stages=(3, 4)))
    assert model.mlp_cross_img.layer1[0].in_features == 256 + 512
    maps = [torch.randn(2, 4, 64 // s, 160 // s) for s in (2, 4, 8, 16, 32)]
    uv = torch.rand(2, 7, 2) * torch.tensor([159.0, 63.0])
    by_hand = [ops.bilinear_sample(m, uv / s) for m, s in ((maps[3], 16), (maps[4], 32))]
    assert torch.equal(model.at_pixels(maps, uv), torch.cat(by_hand, -1))
    assert gradients(tiny(inter_stages=(2,)), view).norms["img_backbone"] > 0


def test_temperature_and_matching_do_what_they_say(view, base):
    warm = gradients(tiny(temperature=1000.0), view).stats
    assert warm["intra"].item() == pytest.approx(warm["intra_chance"].item(), abs=1e-2)
    assert warm["intra_top1"] == base.stats["intra_top1"]
    assert warm["inter_top1"] == base.stats["inter_top1"]
    greedy = gradients(tiny(matching="greedy"), view).stats
    assert greedy["match_m"] > base.stats["match_m"]
    assert greedy["inter"].item() == pytest.approx(base.stats["inter"].item(), abs=1e-4)


def test_matching_begins_before_places_are_described(view, monkeypatch):
    """Or threads would have less than both encoders' time to match in."""
    model, order = build(tiny()), []

    def noted(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (order.append(name), function(*args))[1])

    noted(model, "match")
    noted(model.pts_backbone, "describe")
    noted(model.img_backbone, "forward")
    model(view)
    assert order == ["match", "describe", "forward"]


def shapes_outside_point_encoder(model):
    return {n: p.shape for n, p in model.named_parameters() if not n.startswith("pts_backbone.SA_modules")}


def test_use_xyz_changes_the_point_encoder_only(view, base):
    placed = gradients(tiny(use_xyz=True), view)
    assert all(sa.grouped for sa in placed.model.pts_backbone.SA_modules)
    assert placed.norms["pts_backbone"] > 0
    assert shapes_outside_point_encoder(placed.model) == shapes_outside_point_encoder(base.model)
    assert placed.stats["intra"].item() != pytest.approx(base.stats["intra"].item(), abs=1e-4)


def owned(optimizers):
    """The id of each parameter that an optimiser has, once for each time that one has it."""
    return [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intra_weight": 0.0},
        {"inter_weight": 0.0},
        {"inter_query": "image"},
        {"use_xyz": True},
        {"inter_stages": (3, 4)},
        {"image_optimizer": "adamw"},
    ],
)
def test_every_parameter_learns_in_exactly_one_optimizer(view, changes):
    model = gradients(tiny(**changes), view).model
    optimizers = simipu.build_optimizers(model, model.c)
    ids = owned(optimizers)
    assert len(ids) == len(set(ids))
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in ids) == p.requires_grad, name
    points = {id(p) for p in model.pts_backbone.parameters()}
    for optimizer in optimizers:
        kinds = {id(p) in points for g in optimizer.param_groups for p in g["params"]}
        of_points = isinstance(optimizer, torch.optim.AdamW)
        assert kinds == {of_points} or changes.get("image_optimizer") == "adamw"


# -----------------------------------------------------------------------------
# V7: places that coincide


def test_coinciding_places_have_one_number():
    one = [[0.0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]]
    other = [[0.0, 0, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]]
    assert simipu.coinciding(torch.tensor([one, other])).tolist() == [[0, 1, 0, 3], [4, 5, 5, 5]]


def test_a_tie_with_a_twin_is_a_success_and_dropped_twins_are_no_candidates():
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(5, 8, generator=g, dtype=torch.float64), dim=1)
    rows = torch.cat([rows, rows[:2]])  # rows 5 and 6 are of the same places as 0 and 1
    spot = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    _, alone = simipu.info_nce(rows, rows, 0.07)
    _, known = simipu.info_nce(rows, rows, 0.07, spot=spot)
    assert alone["top1"].item() == pytest.approx(3 / 7)
    assert known["top1"].item() == 1
    loss, _ = simipu.info_nce(rows, rows, 0.07, spot=spot, drop_twins=True)
    logits = rows @ rows.T / 0.07
    by_hand = []
    for i in range(7):
        candidates = [j for j in range(7) if j == i or spot[j] != spot[i]]
        by_hand.append(torch.logsumexp(logits[i, candidates], 0) - logits[i, i])
    assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-6)
    assert loss < simipu.info_nce(rows, rows, 0.07)[0]


def test_collapsed_features_still_score_0():
    same = torch.ones(6, 4)
    _, stats = simipu.info_nce(same, same, 0.07, spot=torch.tensor([0, 0, 1, 2, 3, 4]))
    assert stats["top1"] == 0


def test_twins_are_counted(view, base):
    assert 0 < base.stats["twins"] < 0.6
    dropped, _ = build(tiny(drop_twins=True))(view)
    assert dropped.item() < base.loss
