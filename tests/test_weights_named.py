"""Weights by name, from a server of files in this process: downloaded once, checked, and used as files are."""

import functools
import hashlib
import http.server
import sys
import threading
import types

import pytest
import torch
from safetensors.torch import save_file

import encoders
import finetune_depth
import simipu
import weights
import weights_named
from files import BadInput
from weights_named import Address


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder that is served: a ResNet-18 as torchvision saves it, and what goes wrong."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(3)
    state_dict = encoders.ResNet(18).state_dict() | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    torch.save(state_dict, folder / "net.pth")
    whole = (folder / "net.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[:100_000])
    (folder / "page.pth").write_text("<html>come back later</html>")
    (folder / "timm" / "resnet18.x" / "resolve" / "main").mkdir(parents=True)
    save_file(state_dict, folder / "timm" / "resnet18.x" / "resolve" / "main" / "model.safetensors")
    return folder


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """Its address, in the table under names of its files; torch.hub has an empty cache. -> what was asked for."""
    handler = functools.partial(Quiet, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}"
        sha256 = hashlib.sha256((files / "net.pth").read_bytes()).hexdigest()
        table = {
            "imagenet": {"resnet18": Address(f"{url}/net.pth", sha256[:8])},
            "unsaid": {"resnet18": Address(f"{url}/net.pth")},
            "other": {"resnet18": Address(f"{url}/net.pth", "12345678")},
            "cut": {"resnet18": Address(f"{url}/cut.pth")},
            "page": {"resnet18": Address(f"{url}/page.pth")},
            "gone": {"resnet18": Address(f"{url}/gone.pth")},
        }
        monkeypatch.setattr(weights_named, "ADDRESSES", table)
        monkeypatch.setattr(weights_named, "HUB", url)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(torch.hub, "_hub_dir", None)
        Quiet.asked.clear()
        yield Quiet.asked
        httpd.shutdown()


def cached(tmp_path):
    folder = tmp_path / "home" / "hub" / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_name_is_downloaded_once(server, files, tmp_path, capsys):
    encoder = encoders.build_image_encoder("resnet18")
    said = weights.load_image_encoder(encoder, "imagenet")
    assert "0 missing" in said and "net.pth" in said
    expected = torch.load(files / "net.pth", weights_only=True)
    assert torch.equal(encoder.layer4[1].conv2.weight, expected["layer4.1.conv2.weight"])
    shown = capsys.readouterr()
    assert "/net.pth to " in shown.out and "100%" in shown.err
    weights.load_image_encoder(encoder, "imagenet")
    assert server == ["/net.pth"] and cached(tmp_path) == ["net.pth"]
    assert capsys.readouterr().out == ""


def test_other_processes_wait_and_show_nothing(server, tmp_path, capsys, monkeypatch):
    """Process 1 of a machine asks nobody; process 0 of another machine downloads without a bar."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    weights_named.find("imagenet", "resnet18")
    assert server == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    weights_named.find("imagenet", "resnet18")
    shown = capsys.readouterr()
    assert server == ["/net.pth"] and shown.out == "" and "%" not in shown.err


def test_all_processes_are_told_what_went_wrong(server, monkeypatch):
    """Or those that wait would wait for ever."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    dist = weights_named.dist
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    gathered = []

    def all_gather_object(said, own):
        gathered.append(own)
        said[:] = ["out of reach", own]

    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    with pytest.raises(BadInput, match="--init imagenet: out of reach"):
        weights_named.find("imagenet", "resnet18")
    assert gathered == [""]


@pytest.mark.parametrize(
    "name, says",
    [
        ("other", 'net.pth: invalid hash value (expected "12345678", got "'),
        ("cut", "cut.pth: not a readable checkpoint: broken or truncated"),
        ("page", "page.pth: not a readable checkpoint: a web page"),
        ("gone", "gone.pth is not to be had (404 File not found)"),
        ("imagnet", "no such file, and no name of weights: imagenet, unsaid,"),
    ],
)
def test_what_is_not_as_it_should_be_is_one_line_and_not_kept(server, tmp_path, name, says):
    with pytest.raises(BadInput) as refused:
        weights_named.find(name, "resnet18")
    assert str(refused.value).startswith(f"--init {name}: ") and says in str(refused.value)
    assert "\n" not in str(refused.value) and cached(tmp_path) == []


def test_a_message_names_the_flag_that_gave_the_name():
    with pytest.raises(BadInput, match="^--also imagnet: no such file"):
        weights.load_image_encoder(encoders.build_image_encoder("resnet18"), "imagnet", flag="--also")


def test_a_cached_file_is_checked_too(server, tmp_path):
    path = weights_named.find("imagenet", "resnet18").path
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match="net.pth: its hash begins with .*; delete it to have it downloaded"):
        weights_named.find("imagenet", "resnet18")
    assert weights_named.find("unsaid", "resnet18").path == path  # where no hash is known, its reader will complain


def test_without_a_network(server, run_here, scenes, monkeypatch, tmp_path):
    """One line of every script that takes --init, with the place where the file can be put by hand."""
    nobody = {"imagenet": {"resnet18": Address("http://127.0.0.1:9/net.pth")}}
    monkeypatch.setattr(weights_named, "ADDRESSES", nobody)
    for script in (simipu, finetune_depth):
        status, _, err = run_here(script, "demo", "--data-root", scenes, "--init", "imagenet")
        assert status == 1 and err.startswith("error: --init imagenet: http://127.0.0.1:9/net.pth is out of reach")
        assert err.count("\n") == 1 and "without a network, put the file at" in err
    assert not (tmp_path / "out").exists()


def test_weights_are_of_one_encoder(server):
    with pytest.raises(BadInput, match="there are weights for --image-encoder resnet18, not for resnet50"):
        weights_named.find("imagenet", "resnet50")
    assert server == []


def test_a_path_stays_a_path():
    assert weights_named.find("out/demo/last.pt", "resnet18") == weights_named.Found("out/demo/last.pt")


# ---- timm ----


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with what is asked of it: two configurations."""
    module = types.ModuleType("timm")
    fields = {"hf_hub_id": "timm/resnet18.x", "hf_hub_filename": None, "url": "", "mean": (0.485, 0.456, 0.406)}
    known = {
        "resnet18": types.SimpleNamespace(**fields, std=(0.229, 0.224, 0.225)),
        "odd": types.SimpleNamespace(**fields | {"mean": (0.5, 0.5, 0.5)}, std=(0.5, 0.5, 0.5)),
    }
    module.models = types.SimpleNamespace(get_pretrained_cfg=known.get)
    monkeypatch.setitem(sys.modules, "timm", module)


def test_timm(server, timm, tmp_path):
    encoder = encoders.build_image_encoder("resnet18")
    said = weights.load_image_encoder(encoder, "timm:resnet18")
    assert "0 missing" in said and "RGB, mean and deviation (timm says)" in said
    assert cached(tmp_path) == ["timm-resnet18.x-model.safetensors"]
    with pytest.raises(BadInput, match="not ImageNet's mean"):
        weights.load_image_encoder(encoder, "timm:odd")
    with pytest.raises(BadInput, match="--init timm:nothing: timm has no weights of that name"):
        weights.load_image_encoder(encoder, "timm:nothing")


def test_without_timm(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match="--init timm:resnet18: .*timm"):
        weights_named.find("timm:resnet18", "resnet18")


def test_names_of_a_network_of_features(monkeypatch):
    """timm's own, of a ConvNeXt and a ViT with and without features_only."""
    own = ["stem_0.weight", "stages_0.blocks.0.conv_dw.weight", "model.cls_token"]
    contents = {"stem.0.weight": 1, "stages.0.blocks.0.conv_dw.weight": 2, "cls_token": 3, "head.fc.weight": 4}
    assert weights_named.as_features(contents, own) == {**dict(zip(own, (1, 2, 3))), "head.fc.weight": 4}
    whole = types.SimpleNamespace(state_dict=lambda: contents)
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=lambda name: {"x": whole}[name]))
    of_features = dict(zip(own, (1, 2, 3)))
    back = {name: contents[name] for name in list(contents)[:3]}
    assert weights_named.as_whole(of_features, "timm:x") == weights_named.as_whole(back, "timm:x") == back
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match="^--format timm: .*, which knows the names of timm:x$"):
        weights_named.as_whole(of_features, "timm:x")


def test_the_table():
    """Every file of torchvision has the hash that its name holds; all are https, no two share a name."""
    addresses = [address for of in weights_named.ADDRESSES.values() for address in of.values()]
    names = [address.url.rpartition("/")[2] for address in addresses]
    assert len(set(names)) == len(names) == 7 and all(a.url.startswith("https://") for a in addresses)
    hashed = [a for a in addresses if a.sha256]
    assert len(hashed) == 4 and all(a.url.endswith(f"-{a.sha256}.pth") for a in hashed)
    for of in weights_named.ADDRESSES.values():
        assert all(encoders.build_image_encoder(arch).arch == arch for arch in of if arch != "resnet101")
