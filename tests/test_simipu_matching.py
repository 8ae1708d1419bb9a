"""Matching of places: the least total distance, exact where two views hold the same points, and both greedy orders."""

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
    """A matrix (4, 4) that turns and scales as training does; odd seeds mirror, too."""
    rng = np.random.default_rng(seed)
    mirrored = seed % 2 == 1
    return data.random_view(rng, data_kitti.RIG.center, 90.0, (0.75, 1.25), (0.0, 0.0, 0.0), mirrored)


def farthest_points(points, places):
    """(B, N, 4) points -> (B, places, 3)"""
    xyz = points[..., :3].contiguous()
    index = ops.furthest_point_sample(xyz, places)
    return xyz.gather(1, index[..., None].expand(-1, -1, 3))


def places_of_two_views(frame, places=256, num_points=4096, seed=0):
    """What training matches: farthest points of two shuffles of one sweep, the second seen through T in float32."""
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(data.load_frame(frame, num_points, rng)["points"])[None]
    T = torch.from_numpy(rotation(seed)).float()[None]
    beta = data.transform(points, T)[:, rng.permutation(num_points)]
    return farthest_points(points, places), farthest_points(beta, places), T


def in_betas_frame(a, b, T):
    """The places of one frame's two views, both in the frame of view beta, in float64."""
    T = T[0].double().numpy()
    a, b = a[0].double().numpy(), b[0].double().numpy()
    return a @ T[:3, :3].T + T[:3, 3], b


def total(a, b, partner):
    assert sorted(partner) == list(range(len(a))), "not a permutation"
    return np.linalg.norm(a - b[partner], axis=1).sum()


def least_total(cost):
    return cost[linear_sum_assignment(cost)].sum()


def check_optimal(frames):
    coincide = []
    for seed, frame in enumerate(frames):
        a, b = in_betas_frame(*places_of_two_views(frame, seed=seed))
        cost = cdist(a, b)
        best = least_total(cost)
        hungarian = total(a, b, simipu.match_places(a, b))
        greedy = total(a, b, simipu.match_places(a, b, "greedy"))
        assert best - 1e-9 <= hungarian <= best + 1e-4
        assert greedy > best + 1
        coincide.append((cost.min(1) < simipu.COINCIDE).mean())
    assert 0.05 < np.mean(coincide) < 0.9  # else this test would not exercise dropping them first


def test_total_cost_is_optimal_on_built_in_scenes(scenes):
    check_optimal(data_kitti.find_frames(scenes))


def test_total_cost_is_optimal_on_real_clouds(kitti):
    check_optimal(data_kitti.find_frames(kitti, ("train",))[:8])


def test_a_permutation_is_recovered_exactly():
    rng = np.random.default_rng(0)
    a = rng.uniform(-40, 40, (300, 3))
    order = rng.permutation(300)
    T = rotation(1)
    turned = a @ T[:3, :3].T + T[:3, 3]
    for method in ("hungarian", "greedy"):
        partner = simipu.match_places(turned, turned[order], method)
        assert np.array_equal(order[partner], np.arange(300))


def test_doubled_points_are_given_away_once():
    """Clouds sampled with replacement hold a point several times, in different numbers in the two views."""
    rng = np.random.default_rng(0)
    distinct = rng.uniform(0, 10, (20, 3))
    a = distinct[rng.integers(20, size=60)]
    b = distinct[rng.integers(20, size=60)]
    found = total(a, b, simipu.match_places(a, b))
    assert abs(found - least_total(cdist(a, b))) < 1e-9


def test_greedy_orders_by_hand():
    a = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    b = np.array([[1.2, 0, 0], [-5, 0, 0], [1.9, 0, 0]])
    assert simipu.match_places(a, b, "rowwise").tolist() == [0, 2, 1]  # the second would rather have had 0, the third 2
    assert simipu.match_places(a, b, "greedy").tolist() == [1, 0, 2]  # 2 with 2, then 1 with 0, and what is left


def nearest_pair_first(cost):
    """A plain loop over all pairs by rising cost: a pair holds where neither side is taken yet."""
    size = len(cost)
    partner, taken = np.full(size, -1), set()
    for i, j in sorted(np.ndindex(size, size), key=lambda pair: cost[pair]):
        if partner[i] < 0 and j not in taken:
            partner[i] = j
            taken.add(j)
    return partner


def test_greedy_is_the_nearest_pair_first():
    """V14: the same pairs as a plain loop. Where distances are equal, only a permutation and its total are defined."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 17, 60):
        a, b = rng.normal(size=(2, size, 3))
        assert np.array_equal(simipu.match_places(a, b, "greedy"), nearest_pair_first(cdist(a, b)))
    a, b = rng.integers(0, 3, (2, 40, 3)).astype(float)  # places that coincide, and many equal distances
    greedy = simipu.match_places(a, b, "greedy")
    assert sorted(greedy) == list(range(40))
    hungarian = simipu.match_places(a, b, "hungarian")
    assert total(a, b, hungarian) <= total(a, b, greedy)


@pytest.mark.parametrize("method", ["hungarian", "greedy", "rowwise"])
def test_matching_in_the_background(scenes, method):
    """The threads give a batch the same pairs, and the rows that are visible. Distances are metres of view alpha,
    whatever the scale of T.
    """
    frames = data_kitti.find_frames(scenes)[:3]
    triples = [places_of_two_views(f, places=64, num_points=1024, seed=i) for i, f in enumerate(frames)]
    a, b, T = (torch.cat(parts) for parts in zip(*triples))
    visible = torch.rand(3, 64) < 0.7
    partner, distance, rows = simipu.match_in_background(a, b, T, visible, method)()
    assert torch.equal(rows, visible.flatten().nonzero()[:, 0])
    for i, triple in enumerate(triples):
        x, y = in_betas_frame(*triple)
        assert np.array_equal(partner[i], simipu.match_places(x, y, method))
        back = np.linalg.inv(T[i].double().numpy())
        b_in_alpha = y @ back[:3, :3].T + back[:3, 3]
        apart = a[i].double().numpy() - b_in_alpha[partner[i]]
        np.testing.assert_allclose(distance[i], np.linalg.norm(apart, axis=1), atol=1e-6)
