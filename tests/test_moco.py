"""MoCo v2: the queue, the key encoder, the loss, batch norm that does not leak, views as said, runs that go on."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from test_loop import read_log

import data
import encoders
import moco
import simipu
import weights
from files import BadInput

SMALL = "--view 64 32 --queue 8 --hidden 16 --embed-dim 16 --batch-size 4 --group 2 --log-every 1 --workers 0".split()
SMALL += "--optimizer sgd --lr 0.03".split()  # the recipe's, not the demo's
SIZE = (200, 100)  # width and height of the images below


def config(**changes):
    return dataclasses.replace(moco.PRESETS["demo"][1], view=(64, 32), **changes)


# -----------------------------------------------------------------------------
# a model of a few numbers


class Tiny(torch.nn.Module):
    """A convolution and a batch norm in the place of an image encoder."""

    channels = 16

    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 16, 1), torch.nn.BatchNorm2d(16)

    def forward(self, x):
        return [self.bn(self.conv(x))]


@pytest.fixture
def tiny(monkeypatch):
    """tiny(queue=8, ...) -> a MoCo around a Tiny, training."""
    monkeypatch.setattr(encoders, "build_image_encoder", lambda name: Tiny())

    def build(**changes):
        torch.manual_seed(0)
        small = {"queue": 8, "hidden": 8, "embed_dim": 8, "batch_negatives": False}
        return moco.MoCo(config(**small | changes)).train()

    return build


def batch_of(n, first=0):
    """n pairs of images, each of its own noise."""
    images = [torch.randn(n, 3, 4, 4) for _ in range(2)]
    return {"query": images[0], "key": images[1], "index": torch.arange(first, first + n)}


def test_queue_is_first_in_first_out(tiny):
    model = tiny(queue=7)
    expected = [(-1, row) for row in model.queue.clone()]
    for n in (3, 3, 5, 7):
        keys, frames = torch.randn(n, 8), torch.arange(100 * n, 100 * n + n)
        model.enqueue(keys, frames)
        expected = [*expected, *zip(frames.tolist(), keys)][n:]
        oldest = int(model.position)
        assert [int(model.queue_frames[(oldest + i) % 7]) for i in range(7)] == [frame for frame, _ in expected]
        assert torch.equal(torch.roll(model.queue, -oldest, 0), torch.stack([key for _, key in expected]))


def test_keys_of_a_step_follow_the_order_of_its_batch(tiny):
    """Of all passes, and not before the step ends: a pass does not meet the keys of the one before."""
    model = tiny()
    before = model.queue.clone()
    for first in (10, 12):
        model(batch_of(2, first))
        assert torch.equal(model.queue, before)
    keys = torch.cat([key for key, _ in model.fresh])
    model.follow()
    assert model.queue_frames.tolist() == [10, 11, 12, 13, -1, -1, -1, -1] and int(model.position) == 4
    assert torch.equal(model.queue[:4], keys) and torch.equal(model.queue[4:], before[4:])


def test_key_encoder_follows_the_query_encoder(tiny):
    """By its momentum, parameters and nothing else of it; its batch norm by what it has seen itself."""
    model = tiny(momentum=0.9)
    optimizer = moco.build_optimizer(model, model.c)
    for step in range(3):
        batch = batch_of(4)
        model(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        query, key = model.encoder_q.state_dict(), {k: v.clone() for k, v in model.encoder_k.state_dict().items()}
        x = model.encoder_k[0].conv(batch["key"])
        model.follow()
        for name, parameter in model.encoder_k.named_parameters():
            assert torch.allclose(parameter, 0.9 * key[name] + 0.1 * query[name], atol=1e-6), name
            assert not torch.equal(parameter, query[name]) or not parameter.any()
        norm, weight = model.encoder_k[0].bn, 1 / (step + 1)
        before = torch.stack([key["0.bn.running_mean"], key["0.bn.running_var"]])
        measured = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3))])
        assert torch.allclose(torch.stack([norm.running_mean, norm.running_var]), before.lerp(measured, weight))


class Crossed(torch.nn.Module):
    """Registers the norm first that it uses last, as some of timm's networks do."""

    channels = 16

    def __init__(self):
        super().__init__()
        self.last, self.first = torch.nn.BatchNorm2d(16), torch.nn.BatchNorm2d(16)
        self.conv = torch.nn.Conv2d(3, 16, 1)

    def forward(self, x):
        return [self.last(self.first(self.conv(x)).relu())]


def test_every_norm_has_statistics_of_its_own_inputs(monkeypatch):
    monkeypatch.setattr(encoders, "build_image_encoder", lambda name: Crossed())
    model = moco.MoCo(config(queue=8, hidden=8, embed_dim=8)).train()
    net, batch = model.encoder_k[0], batch_of(4)
    x = net.conv(batch["key"])
    inputs = {net.first: x, net.last: net.first(x).relu()}
    model.seen.clear()  # what the line above has measured
    model(batch)
    model.follow()
    for norm, x in inputs.items():
        assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(norm.running_var, x.var((0, 2, 3)), atol=1e-6)


def test_no_gradient_reaches_the_keys(tiny):
    model, batch = tiny(), batch_of(4)
    batch["key"].requires_grad_(), batch["query"].requires_grad_()
    model(batch)[0].backward()
    assert batch["key"].grad is None and batch["query"].grad.any() and not model.queue.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert all(p.grad is not None for p in model.encoder_q.parameters())
    owned = {id(p) for group in moco.build_optimizer(model, model.c).param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.encoder_q.parameters()}


@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_that_of_the_papers_pseudocode(masked):
    rng = np.random.default_rng(0)
    q, k, queue = (rng.normal(size=(n, 5)) for n in (6, 6, 9))
    k = q + 0.7 * k
    queue /= np.linalg.norm(queue, axis=1, keepdims=True)
    own = (rng.random((6, 9)) < 0.3) & masked
    losses, found, candidates = [], [], []
    for i in range(6):
        one, other = q[i] / np.linalg.norm(q[i]), k[i] / np.linalg.norm(k[i])
        negatives = [one @ queue[j] for j in range(9) if not own[i, j]]
        logits = np.array([one @ other, *negatives]) / 0.2
        losses.append(-math.log(np.exp(logits[0]) / np.exp(logits).sum()))
        found.append(logits.argmax() == 0)
        candidates.append(len(logits))
    tensors = [torch.from_numpy(x).float() for x in (q, k, queue)]
    loss, stats = moco.contrast(*tensors, 0.2, torch.from_numpy(own))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(stats["top1"]) == pytest.approx(np.mean(found)) and 0 < np.mean(found) < 1
    assert float(stats["chance"]) == pytest.approx(np.log(candidates).mean())


def test_frames_own_older_keys_are_no_negatives(tiny):
    model = tiny(queue=4)
    for _ in range(2):
        model(batch_of(2))
        model.follow()
    assert model.queue_frames.tolist() == [0, 1, 0, 1]
    chance = float(model(batch_of(2))[1]["moco_chance"])
    assert chance == pytest.approx(math.log(3))
    model.c.own_negatives = True
    assert float(model(batch_of(2))[1]["moco_chance"]) == pytest.approx(math.log(5))


def test_other_keys_of_the_batch_are_negatives_if_asked_for(tiny):
    """Beside the queue's; a frame's own key is its positive and nothing else."""
    model, batch = tiny(queue=4, batch_negatives=True), batch_of(3)
    model(batch)
    model.follow()
    for own_negatives in (False, True):
        model.c.own_negatives = own_negatives
        with torch.no_grad():
            loss, stats = model(batch)
            query = F.normalize(model.encoder_q(batch["query"]), dim=1)
        key = model.fresh[-1][0]
        positive = (query * key).sum(1)
        rows = []
        for i in range(3):
            others = [query[i] @ key[j] for j in range(3) if j != i]
            others += [query[i] @ k for k, f in zip(model.queue, model.queue_frames) if f != i or own_negatives]
            rows.append(torch.stack([positive[i], *others]) / model.c.temperature)
        expected = sum(row.logsumexp(0) - row[0] for row in rows) / 3
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
        assert float(stats["moco_chance"]) == pytest.approx(np.mean([math.log(len(row)) for row in rows]))


# ---- batch norm ----


def found_through_batch_norm(model, leaking):
    """How often keys are found whose images have nothing in common with the query's but their batch: in each, one pair
    of frames is far brighter or darker than all others. That pair itself is not counted.
    """
    torch.manual_seed(1)
    found = []
    for step in range(40):
        batch = batch_of(4, 4 * step)
        odd = 60 * torch.randn(3, 1, 1)
        for part in ("query", "key"):
            batch[part][0] += odd
        if leaking:  # plain batch norm, of the keys as of the queries
            model.steps = 0
            model.train()
        with torch.no_grad():
            query = F.normalize(model.encoder_q(batch["query"]), dim=1)
            model(batch)
        if step >= 10:
            key = model.fresh[0][0]
            found += ((query * key).sum(1, keepdim=True) > query @ model.queue.T).all(1)[1:].tolist()
        model.follow()
    return np.mean(found)


def test_batch_norm_does_not_leak(tiny):
    """A case in which it does: plain batch norm lets an untrained network find keys by their batch. Chance is 3 %."""
    leaking = found_through_batch_norm(tiny(queue=32), True)
    sound = found_through_batch_norm(tiny(queue=32), False)
    assert leaking > 0.3 and sound < 0.1, (leaking, sound)


def test_a_key_depends_on_its_image_alone(tiny):
    model = tiny()
    model(batch_of(4))
    model.follow()
    batch = batch_of(4)
    model(batch)
    alone = {name: value[:1] for name, value in batch.items()}
    model(alone)
    assert torch.allclose(model.fresh[0][0][:1], model.fresh[1][0], atol=1e-6)


# -----------------------------------------------------------------------------
# views


def test_views_are_drawn_as_said():
    """Shares of what is done, and windows: within the image, of the area and the shape that were asked for."""
    c, rng = dataclasses.replace(moco.Config(), view=(64, 32), area=(0.2, 0.6)), np.random.default_rng(0)
    views = [moco.random_view(rng, SIZE, c) for _ in range(2000)]
    grey = [bool(np.allclose(view["colour"][0], view["colour"][1])) for view in views]
    jittered = [not np.allclose(view["colour"], np.eye(3, 4)) for view, is_grey in zip(views, grey) if not is_grey]
    blur = np.array([view["blur"] for view in views])
    flips = [view["flip"] for view in views]
    shares = [np.mean(grey), np.mean(jittered), np.mean(blur > 0), np.mean(flips)]
    assert shares == pytest.approx([0.2, 0.8, 0.5, 0.5], abs=0.03)
    assert 0.1 <= blur[blur > 0].min() < 0.15 and 1.95 < blur.max() <= 2
    left, top, width, height = np.array([view["window"] for view in views]).T
    assert min(left.min(), top.min()) >= 0 and max((left + width).max(), (top + height).max()) <= 1
    area, shape = width * height, width / height  # images have the shape of the view
    assert [area.min(), area.max(), shape.min(), shape.max()] == pytest.approx([0.2, 0.6, 0.75, 4 / 3], abs=0.01)
    same = moco.random_crop(rng, SIZE, (100, 100), (0.9, 1), (1, 1))  # no such square is in the image
    assert same == pytest.approx([0.25, 0, 0.5, 1])


def test_a_view_shows_what_its_matrix_says():
    """An image whose values say where they are: each pixel of the view has the place that A maps onto it."""
    width, height = SIZE
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    image = torch.from_numpy(np.stack([u, v, 0 * u]).astype(np.uint8))[None].repeat(2, 1, 1, 1)
    size, flip = torch.tensor([SIZE, SIZE]), torch.tensor([False, True])
    window = torch.tensor([[0.25, 0.1, 0.5, 0.8], [0.0, 0.5, 0.7, 0.3]], dtype=torch.float64)
    A = moco.crop_affine(size, (64, 32), window, flip)
    colour = torch.eye(3, 4, dtype=torch.float64).repeat(2, 1, 1)
    seen = data.warp_images(image, size, A, colour, (64, 32))
    mean, std = (255 * torch.tensor(x).view(3, 1, 1) for x in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    seen = seen * std + mean
    for b in range(2):
        for i, j in ((0, 0), (63, 0), (17, 30), (40, 9)):
            x, y, _ = torch.linalg.solve(A[b], torch.tensor([i, j, 1.0], dtype=torch.float64)).tolist()
            assert seen[b, :2, j, i].tolist() == pytest.approx([max(x, 0), max(y, 0)], abs=2e-3)
        # the outer edges of the view's pixels are those of the window, exchanged where it is mirrored
        left, right = (-0.5, 63.5) if not flip[b] else (63.5, -0.5)
        start = torch.tensor([window[b, 0] * width - 0.5, window[b, 1] * height - 0.5, 1])
        extent = torch.tensor([window[b, 2] * width, window[b, 3] * height, 0])
        assert torch.allclose((A[b] @ start)[:2], torch.tensor([left, -0.5], dtype=torch.float64))
        assert torch.allclose((A[b] @ (start + extent))[:2], torch.tensor([right, 31.5], dtype=torch.float64))


def test_grey_is_grey():
    image = torch.randint(0, 256, (1, 3, 100, 200), dtype=torch.uint8)
    c = config(grey=1.0, jitter_p=0.0)
    view = moco.random_view(np.random.default_rng(0), SIZE, c)
    colour = torch.from_numpy(view["colour"])[None]
    seen = data.warp_images(image, torch.tensor([SIZE]), torch.eye(3)[None], colour, SIZE)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    seen = 255 * (seen * std + mean)[0]
    expected = 0.299 * image[0, 0] + 0.587 * image[0, 1] + 0.114 * image[0, 2]
    assert torch.allclose(seen, expected.expand(3, -1, -1), atol=1e-2)


def test_blur_is_gaussian_and_keeps_the_mean():
    sigma = torch.tensor([0.0, 0.4, 1.3, 2.0])
    image = torch.rand(4, 3, 16, 40)
    seen = moco.blurred(image, sigma)
    assert torch.equal(seen[0], image[0])
    assert torch.allclose(seen.mean((2, 3)), image.mean((2, 3)), atol=1e-6)
    for i in (1, 2, 3):
        sizes = (0, float(sigma[i]), float(sigma[i]))
        expected = gaussian_filter(image[i].numpy(), sizes, mode="reflect", truncate=8)
        assert np.abs(seen[i].numpy() - expected).max() < 2e-4
    matrix = moco.blur_matrices(sigma, 40)
    assert torch.allclose(matrix.sum(1), torch.ones(4, 40), atol=1e-5) and torch.allclose(matrix, matrix.mT)


def test_images_are_shrunk_no_more_than_a_quarter_view_can_bear():
    image = np.arange(100 * 200 * 3, dtype=np.uint8).reshape(100, 200, 3)
    assert moco.shrunk(image, (64, 32)) is image
    half = moco.shrunk(image, (50, 25))
    assert half.shape == (50, 100, 3)
    assert np.abs(half - image.reshape(50, 2, 100, 2, 3).mean((1, 3))).max() <= 0.5


# -----------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def photos(scenes, tmp_path_factory):
    """The scenes' images and lists, and nothing of their LiDAR."""
    root = tmp_path_factory.mktemp("photos")
    shutil.copytree(scenes / "training" / "image_2", root / "training" / "image_2")
    shutil.copytree(scenes / "ImageSets", root / "ImageSets")
    return root


def saved(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def momenta(checkpoint):
    return {i: state["momentum_buffer"] for i, state in checkpoint["optimizers"][0]["state"].items()}


def test_a_run_goes_on_to_the_same_bits(run_here, photos, tmp_path):
    """From cameras alone. Queue, key encoder and statistics of batch norm are part of the state; what is left behind is
    the query's encoder, for all who take weights.
    """
    command = ["demo", "--data-root", photos, *SMALL, "--max-steps", 5, "--keep-every", 3]
    status, out, err = run_here(moco, *command)
    assert status == 0, err
    whole, other = tmp_path / "out" / "moco_demo", tmp_path / "out" / "other"
    assert sorted(p.name for p in whole.iterdir()) == ["backbone.pt", "curves.png", "last.pt", "log.jsonl", "step_3.pt"]
    assert "a step: 4 frames = 1 processes x 2 passes x 2 frames, 8 keys in the queue" in out
    other.mkdir()
    shutil.copy(whole / "step_3.pt", other / "last.pt")
    status, out, err = run_here(moco, *command, "--name", "other")
    assert status == 0 and "steps 3 to 5" in out, err
    one, two = saved(whole), saved(other)
    for states in ((one["model"], two["model"]), (momenta(one), momenta(two))):
        assert states[0].keys() == states[1].keys()
        assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert [line["moco"] for line in read_log(other)] == [line["moco"] for line in read_log(whole)][3:]

    start = saved(whole, "step_3.pt")["model"]
    for name in ("queue", "encoder_k.0.conv1.weight", "encoder_k.0.bn1.running_mean", "encoder_q.1.mlp.0.weight"):
        assert not torch.equal(start[name], one["model"][name]), name
    for file in ("backbone.pt", "last.pt"):
        encoder = encoders.build_image_encoder("resnet18")
        said = weights.load_image_encoder(encoder, whole / file)
        assert "0 missing" in said and "RGB" in said
        assert torch.equal(encoder.conv1.weight, one["model"]["encoder_q.0.conv1.weight"])
    rates = [line["lr"][0] for line in read_log(whole)]
    assert rates == pytest.approx([0.03 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)])

    status, _, err = run_here(moco, *command, "--name", "other", "--queue", 16)
    assert status == 1 and "last.pt: made with queue=8, not 16" in err


def test_two_processes_equal_one(run_script, run_here, photos, tmp_path):
    """The same groups, keys in the same order, the same encoders, whichever process has seen a group."""
    command = ["demo", "--data-root", photos, *SMALL, "--max-steps", 3]
    status, _, err = run_here(moco, *command, "--name", "one")
    assert status == 0, err
    done = run_script("moco.py", *command, "--name", "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 1 passes x 2 frames" in done.stdout
    one, two = (saved(tmp_path / "out" / name)["model"] for name in ("one", "two"))
    assert one["queue_frames"].tolist() == two["queue_frames"].tolist()
    for name, value in one.items():
        own = name.startswith("encoder_q") and "running" in name  # each process's, as in MoCo
        if not own and "num_batches" not in name:
            assert torch.allclose(value.float(), two[name].float(), atol=1e-4), name


def test_every_preset_of_simipu_has_its_frames():
    assert list(moco.PRESETS) == list(simipu.PRESETS)
    for name, (_, c) in moco.PRESETS.items():
        theirs = simipu.PRESETS[name][1]
        for field in ("data_root", "splits", "frame_stride", "image_encoder"):
            assert getattr(c, field) == getattr(theirs, field)
        moco.check_config(c, 1)
    assert moco.PRESETS["kitti"][1].queue == 65536 and moco.PRESETS["kitti"][1].momentum == 0.999


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--queue 3", "--queue 3: must be --batch-size 4 or more"),
        ("--area 0.5 0.2", "--area 0.5 0.2: must be"),
        ("--momentum 1.5", "--momentum 1.5: must be from 0 to 1"),
        ("--view 64 16", "--view 64 16: must be 32 or more"),
        ("--blur 0 9", "--blur 0.0 9.0: must be from 0 to a sixth of --view"),
        ("--batch-size 8 --queue 8", "--batch-size 8: the 6 frames found are too few"),
        ("--train-frames 3", "--batch-size 4: the 3 frames found are too few"),
        ("--splits nonsense", "nonsense.txt: missing"),
    ],
)
def test_runs_that_cannot_be(run_here, photos, tmp_path, arguments, says):
    small = SMALL[3:] if "--view" in arguments else SMALL  # which is a list, and stands once
    status, _, err = run_here(moco, "demo", "--data-root", photos, *small, *arguments.split())
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert not (tmp_path / "out").exists()


def test_a_broken_image_is_one_line(run_here, photos, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(photos, root)
    victim = sorted((root / "training" / "image_2").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:500])
    c = dataclasses.replace(config(), data_root=(str(root),))
    frames, _ = simipu.pool_frames(c, c.data_root, ("trainval",), clouds=False)
    found = moco.ViewFrames(frames, c)[0, 1]
    assert isinstance(found, BadInput) and victim.name in str(found)
    victim.unlink()
    status, _, err = run_here(moco, "demo", "--data-root", root, *SMALL, "--splits", "trainval")
    assert status == 1 and err.count("\n") == 1 and "image_2" in err, err
