"""Weights by name: what `--init` understands beside files. They are downloaded once, into torch.hub's cache.

    python simipu.py kitti --init imagenet                          # torchvision's, of the --image-encoder
    python finetune_depth.py kitti --init simipu-kitti              # the official release's three files
    python simipu.py kitti --init simipu-waymo --init-points simipu-waymo
    python finetune_depth.py kitti --init timm:resnet50.a1_in1k     # any of timm's, where timm is installed

The cache is ~/.cache/torch/hub/checkpoints, or where TORCH_HOME says. On a machine without a network, put the file
there under its own name, or give its path instead of the name. One process on each machine downloads, with a bar in the
first; the others wait. Nothing was downloaded from these addresses here: they are tested against a server of files.
"""

import hashlib
import os
import socket
import urllib.error
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import encoders
from files import BadInput, read_any


@dataclass(frozen=True)
class Address:
    """Where a file of weights lies."""

    url: str
    sha256: str = ""  # how its hash begins; "" where nobody says
    file: str = ""  # its name in the cache; "" for the last part of the url


TORCHVISION = "https://download.pytorch.org/models"
RELEASE = "https://github.com/zhyever/SimIPU/releases/download"
HUB = "https://huggingface.co"  # where timm's weights are, in timm's names

# by name, then by --image-encoder. torchvision's are its IMAGENET1K_V1, whose names hold their hash
ADDRESSES = {
    "imagenet": {
        "resnet18": Address(f"{TORCHVISION}/resnet18-f37072fd.pth", "f37072fd"),
        "resnet34": Address(f"{TORCHVISION}/resnet34-b627a593.pth", "b627a593"),
        "resnet50": Address(f"{TORCHVISION}/resnet50-0676ba61.pth", "0676ba61"),
        "resnet101": Address(f"{TORCHVISION}/resnet101-63fe2227.pth", "63fe2227"),
    },
    "simipu-kitti": {"resnet50": Address(f"{RELEASE}/initial-release/SimIPU_kitti_50e.pth")},
    "simipu-waymo": {"resnet50": Address(f"{RELEASE}/initial-release/SimIPU_waymo.pth")},
    "simipu-imagenet-waymo": {
        "resnet50": Address(f"{RELEASE}/double-finetune/SimIPU_imagesup_waymo_double_finetune.pth")
    },
}
PATIENCE = 60  # seconds without an answer


@dataclass
class Found:
    """The file that --init means."""

    path: str | Path
    pixels: dict = field(default_factory=dict)  # mean, std, channels, where they are known and not in the file


def find(name, arch, flag="--init"):
    """The file that `name`, a path or a name of weights, means for an image encoder `arch`. -> Found. It is downloaded
    if it is not in the cache.

    On several processes all must call it. Raises BadInput for an unknown name, weights that are not there for `arch`,
    timm that is missing, no network, and a file that is not what its hash or its end says.
    """
    name = str(name)
    if name.startswith("timm:"):
        address, pixels = address_of_timm(name, flag)
        return Found(in_cache(name, address, flag), pixels)
    if name not in ADDRESSES:
        if not (Path(name).suffix or os.sep in name or os.path.lexists(name)):
            names = ", ".join([*ADDRESSES, "timm:NAME"])
            raise BadInput(f"{flag} {name}: no such file, and no name of weights: {names}")
        return Found(name)
    if arch not in ADDRESSES[name]:
        there = ", ".join(ADDRESSES[name])
        raise BadInput(f"{flag} {name}: there are weights for --image-encoder {there}, not for {arch}")
    return Found(in_cache(name, ADDRESSES[name][arch], flag))


def address_of_timm(name, flag):
    """-> Address, and how pixels were normalised, of timm's pretrained weights timm:NAME."""
    timm = encoders.import_timm(f"{flag} {name}")
    try:
        c = timm.models.get_pretrained_cfg(name[5:])
    except RuntimeError as e:  # no such tag
        raise BadInput(f"{flag} {name}: {str(e).splitlines()[0]}") from None
    if not c or not (c.hf_hub_id or c.url):
        raise BadInput(f"{flag} {name}: timm has no weights of that name")
    pixels = {"mean": tuple(c.mean), "std": tuple(c.std), "channels": "RGB", "by": "timm says"}
    if not c.hf_hub_id:
        return Address(c.url), pixels
    file = c.hf_hub_filename or "model.safetensors"
    return Address(f"{HUB}/{c.hf_hub_id}/resolve/main/{file}", file=f"{c.hf_hub_id.replace('/', '-')}-{file}"), pixels


def as_features(contents, own):
    """Tensors with the names of a whole timm network, by those, `own`, that it has as an encoder of features: there a
    dot may be an underscore, or all be within `model`.
    """
    flat = {name.replace(".", "_"): name for name in own}
    renamed = {}
    for name, value in contents.items():
        key = str(name).replace(".", "_")
        renamed[flat.get(key) or flat.get(f"model_{key}") or name] = value
    return renamed


def as_whole(weights, arch):
    """The reverse of `as_features`: tensors with the names that the whole network timm:NAME has. Raises BadInput where
    timm is not installed.
    """
    timm = encoders.import_timm("--format timm", f", which knows the names of {arch}")
    flat = {name.replace(".", "_"): name for name in timm.create_model(arch[5:]).state_dict()}
    keys = {name: name.replace(".", "_") for name in weights}
    return {flat.get(key) or flat.get(key.removeprefix("model_"), name): weights[name] for name, key in keys.items()}


# -----------------------------------------------------------------------------
# the cache


def in_cache(name, address, flag):
    """The path of a file in torch.hub's cache, where it is put if need be. Raises BadInput, on all processes alike."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / (address.file or address.url.rpartition("/")[2])
    wrong = ""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        wrong = fetch(address, path)
    if dist.is_initialized():  # the others wait here
        said = [None] * dist.get_world_size()
        dist.all_gather_object(said, wrong)
        wrong = next(filter(None, said), "")
    if wrong:
        raise BadInput(f"{flag} {name}: {wrong}")
    return path


def fetch(address, path):
    """Have the file at `path`, downloaded if it is not there. -> what went wrong, in words, or "". It appears whole or
    not at all.
    """
    if path.exists():
        found = sha256_of(path)
        if found.startswith(address.sha256):
            return ""
        return f"{path}: its hash begins with {found[:8]}, not with {address.sha256}; delete it to have it downloaded"
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        first = int(os.environ.get("RANK", 0)) == 0
        if first:
            print(f"{address.url} to {path}", flush=True)
        torch.hub.download_url_to_file(address.url, str(partial), address.sha256 or None, progress=first)
        read_any(partial)  # where there is no hash, its end may be missing
        os.replace(partial, path)
    except urllib.error.HTTPError as e:
        return f"{address.url} is not to be had ({e.code} {e.reason})"
    except (urllib.error.URLError, TimeoutError) as e:
        return f"{address.url} is out of reach ({getattr(e, 'reason', e)}); without a network, put the file at {path}"
    except RuntimeError as e:
        return f"{address.url}: {e}"
    except BadInput as e:
        return f"{address.url}: {str(e).partition(': ')[2]}"
    except OSError as e:
        return f"{path}: not written ({e.strerror or e})"
    finally:
        socket.setdefaulttimeout(before)
        partial.unlink(missing_ok=True)
    return ""


def sha256_of(path):
    digest = hashlib.sha256()
    with path.open("rb") as f:
        for block in iter(lambda: f.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
