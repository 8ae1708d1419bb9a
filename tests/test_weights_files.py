"""Files that anybody wrote: which are read, what is taken from them, and in which words the others are refused."""

import io
import os
import pickle
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_weights import MEAN, STD, assert_same_function, load, named, network

import encoders
import weights
from files import BadInput, read_checkpoint

SMALL = {"a.weight": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture(autouse=True)
def no_warnings():
    """A line is all that a user is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def saved(content, zipped=True):
    """The bytes of torch.save, as of today or as of before torch 1.6."""
    f = io.BytesIO()
    torch.save(content, f, _use_new_zipfile_serialization=zipped)
    return f.getvalue()


def refusal(path):
    """The line for a file that cannot be read."""
    with pytest.raises(BadInput) as e:
        read_checkpoint(path)
    line = str(e.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and "\033" not in line and len(line) < 400, line
    return line.removeprefix(f"{path}: ")


def same_weights(encoder, net, tolerance=0.0):
    own = encoder.state_dict()
    return all(
        torch.allclose(own[k].double(), v.double(), rtol=tolerance, atol=tolerance / 100)
        for k, v in net.state_dict().items()
    )


# -----------------------------------------------------------------------------
# what is read


@pytest.mark.parametrize("numpy", ["numpy.core.", "numpy._core."])
def test_numpy_scalars_and_arrays_are_read(tmp_path, numpy):
    """Of numpy 1 and of numpy 2, beside tensors and as weights."""
    meta = {"best": np.float64(0.06), "ok": np.bool_(True), "name": np.str_("x"), "counts": np.arange(3)}
    content = saved({"state_dict": SMALL, "meta": meta}, zipped=False).replace(b"numpy._core.", numpy.encode())
    assert numpy.encode() in content
    (tmp_path / "it.pth").write_bytes(content)
    found = read_checkpoint(tmp_path / "it.pth")
    assert found["meta"]["best"] == 0.06 and found["meta"]["counts"].tolist() == [0, 1, 2]
    assert found["state_dict"]["a.weight"].equal(SMALL["a.weight"])


def test_tensors_of_a_gpu_are_read_without_one(tmp_path):
    cpu, cuda = (b"X" + bytes([len(name), 0, 0, 0]) + name for name in (b"cpu", b"cuda:0"))
    content = saved(SMALL, zipped=False)
    assert cpu in content
    (tmp_path / "it.pth").write_bytes(content.replace(cpu, cuda))
    assert read_checkpoint(tmp_path / "it.pth")["a.weight"].equal(SMALL["a.weight"])


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module of another program, there while its objects are saved and gone when they are read. What its code does
    when it is run leaves a file.
    """
    module = types.ModuleType("mmengine")
    code = """
class HistoryBuffer:
    def min(self): pass
class ConfigDict(dict): pass
class Lines(list): pass
class Bomb:
    def __reduce__(self): return explode, ()
def explode(): open(r"PATH", "w")
""".replace("PATH", str(tmp_path / "exploded"))
    exec(code, vars(module))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mmengine", module)
        yield module


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_other_programs_are_named_and_never_run(foreign, monkeypatch, tmp_path, zipped):
    """As mmengine saves itself: buffers that hold arrays and functions, configs that are dicts. Weights are read."""
    buffer = foreign.HistoryBuffer()
    buffer.values, buffer.method = np.ones(2), foreign.HistoryBuffer.min
    config = foreign.ConfigDict(state_dict=foreign.ConfigDict(named(network(), "backbone.")))
    content = {"message_hub": {"loss": buffer}, "cfg": config, "bomb": foreign.Bomb()}
    (tmp_path / "it.pth").write_bytes(saved(content, zipped))
    monkeypatch.delitem(sys.modules, "mmengine")
    encoder = encoders.ResNet(18)
    summary = weights.load_image_encoder(encoder, tmp_path / "it.pth")
    assert same_weights(encoder, network()) and "taken: backbone.* of cfg.state_dict" in summary
    assert "not read: objects of mmengine.HistoryBuffer, " in summary
    assert not (tmp_path / "exploded").exists()


def test_objects_in_the_way_are_named(foreign, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    words = r"holds no tensors by name, but objects of torch.nn.modules.linear.Linear.*: save the state_dict\(\) alone"
    with pytest.raises(BadInput, match=words):
        weights.load_image_encoder(encoders.ResNet(18), tmp_path / "module.pth")
    torch.save({"lines": foreign.Lines("ab"), **SMALL}, tmp_path / "lines.pth")
    assert "objects of mmengine.Lines stand in the way" in refusal(tmp_path / "lines.pth")
    torch.save({"f": os.system, **SMALL}, tmp_path / "system.pth")
    assert f"it names {os.system.__module__}.system, which is a program" in refusal(tmp_path / "system.pth")


def test_pickles_of_detectron2(foreign, monkeypatch, tmp_path):
    """Arrays in a plain pickle: read, or refused in one line that shows the names; nothing in it is run."""
    arrays = {name: value.numpy() for name, value in named(network()).items()}
    arrays["conv1.weight"] = arrays["conv1.weight"].astype(">f4")
    content = {"model": arrays, "__author__": "MOCO", "bomb": foreign.Bomb()}
    for protocol in (2, 4, 5):
        (tmp_path / "it.pkl").write_bytes(pickle.dumps(content, protocol))
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "mmengine")
            encoder = encoders.ResNet(18)
            summary = weights.load_image_encoder(encoder, tmp_path / "it.pkl")
        assert same_weights(encoder, network()) and "of model" in summary and "objects of mmengine.explode" in summary
        assert not (tmp_path / "exploded").exists()
    theirs = {"stem.conv1.weight": arrays["conv1.weight"], "res2.0.conv1.weight": np.ones((64, 64, 3, 3), np.float32)}
    (tmp_path / "it.pkl").write_bytes(pickle.dumps({"model": theirs}))
    with pytest.raises(BadInput, match="not in it: .*; in it, but not wanted: .*res2.0.conv1.weight"):
        weights.load_image_encoder(encoders.ResNet(18), tmp_path / "it.pkl")
    (tmp_path / "it.pkl").write_bytes(pickle.dumps(content)[:100_000])
    assert refusal(tmp_path / "it.pkl").startswith("not a readable checkpoint: broken or truncated")


def test_safetensors(tmp_path):
    """Whatever the file is called; its metadata may say what pixels are wanted."""
    net, path = network(channels="BGR"), tmp_path / "weights"
    said = {"mean": str(list(MEAN[::-1])), "std": ", ".join(map(str, STD[::-1])), "channels": "BGR"}
    save_file(named(net, "backbone."), path, metadata=said)
    encoder = encoders.ResNet(18)
    summary = weights.load_image_encoder(encoder, path)
    assert_same_function(encoder, net, channels="BGR")
    assert "taken: backbone.*" in summary and "pixels: BGR, mean and deviation (the file says)" in summary
    save_file(named(network()), path, metadata={"format": "pt"})
    assert "assumed" in weights.load_image_encoder(encoder, path) and same_weights(encoder, network())
    save_file(named(network()), path, metadata=said | {"std": "nan 1 1"})
    with pytest.raises(BadInput, match="not understood"):
        weights.load_image_encoder(encoder, path)
    for keep in (100_000, 100):
        path.write_bytes(path.read_bytes()[:keep])
        assert "broken or truncated (100" in refusal(path)


# -----------------------------------------------------------------------------
# what is taken


def half(state_dict, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict.items()}


def one_storage(state_dict):
    """All tensors as views of one buffer, as flattened training code leaves them."""
    flat = torch.cat([v.double().flatten() for v in state_dict.values()])
    sizes = [v.numel() for v in state_dict.values()]
    return {k: part.view(v.shape) for (k, v), part in zip(state_dict.items(), flat.split(sizes))}


def moments(state_dict):
    return {k: torch.ones_like(v) for k, v in state_dict.items() if k.endswith(("weight", "bias"))}


NET, OTHER = named(network()), named(network(seed=1))
ELSEWHERE = {
    "a dict of another name": ({"model_state_dict": NET}, "names without prefix of model_state_dict"),
    "three levels": ({"run": {"ema": {"weights": NET}}}, "names without prefix of run.ema.weights"),
    "encoder.": (named(network(), "encoder."), "encoder.*"),
    "model.backbone.": (named(network(), "module.model.backbone."), "model.backbone.*"),
    "backbone.body.": ({"model": named(network(), "backbone.body.")}, "backbone.body.* of model"),
    "a student alone": ({"student": named(network(), "backbone.")}, "backbone.* of student"),
    "teacher and student": (
        named(network(seed=1), "student.") | named(network(), "teacher."),
        "teacher.*; as good, and left: student.*",
    ),
    "another network beside it": (
        {"a": {"net.conv1.weight": OTHER["conv1.weight"]}, "b": NET},
        "names without prefix of b",
    ),
    "moments by name": ({"optimizer": {"exp_avg": moments(NET)}, "net": NET}, "names without prefix of net"),
    "two that fit": (
        {"state_dict_ema": OTHER, "state_dict": NET},
        "names without prefix of state_dict; as good, and left: state_dict_ema.*",
    ),
    "keys of bytes": ({b"state_dict": {k.encode(): v for k, v in NET.items()}}, "names without prefix of state_dict"),
    "keys of other types": (
        {0: {1: torch.ones(1), (2, 3): torch.ones(1)}, "net": NET | {7: torch.ones(1)}},
        "names without prefix of net",
    ),
    "arrays": ({"params": {k: v.numpy() for k, v in NET.items()}}, "names without prefix of params"),
    "parameters": (dict(network().named_parameters()) | dict(network().named_buffers()), "names without prefix"),
    "one storage": (one_storage(NET), "names without prefix"),
    "float16": (half(NET, torch.float16), "names without prefix"),
    "bfloat16": (half(NET, torch.bfloat16), "names without prefix"),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_network_is_found_wherever_it_lies(tmp_path, where):
    content, words = ELSEWHERE[where]
    encoder, summary = load(content, tmp_path / "it.pth")
    assert same_weights(encoder, network(), {"float16": 2**-8, "bfloat16": 2**-6}.get(where, 0))
    assert "(100% of the parameters), 0 missing" in summary and f"\n  taken: {words}\n" in summary, summary


def test_names_that_do_not_fit_are_shown(tmp_path):
    with pytest.raises(BadInput) as e:
        load({"optimizer": {"0": torch.ones(1)}, "net": named(network(), "x.")}, tmp_path / "it.pth", 50)
    assert "is (64, 64, 3, 3), not (64, 64, 1, 1)" in str(e.value)  # names that fit, around another network
    strange = {f"stem.{i}.kernel": torch.ones(1) for i in range(5)}
    with pytest.raises(BadInput) as e:
        load({"net": strange}, tmp_path / "it.pth")
    wanted = "wanted, but not in it: conv1.weight, bn1.weight, bn1.bias, ..."
    assert f"{wanted}; in it, but not wanted: stem.0.kernel, stem.1.kernel, stem.2.kernel, ...; is this" in str(e.value)
    with pytest.raises(BadInput, match=r"encoder_k\.\* is a key encoder, which is never taken"):
        load(named(network(), "encoder_k."), tmp_path / "it.pth")
    with pytest.raises(BadInput, match=r"conv1.weight is torch.int8, not torch.float32"):
        load(NET | {"conv1.weight": NET["conv1.weight"].char()}, tmp_path / "it.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    """By the name of the tensor; what is not taken may be as it likes."""
    broken = named(network(), "backbone.")
    broken["backbone.layer1.0.bn1.running_var"][3] = value
    with pytest.raises(BadInput, match=r"it.pth: backbone.layer1.0.bn1.running_var: 1 of 64 values are not finite"):
        load(broken, tmp_path / "it.pth")
    load(NET | {"fc.weight": torch.full((3,), value)}, tmp_path / "it.pth")
    points = named(encoders.PointEncoder(16), "pts_backbone.")
    name = next(iter(points))
    points[name].view(-1)[0] = value
    torch.save(points, tmp_path / "points.pth")
    with pytest.raises(BadInput, match=f"points.pth: {name}: 1 of .* not finite"):
        weights.load_point_encoder(encoders.PointEncoder(16), tmp_path / "points.pth")


def test_a_last_pt_of_another_script_is_announced_as_that(tmp_path):
    last = {"model": named(network(), "backbone."), "config": {"decoder_width": 64}, "identity": {}, "step": 7}
    last["script"] = "finetune_depth.py"
    _, summary = load(last, tmp_path / "last.pt")
    assert "pixels: RGB, mean and deviation (a last.pt of finetune_depth.py)" in summary
    with pytest.raises(BadInput, match=r"last\.pt: not a last.pt of simipu.py, nor a backbone.pt"):
        weights.export(tmp_path / "last.pt", format="timm", out=tmp_path / "out.pth")


# -----------------------------------------------------------------------------
# what is refused


def zip_of(*names):
    f = io.BytesIO()
    with zipfile.ZipFile(f, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 100)
    return f.getvalue()


def protocol_4():
    f = io.BytesIO()
    torch.save(SMALL, f, pickle_protocol=4)
    return f.getvalue()


NO_CHECKPOINTS = {
    "empty": (b"", "it is empty$"),
    "web page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page, '<!DOCTYPE html>'; was"),
    "error of a store": (b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page, "),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102\n", "Git LFS; `git lfs pull`"),
    "git-annex": (b"/annex/objects/SHA256E-s102--4d7a.pth\n", "git-annex; `git annex get`"),
    "link as text": (b"../.git/annex/objects/Gk/4f/SHA256E-s102--4d7a.pth/SHA256E-s102--4d7a.pth", "git-annex"),
    "text": (b'{"weight_map": {"conv1.weight":\n "a"}}', r"""text, '\{"weight_map": \{"conv1.weight":'$"""),
    "gzip": (b"\x1f\x8b\x08\0\0\0", "compressed by gzip; unpack"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0", "HDF5"),
    "tar": (b"sys_info".ljust(257, b"\0") + b"ustar\x0000" + b"\0" * 760, "a tar archive"),
    "TorchScript": (zip_of("it/data.pkl", "it/code/it.py", "it/constants.pkl", "it/version"), "a TorchScript archive"),
    "zip of others": (zip_of("resnet50.pth", "README.md"), "a zip archive of other files, resnet50.pth, README.md; u"),
    "arrays of numpy": (zip_of("conv1.weight.npy"), "a zip archive of other files, conv1.weight.npy"),
    "pickle protocol": (protocol_4(), "saved with a pickle_protocol"),
    "cut zip": (saved(SMALL)[:700], r"broken or truncated \(700 bytes; RuntimeError: .*central directory"),
    "cut old file": (saved(SMALL, zipped=False)[:-9], r"broken or truncated \([\d,]+ bytes; RuntimeError: .*EOF"),
    "cut head": (saved(SMALL, zipped=False)[:50], r"broken or truncated \(50 bytes; EOFError"),
    "noise": (bytes(range(128, 256)) * 8, r"broken or truncated \(1,024 bytes; "),
}


@pytest.mark.parametrize("what", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_said_to_be_what_it_is(tmp_path, what):
    content, words = NO_CHECKPOINTS[what]
    (tmp_path / "it.pth").write_bytes(content)
    line = refusal(tmp_path / "it.pth")
    assert line.startswith("not a readable checkpoint: "), line
    with pytest.raises(BadInput, match=words):
        read_checkpoint(tmp_path / "it.pth")


def test_where_no_file_is(tmp_path):
    assert refusal(tmp_path / "nowhere.pth") == "no such file"
    assert refusal(tmp_path) == "a folder; name a file in it"
    (tmp_path / "it.pth").symlink_to("../.git/annex/objects/4f/it.pth")
    said = refusal(tmp_path / "it.pth")
    assert said == "a link to ../.git/annex/objects/4f/it.pth, which is not there; `git annex get` fetches it"
    assert refusal(tmp_path / ("x" * 300)).startswith("not readable (")
