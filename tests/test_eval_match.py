"""Are the figures of matching and of the probe what they say? By hand, and on networks whose answers are known."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import data_kitti
import eval_match
import ops_triton as ops
import simipu

TINY = replace(
    simipu.PRESETS["demo"][1],
    places=32,
    num_points=512,
    image_scale=(160, 64),
    point_hidden=16,
    image_hidden=16,
    embed_dim=16,
)


@pytest.fixture(scope="module")
def frames(scenes):
    return data_kitti.find_frames(scenes, ["trainval"])


# -----------------------------------------------------------------------------
# frames as they are judged


def test_images_are_judged_in_their_rigs_box(frames):
    """V18: where training draws sizes from a range, the rig says what size images are judged at, not KITTI for all."""
    ranged = replace(TINY, image_scale=(640, 192, 2400, 720))
    wide = replace(data_kitti.RIG, box=(960, 640))
    assert eval_match.image_box(ranged, wide) == (960, 640)
    assert eval_match.image_box(ranged, data_kitti.RIG) == data_kitti.RIG.box
    assert eval_match.image_box(TINY, wide) == (160, 64)
    small = [replace(frame, rig=replace(frame.rig, box=(208, 200))) for frame in frames]  # of 416 x 128
    image = eval_match.Unseen(small, ranged, "cpu").batch([0])["image"]
    assert image.shape == (1, 3, 64, 224)  # 208 x 64, and padding to a multiple of 32


def test_frames_are_seen_alike_whatever_training_drew(frames):
    """Evaluation knows no crop, flip, jitter or seed of the run's."""
    wild = replace(TINY, seed=5, crop=(0.4, 0.6), flip=1.0, jitter=(0.4, 0.4, 0.4, 0.1), pairs="wrong")
    plain, odd = (eval_match.Unseen(frames, c, "cpu").batch([1, 2]) for c in (TINY, wild))
    assert all(torch.equal(plain[key], odd[key]) for key in plain)


def test_recalibrated_statistics_are_an_average():
    """Of batch norm, over all inputs alike, in a copy."""
    norm = torch.nn.BatchNorm1d(3)
    inputs = [torch.randn(50, 3) + k for k in range(4)]
    found = eval_match.recalibrated(norm, inputs)
    torch.testing.assert_close(found.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0))
    torch.testing.assert_close(found.running_var, torch.stack([x.var(0) for x in inputs]).mean(0))
    assert not found.training and norm.training and not norm.running_mean.any()


# -----------------------------------------------------------------------------
# matching


def test_ranks_and_cross_entropy_by_hand():
    """Unit vectors at angles, query at 0: a key's cosine falls with its angle."""
    at = lambda *degrees: torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])
    query, key = at(0, 0, 0, 0), 3 * at(10, 50, 30, 30)
    (beaten_by, best), entropy = eval_match.answers(query, key)
    # equals share a rank: 30 degrees is beaten by 10, and half by its equal
    np.testing.assert_allclose(beaten_by, [0, 100, 50, 50], atol=1e-4)
    assert best.tolist() == [1, 0, 0, 0]
    assert entropy[0].item() == pytest.approx(4 * math.log(4))
    cosines = torch.cos(torch.deg2rad(torch.tensor([10.0, 50, 30, 30])))
    by_hand = [-torch.log_softmax(sharpness * cosines, 0).sum() for sharpness in eval_match.SHARPNESS]
    np.testing.assert_allclose(entropy, by_hand, rtol=1e-5)


def test_twins_are_asked_once():
    places = torch.tensor([[3.0, 0, 0], [1, 0, 0], [3, 0, 0], [1, 0, 5], [1, 0, 0]])
    assert eval_match.distinct(places).tolist() == [0, 1, 3]


def frame_of(right, wrong):
    """A frame as `match_frame` gives it, of cosines (n, n) that are made up, all of its places at one pixel."""
    n = len(right)
    found = {"position": eval_match.Positions(torch.zeros(n, 3).double(), torch.ones(n, 15).double())}
    for which, cosine in (("right", right), ("wrong", wrong)):
        found[which] = eval_match.Answers(eval_match.ranks(cosine), eval_match.entropy_sums(cosine))
    return found


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.05])
def test_gain_of_a_known_network(scale):
    """Sure of one in four, three times of four rightly: at the best temperature its shares are 3/4 and thrice 1/12,
    whatever its cosines are multiplied by. With another's image it knows nothing.
    """
    sure = torch.eye(4)[[0, 1, 2, 0]] * scale
    figures = eval_match.match_figures({i: frame_of(sure, torch.zeros(4, 4)) for i in range(5)})
    entropy = -0.75 * math.log(3 / 4) - 0.25 * math.log(1 / 12)
    assert figures["chance"] == pytest.approx(math.log(4), abs=1e-4)
    assert figures["right_excess"] == pytest.approx(entropy - math.log(4), abs=2e-3)
    assert figures["gain"] == pytest.approx(math.log(4) - entropy, abs=2e-3)
    assert figures["gain_interval"] == [figures["gain"]] * 2 and figures["wrong_excess"] == 0  # frames are all alike
    assert figures["position_excess"] == pytest.approx(0, abs=1e-4)  # all pixels at one spot
    sums = figures["per_frame"]
    again = (np.sum(sums["wrong"]) - np.sum(sums["right"])) / np.sum(sums["places"])
    assert figures["gain"] == pytest.approx(again, abs=1e-4)


def test_a_frame_is_read_with_the_temperature_of_the_others():
    """Frame 0 is sure and right, frame 1 sure and wrong. The temperature that 1 asks for, none, is given to 0."""
    right, wrong = torch.eye(2), torch.eye(2).flip(0)
    found = {0: frame_of(right, right), 1: frame_of(wrong, wrong)}
    sums = eval_match.match_figures(found)["per_frame"]
    assert sums["right"][0] == pytest.approx(2 * math.log(2), abs=1e-4)
    assert sums["right"][1] > 20


def test_position_that_the_points_tell():
    """Where point features tell the fifth of the image, candidates are about as many as places in it. Features that
    tell nothing are no help, however many they are.
    """
    rng = torch.Generator().manual_seed(0)
    told, untold = [], []
    for _ in range(6):
        uv = torch.rand(150, 2, generator=rng) * torch.tensor([600.0, 200.0])
        noise = torch.randn(150, 16, generator=rng).double()
        constant, column = torch.ones(150, 1).double(), torch.nn.functional.one_hot(uv[:, 0].long() // 120, 5) * 4.0
        where = eval_match.positions(uv, 600, 200, 4)
        told.append(eval_match.Positions(torch.cat([constant, column], 1), where))
        untold.append(eval_match.Positions(torch.cat([constant, noise], 1), where))
    excess = lambda frames: eval_match.tempered([eval_match.position_entropies(frames)])[0].sum() / 900 - math.log(150)
    assert -math.log(5) - 0.05 < excess(told) < -0.8
    assert excess(untold) == pytest.approx(0, abs=0.02)


def test_advantage_is_over_places_and_frames():
    """Two seeds. A frame of ten places reads the right image a nat a place better than the control, one of thirty half
    a nat worse: together -.125, and no better than 1 nor worse than -.5 whatever frames are drawn.
    """
    run = lambda *right: {"per_frame": {"places": [10, 30], "right": list(right), "wrong": [0.0, 0.0]}}
    own, control = [run(18.0, 75.0), run(22.0, 75.0)], [run(30.0, 60.0), run(30.0, 60.0)]
    mean, low, high = eval_match.advantage(own, control)
    assert mean == pytest.approx(-0.125) and low == pytest.approx(-0.5) and high == pytest.approx(1.0)
    assert eval_match.advantage(control, own)[0] == pytest.approx(0.125)
    assert eval_match.advantage(own, own) == (0, 0, 0)


def key(image):
    """Tells images apart, whatever their layout in memory: a row of pixels."""
    return tuple(image[0, 40].tolist())


class Seer(torch.nn.Module):
    """A network whose answers are known. Points and pixels give their position in the image, and with `sees` also which
    frame they are of; without, each image adds noise of its own.
    """

    def __init__(self, c, sees):
        super().__init__()
        self.c, self.sees, self.frames, self.clouds = c, sees, {}, {}
        self.mlp_cross_points = self.mlp_cross_img = torch.nn.Identity()
        self.img_backbone = lambda image: self.see(image)

    def see(self, image):
        v, u = torch.meshgrid(torch.arange(0, image.shape[2], 4), torch.arange(0, image.shape[3], 4), indexing="ij")
        uv = torch.stack([u, v], -1)
        answers = torch.stack([self.answer(uv, self.frames[key(x)]) for x in image])
        if not self.sees:
            noise = [torch.Generator().manual_seed(self.frames[key(x)]) for x in image]
            answers += 0.3 * torch.stack([torch.randn(answers.shape[1:], generator=g) for g in noise])
        return [answers.permute(0, 3, 1, 2).contiguous()]

    def answer(self, uv, frame):
        """Positions as angles, so that near ones are alike; what is seen turns them."""
        angle = uv / torch.tensor([160.0, 64.0]) * 2.5 + (1.7 * frame if self.sees else 0.0)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def pts_backbone(self, views):
        places = views[:, : self.c.places, :3]
        lidar2img, frame = self.clouds[tuple(views[0, 0].tolist())]
        uv, _ = data.project(places, lidar2img)
        return places, self.answer(uv, frame)

    def at_pixels(self, maps, uv):
        return ops.bilinear_sample(maps[-1], uv / 4)


@pytest.mark.parametrize("count", [5, 8])
def test_processes_share_the_judging(frames, count):
    """Each takes its share, and the figures are those of one, to the last digit."""

    class Gathered(Exception):
        pass

    def stop(rows):
        raise Gathered(rows)

    torch.manual_seed(0)
    model, some, shares = simipu.SimIPU(TINY), frames[:count], []
    whole = eval_match.match(model, some, TINY, "cpu")
    for rank in (0, 1):
        with pytest.raises(Gathered) as gathered:
            eval_match.match(model, some, TINY, "cpu", SimpleNamespace(rank=rank, world=2, gather=stop))
        shares.append(gathered.value.args[0])
    judged = [[frame for frame, _ in share] for share in shares]
    assert sorted(judged[0] + judged[1]) == list(range(count)) and abs(len(judged[0]) - len(judged[1])) <= 2
    every = SimpleNamespace(rank=0, world=2, gather=lambda rows: shares[1] + rows)
    assert eval_match.match(model, some, TINY, "cpu", every) == whole


@pytest.mark.parametrize("sees", [False, True])
def test_only_what_is_seen_in_the_image_makes_a_gap(frames, monkeypatch, sees):
    """A network that knows nothing but position matches well in the right image, and as well in the wrong one. One that
    sees which image it is matches in the right one alone.
    """
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
    low, high = found["gain_interval"]
    assert found["right_excess"] < -0.3 and found["frames"] == len(frames)
    if sees:  # points of another frame say another position
        assert found["position_excess"] > -0.1 and found["right_rank"] < 2
        assert found["wrong_rank"] > 15 and found["gap"] > 15
        assert 0.3 < low < found["gain"] < high
    else:
        assert low < 0 < high and abs(found["gain"]) < 0.1 and found["position_excess"] < -0.3
        assert found["right_rank"] < 10 and abs(found["gap"]) < 5


def test_matching_of_a_random_network_is_chance_and_always_the_same(frames):
    torch.manual_seed(0)
    model = simipu.SimIPU(TINY)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = eval_match.match(model, frames, TINY, "cpu")
    assert found == eval_match.match(model, frames, TINY, "cpu")
    assert 30 < found["right_rank"] < 70 and abs(found["gap"]) < 20 and abs(found["gain"]) < 0.2
    low, high = found["gap_interval"]
    assert low <= found["gap"] <= high
    assert found["intra_rank"] < 35  # reflectance alone tells something across views
    # judged on a copy
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training


def test_a_branch_that_is_not_there_has_no_figures(frames):
    torch.manual_seed(0)
    intra = replace(TINY, inter_weight=0.0)
    found = eval_match.match(simipu.SimIPU(intra), frames[:3], intra, "cpu")
    assert found.keys() == {"frames", "intra_rank", "intra_top1", "intra_excess"}
    [*_, line] = eval_match.match_table({"x": found})
    assert line.split()[:4] == ["x", "-", "-", "-"] and f"{found['intra_rank']:.1f} %" in line


def test_figures_are_over_places():
    """Three frames of one, two and three places: medians and means by hand; figures have four digits."""
    beaten = {0: [10.0], 1: [20.0, 40.0], 2: [0.0, 30.0, 50.0]}
    found = {}
    for i, values in beaten.items():
        found[i] = frame_of(torch.eye(len(values)), torch.zeros(len(values), len(values)))
        for which, more in (("right", 0), ("wrong", 5)):
            ranks = torch.tensor([[x + more for x in values], [1.0] * len(values)])
            found[i][which] = found[i][which]._replace(ranks=ranks)
    figures = eval_match.match_figures(found)
    assert figures["right_rank"] == 20 and figures["wrong_rank"] == 25  # torch's median is the lower of the middle two
    assert figures["gap"] == 5 and figures["gap_interval"] == [5, 5]
    chance = (2 * math.log(2) + 3 * math.log(3)) / 6
    assert figures["right_top1"] == 1 and figures["chance"] == round(chance, 4) == -figures["right_excess"]


# -----------------------------------------------------------------------------
# the probe


def test_positions():
    uv = torch.tensor([[-0.5, -0.5], [159.5, 63.5], [79.5, 31.5]])
    p = eval_match.positions(uv, 160, 64)
    assert p.shape == (3, 21) and p[:, 0].tolist() == [1, 1, 1]
    assert p[2, 1:].abs().max() < 1e-12  # the middle is (0, 0)
    assert p[1].tolist() == [1] * 21 and sorted(set(p[0].tolist())) == [-1, 1]


def test_ridge_equals_the_textbook():
    """min |y - X w|^2 / n + strength |standardised part of w|^2, by stacking the penalty under the data, in float64."""
    torch.manual_seed(0)
    n, free, C, strength = 200, 4, 7, 0.3
    features = torch.randn(n, C) * torch.linspace(0.1, 9, C) + torch.arange(C)
    X = torch.cat([torch.ones(n, 1), torch.randn(n, free - 1), features], 1).double()
    X[:, -1] = 5.0  # a feature that never changes
    y = X @ torch.randn(free + C).double() + torch.randn(n)
    Z = torch.cat([X, y[:, None]], 1)
    w = eval_match.ridge(Z.T @ Z, free, [strength])[strength]
    features = X[:, free:-1]
    S = torch.cat([X[:, :free], (features - features.mean(0)) / features.std(0, correction=0)], 1)
    penalty = torch.diag(torch.tensor([0.0] * free + [math.sqrt(n * strength)] * (C - 1)).double())
    target = torch.cat([y, torch.zeros(len(penalty)).double()])
    by_hand = torch.linalg.lstsq(torch.cat([S, penalty]), target).solution
    torch.testing.assert_close(X @ w, S @ by_hand, rtol=1e-6, atol=1e-6)


def test_errors_are_of_frames_not_fitted():
    """A feature that tells the target is found. One that only tells the frame, whose target has an offset of its own,
    is no help on frames never fitted. Noise costs little, for cross-validation shrinks it.
    """
    torch.manual_seed(0)
    frames, n = 10, 60
    base = [torch.cat([torch.ones(n, 1), torch.randn(n, 2)], 1) for _ in range(frames)]
    truth, offset = [torch.randn(n) for _ in range(frames)], torch.randn(frames) * 2
    target = [(b[:, 1] + t + o).double() for b, t, o in zip(base, truth, offset)]

    def score(extra):
        columns = [torch.cat([b, e], 1) for b, e in zip(base, extra)]
        return float(torch.cat(eval_match.fit_and_score(columns, target, 3)).mean())

    floor = score([torch.zeros(n, 1)] * frames)
    assert floor == pytest.approx(1 + float(offset.var()), rel=0.3)
    assert score([t[:, None] for t in truth]) < 0.8 * floor
    assert score([torch.eye(frames)[i].expand(n, frames) for i in range(frames)]) > 0.95 * floor
    assert score([torch.randn(n, 100) for _ in range(frames)]) < 1.15 * floor
    assert len(eval_match.fit_and_score(base, target, 3)) == frames


def test_r_squared_from_sums():
    """Of any choice of frames, from four sums a frame, over all points and over those above the ground."""
    rng = torch.Generator().manual_seed(0)
    target = [torch.randn(n, generator=rng).double() for n in (5, 8)]
    errors = [(0.1 * torch.randn(n, generator=rng).double()) ** 2 for n in (5, 8)]
    masks = [torch.arange(5) > 2, torch.arange(8) > 3]
    probed = [eval_match.Probed(None, t, None, mask) for t, mask in zip(target, masks)]
    sums = eval_match.sum_errors(errors, probed)
    t, e, mask = torch.cat(target), torch.cat(errors), torch.cat(masks)
    by_hand = lambda t, e: float(1 - e.sum() / ((t - t.mean()) ** 2).sum())
    assert eval_match.r_squared(sums["all"]) == pytest.approx(by_hand(t, e))
    assert eval_match.r_squared(sums["off_ground"]) == pytest.approx(by_hand(t[mask], e[mask]))
    assert eval_match.r_squared(sums["all"][[1]]) == pytest.approx(by_hand(target[1], errors[1]))


def test_probe_finds_depth_where_it_is(frames):
    """An encoder that paints log-depth itself, from the frame's own points, explains what position leaves; in another
    frame's image it does not.
    """
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
        strides, offsets = (1, 2, 4, 4, 8), (0, 0, 0, 0, 0)

        def forward(self, image):
            return [None] * 3 + [torch.cat([maps.get(key(x), torch.zeros(1, 1, 16, 40)) for x in image]), None]

    rows = eval_match.probe({"painter": Painter()}, frames, TINY, "cpu", points=200, stage=3)
    assert rows["painter"]["all_gain"] > 0.15 and rows["painter"]["all"] > 0.75
    assert rows["painter, wrong image"]["all_gain"] < 0.05 and rows["position"]["all_gain"] == 0
    low, high = rows["painter"]["all_gain_interval"]
    assert 0 < low < rows["painter"]["all_gain"] < high
    assert rows["painter"]["off_ground"] != rows["painter"]["all"]

    title, *lines = eval_match.probe_table(rows)
    assert [line[:24].strip() for line in lines] == ["position", "painter", "painter, wrong image"]
    assert lines[0].split()[-1] == "-" and f"+{rows['painter']['all_gain']:.3f} (+{low:.3f} to +{high:.3f})" in lines[1]
    assert title.index("over position") == lines[1].index(f"+{rows['painter']['all_gain']:.3f}")
