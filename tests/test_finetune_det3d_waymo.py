"""finetune_det3d.py waymo and `eval.py det3d` by Waymo's protocol, on built-in scenes in Waymo's layout and its own."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import ablate
import anchors
import data_det3d
import data_waymo
import eval as evaluate
import eval_boxes
import eval_waymo
import finetune_det3d

SHAPE = {
    "image_scale": (160, 64), "max_points": 4096, "fpn": 16, "fusion": 16, "vfe": 16, "sparse": (8, 8, 16, 16, 32),
    "second": (32, 64), "second_layers": 1, "neck": 32, "batch_size": 2, "group": 2, "workers": 0, "log_every": 1,
    "image_encoder": "resnet18", "point_range": (-12.8, -12.8, -2.0, 25.6, 12.8, 4.0), "voxel": (0.2, 0.2, 0.2),
}  # fmt: skip
C = dataclasses.replace(finetune_det3d.PRESETS["waymo"][1], **SHAPE)
SMALL = []  # the same as flags
for field, value in SHAPE.items():
    SMALL += ["--" + field.replace("_", "-"), *(value if isinstance(value, tuple) else (value,))]


def frames_of(root, split="val"):
    return data_det3d.find_frames([root], [split])


def labels_as_detections(frame):
    """-> boxes, scores, classes, of what is looked for."""
    scene = data_det3d.read_scene(frame, protocol=anchors.PROTOCOLS["waymo"], columns=5)
    known = scene.classes >= 0
    return scene.boxes[known], np.full(known.sum(), 0.9, np.float32), scene.classes[known]


# -----------------------------------------------------------------------------
# what the network is given


def test_the_recipe():
    """What the notes on mmdetection3d's SECOND and MVX-Net say, where it is not in anchors.py."""
    c = finetune_det3d.PRESETS["waymo"][1]
    assert c.point_range == (-76.8, -51.2, -2, 76.8, 51.2, 4) and c.voxel == (0.08, 0.08, 0.1)
    assert not c.moca and c.elongation and c.epochs == 2 * 24 and c.batch_size == 32 and c.lr == 1e-3
    assert eval_boxes.judging_box(c) == data_waymo.RIG.box
    rates = [finetune_det3d.rate(step, 2400, 100, c.drops) for step in (0, 100, 1999, 2000, 2299, 2300, 2399)]
    assert rates == pytest.approx([0.1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    finetune_det3d.check_config(c, 8)


def test_all_of_the_sweep_with_elongation(waymo_scenes):
    """Points that the camera does not see stay, and are not told anything of the image; those that it sees are."""
    c = dataclasses.replace(C, max_points=0)
    torch.manual_seed(0)
    model = finetune_det3d.Detector(c)
    frames = frames_of(waymo_scenes)
    dataset = data_det3d.DetectionFrames(frames, c, model.layout, training=False)
    samples = [dataset[0, i] for i in range(2)]
    cloud = frames[0].read_points(5)
    low, high = np.array(c.point_range[:3]), np.array(c.point_range[3:])
    inside = ((cloud[:, :3] >= low) & (cloud[:, :3] < high)).all(1)
    assert np.array_equal(samples[0]["points"], cloud[inside]) and 0.4 < samples[0]["points"][:, 4].mean() < 0.6
    assert sorted({k for s in samples for k in s["classes"].tolist()}) == [0, 1, 2]

    batch = data_det3d.collate(model.layout, samples)
    batch = data_det3d.augment(batch, eval_boxes.judging_box(c), model.layout, torch.device("cpu"))
    encoder = model.pts_voxel_encoder
    told = encoder.decorated(batch["points"], batch["rows"], batch["levels"][0])
    assert told.shape[1] == 11 and torch.equal(told[:, :5], batch["points"])
    uv = model.pixels(batch).flatten(0, 1)[batch["slot"]]
    height, width = batch["image"].shape[2:]
    far_out = (uv[:, 0] < -64) | (uv[:, 0] > width + 64) | (uv[:, 1] < -64) | (uv[:, 1] > height + 64)
    assert 0.1 < far_out.float().mean() < 0.9
    maps = [torch.zeros(2, c.fpn, 8, 20) for _ in range(5)]
    cells = [model.pixels(batch) / 8] * 5
    features = torch.randn(len(uv), c.vfe)
    fusion = encoder.fusion_layer.eval()
    dark = fusion(features, maps, batch, cells)
    bright = fusion(features, [m + 1 for m in maps], batch, cells)
    changed = (bright != dark).any(1)
    assert not changed[far_out].any() and changed[~far_out].float().mean() > 0.5


# -----------------------------------------------------------------------------
# judging


def test_labels_as_detections_score_1(waymo_scenes, tmp_path):
    """From KITTI's label files, through the vehicle's frame and a file for Waymo, to its figures; turned by a quarter,
    mAPH falls by half; of two cameras at one moment, each box counts once."""
    rules, frames = eval_boxes.RULES["waymo"], frames_of(waymo_scenes)
    assert len(frames) == 2
    found = [rules.convert(f, *labels_as_detections(f)) for f in frames]
    figures = rules.evaluate(frames, found)
    for name in eval_waymo.MEAN:
        assert figures[name]["LEVEL_2"]["n"] > 0
        for level in eval_waymo.LEVELS:
            assert figures[name][level]["n"] == 0 or figures[name][level]["mAP"] == 1
            assert figures[name][level]["n"] == 0 or figures[name][level]["mAPH"] == pytest.approx(1, abs=1e-4)
    assert rules.headline(figures) == {"VEHICLE": 100, "PEDESTRIAN": 100, "CYCLIST": 100}
    assert rules.write(tmp_path, frames, found) == "predictions.bin"
    written = eval_waymo.read_objects(tmp_path / "predictions.bin")
    assert eval_waymo.evaluate(written, eval_waymo.read_truth(frames)) == figures
    assert rules.evaluate(frames, [*found, *found]) == figures
    joined = eval_waymo.join_objects([*found, *found])
    assert eval_waymo.evaluate(joined, eval_waymo.read_truth(frames))["VEHICLE"]["LEVEL_2"]["mAP"] < 1

    truths, turned = [], []
    for frame in frames:
        boxes, scores, classes = labels_as_detections(frame)
        boxes[:, 4] = boxes[:, 3]  # as wide as long: turned by a quarter, it is itself
        truths.append(rules.convert(frame, boxes, scores, classes))
        turned.append(rules.convert(frame, boxes + [0, 0, 0, 0, 0, 0, np.pi / 2], scores, classes))
    truth, turned = (eval_waymo.join_objects(part) for part in (truths, turned))
    truth.points[:] = 100
    vehicles = eval_waymo.evaluate(turned, truth)["VEHICLE"]["LEVEL_1"]
    assert vehicles["mAP"] == 1 and vehicles["mAPH"] == pytest.approx(0.5, abs=1e-3)


def test_two_steps_and_all_that_is_said_of_them(run_here, waymo_scenes, tmp_path, monkeypatch):
    """A run with its judgements; `eval.py det3d` says the same, of last.pt and of the file that it writes."""
    monkeypatch.setattr(anchors, "MIN_SCORE", 0.0)  # two steps teach nobody: let through what there is
    few = dataclasses.replace(anchors.PROTOCOLS["waymo"], before_nms=100)
    monkeypatch.setitem(anchors.PROTOCOLS, "waymo", few)
    arguments = ["waymo", "--data-root", waymo_scenes, *SMALL, "--max-steps", 2, "--eval-every", 1, "--warm-up", 0]
    status, said, err = run_here(finetune_det3d, *arguments)
    assert status == 0, err
    out = tmp_path / "out" / "det3d_waymo"
    assert sorted(p.name for p in out.iterdir()) == ["curves.png", "det3d.png", "last.pt", "log.jsonl"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps, judged = ([line for line in log if key in line] for key in ("lr", "det3d"))
    assert all(np.isfinite(line["loss"]) and line["positives"] > 3 for line in steps) and len(steps) == len(judged) == 2
    figures = judged[1]["det3d"]
    assert figures.pop("frames") == 2 and figures["VEHICLE"]["LEVEL_2"]["n"] > 3
    assert "6 frames, 2 held out" in said and "Waymo 3D detection" in said and "det3d.png: Vehicle" in said

    command = ["det3d", out / "last.pt", "--save", "found", "--json", "ap.json", "--drawn", 1]
    status, again, err = run_here(evaluate, *command)
    assert status == 0 and again.splitlines()[:20] == said.splitlines()[-20:], err
    assert json.loads((tmp_path / "ap.json").read_text()) == figures
    assert len(list((tmp_path / "found" / "pictures").iterdir())) == 1
    file = tmp_path / "found" / "predictions.bin"
    assert len(eval_waymo.read_objects(file)) > 100
    truth = tmp_path / "truth.bin"
    truth.write_bytes(b"".join(p.read_bytes() for p in sorted((waymo_scenes / "training" / "truth").glob("20_*"))))
    for of_what in (["--truth", truth], ["--data-root", waymo_scenes]):
        status, _, err = run_here(evaluate, "det3d", file, "--protocol", "waymo", *of_what, "--json", "file.json")
        assert status == 0 and json.loads((tmp_path / "file.json").read_text()) == figures, err

    # frames without labels: written, not judged
    root = shutil.copytree(waymo_scenes, tmp_path / "unlabelled")
    (root / "training").rename(root / "testing")
    shutil.rmtree(root / "testing" / "label_2")
    (root / "ImageSets" / "val.txt").rename(root / "ImageSets" / "test.txt")
    command = ["det3d", out / "last.pt", "--data-root", root, "--splits", "test"]
    status, said, err = run_here(evaluate, *command, "--save", "unseen")
    assert status == 0 and said.startswith("wrote predictions.bin and 2 pictures") and said.count("\n") == 1, err
    assert (tmp_path / "unseen" / "predictions.bin").read_bytes() == file.read_bytes()
    status, _, err = run_here(evaluate, *command)
    assert status == 1 and err == "error: --splits test: has no labels to judge by; --save writes what is found there\n"
    status, _, err = run_here(evaluate, "det3d", out / "last.pt", "--data-root", "found", "--splits", "test")
    assert status == 1 and err.startswith("error: found: no training/ in it") and err.count("\n") == 1
    status, _, err = run_here(evaluate, "det3d", out / "last.pt", "--protocol", "kitti")
    assert status == 1 and err.endswith("last.pt was trained for waymo\n") and err.count("\n") == 1


# -----------------------------------------------------------------------------
# Waymo's own


def test_the_command_says_what_waymos_tool_says(run_here, waymo, tmp_path):
    files = [waymo / f"fake_{name}.bin" for name in ("predictions", "ground_truths")]
    status, said, err = run_here(evaluate, "det3d", files[0], "--protocol", "waymo", "--truth", files[1], "--json", "x")
    assert status == 0 and "20.83" in said, err
    found = json.loads((tmp_path / "x").read_text())
    assert found["VEHICLE"]["LEVEL_1"]["mAP"] == pytest.approx(0.208277, abs=1e-5)
    assert found["PEDESTRIAN"]["[30, 50)"]["LEVEL_2"]["mAPH"] == pytest.approx(0.0966024, abs=1e-5)


def test_waymos_own_frame(run_here, waymo, tmp_path):
    """Two steps on the real frame, all around; its own labels, as detections, are found."""
    pytest.importorskip("pyarrow")
    data_waymo.convert(waymo, tmp_path / "waymo", workers=1, whole=True, elongation=True)
    own = "--batch-size 1 --group 1 --max-points 30000 --point-range -76.8 -51.2 -2.0 76.8 51.2 4.0 --voxel 0.4 0.4 0.2"
    arguments = ["waymo", "--data-root", tmp_path / "waymo", "--max-steps", 2, "--eval-splits"]
    arguments += ablate.overridden([str(word) for word in SMALL], own.split())
    status, said, err = run_here(finetune_det3d, *arguments)
    assert status == 0 and "det3d.png: Vehicle 37 labelled" in said, err
    frames = frames_of(tmp_path / "waymo", "train")
    rules = eval_boxes.RULES["waymo"]
    figures = rules.evaluate(frames, [rules.convert(f, *labels_as_detections(f)) for f in frames])
    assert [figures[name]["LEVEL_2"]["mAP"] for name in eval_waymo.MEAN] == [1, 1, 1]
    assert [figures[name]["LEVEL_2"]["n"] for name in eval_waymo.MEAN] == [37, 12, 1]


# -----------------------------------------------------------------------------
# what cannot be


def objects(segment="20_000_040_000", box=(5, 0, 1, 4, 2, 1.5, 0), score=0.5):
    """The bytes of a file with one vehicle, of the first frame held out."""
    return eval_waymo.pack_objects(eval_waymo.make_objects([(segment, 1_500_000_000_000_000)], [0], 1, [box], score))


FILES = {
    "unknown": objects("30_000_050_000"),
    "nan": objects(box=(np.nan, 0, 1, 4, 2, 1.5, 0)),
    "negative": objects(box=(5, 0, 1, 4, -2, 1.5, 0)),
    "score": objects(score=1.5),
    "text": b"Car 0.00 0 1.85 387.63 181.54 423.81 203.12",
    "good": objects(),
}
WRONG = {
    "unknown": (["unknown"], "unknown.bin: 1 of its 1 frames are of segments without labels; 30_000_050_000 15"),
    "nan": (["nan"], "nan.bin: object 0 (frame 20_000_040_000 1500000000000000): its box is NaN or infinite (1 such)"),
    "negative": (["negative"], "negative.bin: object 0 (frame 20_000_040_000 1500000000000000): its length, width or"),
    "score": (["score"], "score.bin: object 0 (frame 20_000_040_000 1500000000000000): its score is not within [0, 1]"),
    "text": (["text"], "text.bin: not a file of waymo.open_dataset.Objects (object 0: "),
    "no file": (["nowhere"], "nowhere.bin: not readable (No such file or directory)"),
    "no truth": (["good", "--truth", "nothing.bin"], "nothing.bin: not readable (No such file or directory)"),
    "of nothing": (["good", "NOTHING"], "good.bin: a file of predictions; --truth or --data-root must say of what"),
    "of KITTI": (["good", "--data-root", "SCENES"], "training/000003: no frame of data_waymo.py (SEGMENT_TIME"),
    "frames": (["good", "--frames", "3"], "good.bin: a file of predictions; --frames and --save are for detectors"),
    "protocol": (["good", "--protocol", "kitti"], "--protocol kitti: folders of result files are KITTI's, files of"),
}


@pytest.mark.parametrize("what", WRONG)
def test_files_that_cannot_be_judged(run_here, scenes, waymo_scenes, tmp_path, what):
    (name, *rest), words = WRONG[what]
    for file, content in FILES.items():
        (tmp_path / f"{file}.bin").write_bytes(content)
    usual = [] if "NOTHING" in rest or "--truth" in rest or "--data-root" in rest else ["--data-root", waymo_scenes]
    rest = [scenes if word == "SCENES" else word for word in rest if word != "NOTHING"]
    status, out, err = run_here(evaluate, "det3d", f"{name}.bin", *usual, *rest)
    assert status == 1 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


NOT_TRAINED = {
    "KITTI's frames": (["--data-root", "SCENES", "--no-elongation", "--eval-splits"], ": no frame of data_waymo.py"),
    "no elongation": (["--data-root", "SHORT"], "its points have 4 numbers, no elongation; convert with --elongation"),
    "no truth": (["--data-root", "LACKING"], "_FRONT.bin: missing; data_waymo.py writes it"),
    "moca": (["--moca"], "--moca: pastes KITTI's classes alone; with --protocol waymo give --no-moca"),
    "rows": (["--keep-rows", "2"], "--keep-rows 2: the rows are those of KITTI's LiDAR"),
    "drops": (["--drops", "0.9", "0.5"], "--drops 0.9 0.5: must be from 0 to 1, rising"),
}


@pytest.mark.parametrize("what", NOT_TRAINED)
def test_what_cannot_be_trained_on_is_one_line(run_here, scenes, waymo_scenes, tmp_path, what):
    arguments, words = NOT_TRAINED[what]
    if "SHORT" in arguments:
        short = shutil.copytree(waymo_scenes, tmp_path / "SHORT")
        rig = short / "rig.json"
        rig.write_text(rig.read_text().replace('"columns": 5', '"columns": 4'))
        for cloud in (short / "training" / "velodyne").iterdir():
            np.fromfile(cloud, np.float32).reshape(-1, 5)[:, :4].tofile(cloud)
    if "LACKING" in arguments:
        shutil.copytree(waymo_scenes, tmp_path / "LACKING")
        next((tmp_path / "LACKING" / "training" / "truth").glob("20_*")).unlink()
    places = {"SCENES": str(scenes)} | {name: str(tmp_path / name) for name in ("SHORT", "LACKING")}
    own = [places.get(word, word) for word in arguments]
    usual = [] if "--data-root" in own else ["--data-root", waymo_scenes]
    status, out, err = run_here(finetune_det3d, "waymo", *usual, *SMALL, "--max-steps", 1, *own)
    assert status == 1 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "out").exists()
