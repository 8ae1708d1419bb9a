"""Pairs of places: optimal, exact where the views hold the same points, greedy as the paper's ablation."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

import data
import data_kitti
import ops_triton as ops
import simipu


def rotation(seed):
    rng, center = np.random.default_rng(seed), data_kitti.RIG.center
    return data.random_view(rng, center, 90.0, (0.75, 1.25), (0.0, 0.0, 0.0), bool(seed % 2))


def places_of_two_views(frame, places=256, num_points=4096, seed=0):
    """What training matches: farthest points of two shuffles of one sweep, the second seen through T in float32."""
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(data.load_frame(frame, num_points, rng)["points"])[None]
    T = torch.from_numpy(rotation(seed)).float()[None]
    beta = data.transform(points, T)[:, rng.permutation(num_points)]
    a, b = (p[..., :3].contiguous() for p in (points, beta))
    a, b = (p.gather(1, ops.furthest_point_sample(p, places)[..., None].expand(-1, -1, 3)) for p in (a, b))
    return a, b, T


def in_betas_frame(a, b, T):
    T = T[0].double().numpy()
    return a[0].double().numpy() @ T[:3, :3].T + T[:3, 3], b[0].double().numpy()


def total(a, b, partner):
    assert sorted(partner) == list(range(len(a))), "not a permutation"
    return np.linalg.norm(a - b[partner], axis=1).sum()


def check_optimal(frames):
    coincide = []
    for seed, frame in enumerate(frames):
        a, b = in_betas_frame(*places_of_two_views(frame, seed=seed))
        partner = simipu.match_places(a, b)
        cost = cdist(a, b)
        best = cost[linear_sum_assignment(cost)].sum()
        assert best - 1e-9 <= total(a, b, partner) <= best + 1e-4
        assert total(a, b, simipu.match_places(a, b, "greedy")) > best + 1
        coincide.append((cost.min(1) < simipu.COINCIDE).mean())
    assert 0.05 < np.mean(coincide) < 0.9  # else this test would not exercise dropping them first


def test_total_cost_is_optimal_on_built_in_scenes(scenes):
    check_optimal(data_kitti.find_frames(scenes))


def test_total_cost_is_optimal_on_real_clouds(kitti):
    check_optimal(data_kitti.find_frames(kitti, ("train",))[:8])


def test_a_permutation_is_recovered_exactly():
    rng = np.random.default_rng(0)
    a, order = rng.uniform(-40, 40, (300, 3)), rng.permutation(300)
    T = rotation(1)
    b = (a @ T[:3, :3].T + T[:3, 3])[order]
    for method in ("hungarian", "greedy"):
        assert np.array_equal(order[simipu.match_places(a @ T[:3, :3].T + T[:3, 3], b, method)], np.arange(300))


def test_doubled_points_are_given_away_once():
    """Clouds sampled with replacement hold a point several times, in different numbers in the two views."""
    rng = np.random.default_rng(0)
    distinct = rng.uniform(0, 10, (20, 3))
    a, b = distinct[rng.integers(20, size=60)], distinct[rng.integers(20, size=60)]
    cost = cdist(a, b)
    assert abs(total(a, b, simipu.match_places(a, b)) - cost[linear_sum_assignment(cost)].sum()) < 1e-9


def test_greedy_orders_by_hand():
    a = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    b = np.array([[1.2, 0, 0], [-5, 0, 0], [1.9, 0, 0]])
    assert simipu.match_places(a, b, "rowwise").tolist() == [0, 2, 1]  # the second would rather have had 0, the third 2
    assert simipu.match_places(a, b, "greedy").tolist() == [1, 0, 2]  # 2 with 2, then 1 with 0, and what is left


def test_greedy_is_the_nearest_pair_first():
    """V14: against a plain loop over all pairs by rising cost; ties included, where the total is what is defined."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 17, 60):
        a, b = rng.normal(size=(2, size, 3))
        cost = cdist(a, b)
        partner, taken = np.full(size, -1), set()
        for i, j in sorted(np.ndindex(size, size), key=lambda pair: cost[pair]):
            if partner[i] < 0 and j not in taken:
                partner[i] = j
                taken.add(j)
        assert np.array_equal(simipu.match_places(a, b, "greedy"), partner)
    whole = rng.integers(0, 3, (2, 40, 3)).astype(float)  # places that coincide, and many equal distances
    found = simipu.match_places(*whole, "greedy")
    assert sorted(found) == list(range(40))
    order = [total(*whole, simipu.match_places(*whole, method)) for method in ("hungarian", "greedy")]
    assert order[0] <= order[1]


@pytest.mark.parametrize("method", ["hungarian", "greedy", "rowwise"])
def test_matching_in_the_background(scenes, method):
    """A batch, through the threads: the same pairs, distances in metres of view alpha whatever the scale of T, visible
    rows.
    """
    triples = [
        places_of_two_views(f, places=64, num_points=1024, seed=i)
        for i, f in enumerate(data_kitti.find_frames(scenes)[:3])
    ]
    a, b, T = (torch.cat(t) for t in zip(*triples))
    visible = torch.rand(3, 64) < 0.7
    partner, distance, rows = simipu.match_in_background(a, b, T, visible, method)()
    assert torch.equal(rows, visible.flatten().nonzero()[:, 0])
    for i, triple in enumerate(triples):
        x, y = in_betas_frame(*triple)
        assert np.array_equal(partner[i], simipu.match_places(x, y, method))
        back = np.linalg.inv(T[i].double().numpy())
        in_alpha = y @ back[:3, :3].T + back[:3, 3]
        np.testing.assert_allclose(
            distance[i], np.linalg.norm(a[i].double().numpy() - in_alpha[partner[i]], axis=1), atol=1e-6
        )
