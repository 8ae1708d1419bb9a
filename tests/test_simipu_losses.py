"""Eq. 4 and Eq. 7 against a direct transcription, what may flow where, and every documented flag."""

import dataclasses
import math

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


@pytest.fixture(scope="module")
def view(scenes):
    frames = data.PretrainFrames(data_kitti.find_frames(scenes), TINY)
    return data.augment(data.collate([frames[(0, i)] for i in range(2)]), TINY.image_scale, "cpu")


def transcription(query, key, tau):
    """-1/n sum_i log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) ), pair by pair, in float64."""
    q = [v / np.sqrt((v**2).sum()) for v in query.detach().double().numpy()]
    k = [v / np.sqrt((v**2).sum()) for v in key.detach().double().numpy()]
    return -np.mean(
        [
            math.log(math.exp(q[i] @ k[i] / tau) / sum(math.exp(q[i] @ k[j] / tau) for j in range(len(k))))
            for i in range(len(q))
        ]
    )


def test_info_nce_equals_the_equation():
    q, k = torch.randn(40, 12), torch.randn(40, 12)
    k[:20] = q[:20] + 0.3 * k[:20]
    loss, stats = simipu.info_nce(q, k, 0.07)
    assert abs(loss.item() - transcription(q, k, 0.07)) < 1e-5
    logits = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(k, dim=1).T
    assert stats["top1"].item() == pytest.approx((logits.argmax(1) == torch.arange(40)).float().mean().item())
    assert 0.4 < stats["top1"].item() < 0.9
    assert stats["positive"].item() == pytest.approx(logits.diagonal().mean().item(), abs=1e-6)
    assert stats["negative"].item() == pytest.approx(logits[~torch.eye(40, dtype=torch.bool)].mean().item(), abs=1e-6)
    assert stats["chance"].item() == pytest.approx(math.log(40))


def test_random_features_score_chance_and_collapsed_ones_no_top1():
    torch.manual_seed(0)
    loss, stats = simipu.info_nce(torch.randn(4096, 128), torch.randn(4096, 128), 1.0)
    assert stats["chance"].item() == pytest.approx(8.318, abs=1e-3) and loss.item() == pytest.approx(8.318, abs=0.02)
    assert stats["std"].item() == pytest.approx(1, abs=0.01) and stats["rank"] > 120
    loss, stats = simipu.info_nce(torch.ones(64, 8), torch.ones(64, 8), 0.07)
    assert (
        loss.item() == pytest.approx(math.log(64), abs=1e-4)
        and stats["top1"] == 0
        and stats["std"].item() == pytest.approx(0, abs=1e-6)
    )
    assert stats["rank"].item() == stats["key_rank"].item() == pytest.approx(1, abs=1e-6)


def test_effective_rank():
    """By numpy's singular values; d equal directions are d dimensions; and report=False changes nothing but the
    stats.
    """
    torch.manual_seed(0)
    z = torch.randn(300, 16) * torch.linspace(0.1, 2, 16)
    s = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert simipu.effective_rank(z).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert simipu.effective_rank(torch.eye(16)[:5].repeat(7, 1)).item() == pytest.approx(5, rel=1e-3)
    q, k = torch.randn(50, 16), torch.randn(50, 16)
    assert simipu.info_nce(q, k, 0.07, report=False)[1] == {}
    assert torch.equal(simipu.info_nce(q, k, 0.07, report=False)[0], simipu.info_nce(q, k, 0.07)[0])


def test_half_precision_features_are_compared_in_float32():
    q, k = torch.randn(50, 16), torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = simipu.info_nce(q, k, 0.07)
    assert loss.dtype == torch.float32 and abs(loss.item() - transcription(q, k, 0.07)) < 1e-5


def embeddings(model, view):
    """What the losses compare, step by step as the paper says it, from the parts of the model: f_alpha, f_beta (Eq. 4),
    f_alpha, f_gamma (Eq. 7).
    """
    c, B = model.c, len(view["alpha"])
    places, features = model.pts_backbone(torch.cat([view["alpha"], view["beta"]]))
    z = model.mlp_intro_points(features.flatten(0, 1)).view(2 * B, c.places, -1)
    f_alpha, f_beta, rows, gamma = [], [], [], []
    feature_map = model.img_backbone(view["image"])[-1]
    for b in range(B):
        T = view["T"][b].double().numpy()
        a = places[b].double().numpy() @ T[:3, :3].T + T[:3, 3]
        partner = simipu.match_places(a, places[B + b].double().numpy(), c.matching)
        f_alpha.append(z[b])
        f_beta.append(z[B + b][torch.from_numpy(partner)])
        uv, depth = data.project(places[b], view["lidar2img"][b])
        inside = data.inside_image(uv, depth, *view["image"].shape[:1:-1])
        rows.append(features[b][inside].detach())
        gamma.append(ops.bilinear_sample(feature_map[b : b + 1], uv[None] / 32)[0][inside])
    return (
        torch.cat(f_alpha),
        torch.cat(f_beta),
        model.mlp_cross_points(torch.cat(rows)),
        model.mlp_cross_img(torch.cat(gamma)),
    )


@pytest.mark.parametrize("crop", [False, True])
def test_model_losses_equal_the_equations(view, crop):
    """With `crop` the image has moved, so that a third of the places fall outside: those pairs leave Eq. 7, and only
    that.
    """
    if crop:
        view = dict(view, lidar2img=torch.tensor([[1.0, 0, 50], [0, 1, 10], [0, 0, 1]]) @ view["lidar2img"])
    model = build(TINY)
    loss, stats = model(view)
    model = build(TINY)  # batch norm's running statistics have moved; weights are the same
    f_alpha, f_beta, f_point, f_image = embeddings(model, view)
    assert stats["intra"].item() == pytest.approx(transcription(f_alpha, f_beta, 0.07), abs=2e-4)
    assert stats["inter"].item() == pytest.approx(transcription(f_point, f_image, 0.07), abs=2e-4)
    assert loss.item() == pytest.approx(stats["intra"].item() + stats["inter"].item(), abs=1e-5)
    assert stats["inter_chance"].item() == pytest.approx(math.log(len(f_point)))
    assert (len(f_point) < 60 and stats["visible"] < 0.95) if crop else (len(f_point) == 64 and stats["visible"] == 1)


def gradients(c, view):
    """loss, stats, and which part of the model got how much gradient (norm; None for no gradient at all)."""
    model = build(c)
    loss, stats = model(view)
    loss.backward()
    norms = {}
    for name, part in model.named_children():
        grads = [p.grad.norm() for p in part.parameters() if p.grad is not None]
        norms[name] = torch.stack(grads).norm().item() if grads else None
    return loss.item(), stats, norms, model


def test_inter_loss_teaches_no_points_and_intra_loss_no_image(view):
    _, stats, grads, _ = gradients(tiny(intra_weight=0.0), view)
    assert (
        grads["pts_backbone"] is None
        and grads["img_backbone"] > 0
        and grads["mlp_cross_points"] > 0
        and grads["mlp_cross_img"] > 0
    )
    assert "mlp_intro_points" not in grads and "intra" not in stats
    _, stats, grads, _ = gradients(tiny(inter_weight=0.0), view)
    assert grads["pts_backbone"] > 0 and grads["mlp_intro_points"] > 0
    assert "img_backbone" not in grads and "inter" not in stats
    # and in the full model the point encoder's gradient is the intra loss's alone
    both, alone = build(TINY), build(TINY)
    both(view)[0].backward()
    rich = dict(both.named_parameters())
    alone.c = tiny(inter_weight=0.0)
    alone(view)[0].backward()
    for name, p in alone.pts_backbone.named_parameters():
        torch.testing.assert_close(p.grad, rich["pts_backbone." + name].grad, rtol=1e-3, atol=1e-6)


def test_weights_scale_their_loss(view):
    base, stats, grads, _ = gradients(TINY, view)
    loss, _, double, _ = gradients(tiny(intra_weight=2.0, inter_weight=0.5), view)
    assert loss == pytest.approx(2 * stats["intra"].item() + 0.5 * stats["inter"].item(), abs=1e-4)
    assert double["pts_backbone"] == pytest.approx(2 * grads["pts_backbone"], rel=1e-2)
    assert double["img_backbone"] == pytest.approx(0.5 * grads["img_backbone"], rel=1e-2)


def test_detach_keys_changes_gradients_of_the_intra_loss_and_nothing_else(view):
    loss, _, grads, _ = gradients(TINY, view)
    loss_cut, _, cut, _ = gradients(tiny(detach_keys=True), view)
    assert loss_cut == pytest.approx(loss, abs=1e-6)
    assert cut["pts_backbone"] > 0 and abs(cut["pts_backbone"] - grads["pts_backbone"]) > 0.02 * grads["pts_backbone"]
    assert cut["img_backbone"] == pytest.approx(grads["img_backbone"], rel=1e-3)


def test_inter_query_image_is_the_releases_loss(view):
    _, stats, grads, model = gradients(tiny(inter_query="image"), view)
    _, base, _, _ = gradients(TINY, view)
    _, _, f_point, f_image = embeddings(build(TINY), view)
    assert stats["inter"].item() == pytest.approx(transcription(f_image, f_point, 0.07), abs=2e-4)
    assert stats["inter"].item() != pytest.approx(base["inter"].item(), abs=1e-4)
    assert stats["intra"].item() == pytest.approx(base["intra"].item(), abs=1e-5)
    assert grads["mlp_cross_points"] is None and grads["img_backbone"] > 0  # the point head stays as it was drawn
    learning = {id(p) for o in simipu.build_optimizers(model, model.c) for g in o.param_groups for p in g["params"]}
    assert not any(id(p) in learning for p in model.mlp_cross_points.parameters())


def test_temperature_and_matching_do_what_they_say(view):
    _, base, _, _ = gradients(TINY, view)
    _, warm, _, _ = gradients(tiny(temperature=1000.0), view)
    assert warm["intra"].item() == pytest.approx(warm["intra_chance"].item(), abs=1e-2)
    assert warm["intra_top1"] == base["intra_top1"] and warm["inter_top1"] == base["inter_top1"]
    _, greedy, _, _ = gradients(tiny(matching="greedy"), view)
    assert greedy["match_m"] > base["match_m"] and greedy["inter"].item() == pytest.approx(
        base["inter"].item(), abs=1e-4
    )


def test_use_xyz_changes_the_point_encoder_only(view):
    _, base, _, plain = gradients(TINY, view)
    _, stats, grads, model = gradients(tiny(use_xyz=True), view)
    assert all(sa.grouped for sa in model.pts_backbone.SA_modules) and grads["pts_backbone"] > 0
    shapes = lambda m: {n: p.shape for n, p in m.named_parameters() if not n.startswith("pts_backbone.SA_modules")}
    assert shapes(model) == shapes(plain) and stats["intra"].item() != pytest.approx(base["intra"].item(), abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intra_weight": 0.0},
        {"inter_weight": 0.0},
        {"inter_query": "image"},
        {"use_xyz": True},
        {"image_optimizer": "adamw"},
    ],
)
def test_every_parameter_learns_in_exactly_one_optimizer(view, changes):
    _, _, _, model = gradients(tiny(**changes), view)
    optimizers = simipu.build_optimizers(model, model.c)
    owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(owned) == len(set(owned))
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (id(p) in owned) == p.requires_grad, name
    points = {id(p) for p in model.pts_backbone.parameters()}
    for optimizer in optimizers:
        kinds = {id(p) in points for g in optimizer.param_groups for p in g["params"]}
        assert kinds == {isinstance(optimizer, torch.optim.AdamW)} or changes.get("image_optimizer") == "adamw"


# -----------------------------------------------------------------------------
# V7: places that coincide


def test_coinciding_places_have_one_number():
    places = torch.tensor(
        [[[0.0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1]], [[0.0, 0, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]]]
    )
    assert simipu.coinciding(places).tolist() == [[0, 1, 0, 3], [4, 5, 5, 5]]


def test_a_tie_with_a_twin_is_a_success_and_dropped_twins_are_no_candidates():
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(5, 8, generator=g, dtype=torch.float64), dim=1)
    rows = torch.cat([rows, rows[:2]])  # rows 5 and 6 are of the same places as 0 and 1
    spot = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    _, alone = simipu.info_nce(rows, rows, 0.07)
    _, known = simipu.info_nce(rows, rows, 0.07, spot=spot)
    assert alone["top1"].item() == pytest.approx(3 / 7) and known["top1"].item() == 1
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


def test_twins_are_counted(view):
    _, stats = build(TINY)(view)
    assert 0 < stats["twins"] < 0.6
    loss, _ = build(tiny(drop_twins=True))(view)
    assert loss < build(TINY)(view)[0]
