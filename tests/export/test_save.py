"""Exported folders: they load without this package, and say what is wrong with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from pyro_sparse.export import compact_network, load, save
from pyro_sparse.export.load import MODULES, FormatError, read_config
from pyro_sparse.graph import UntraceableError, groups
from pyro_sparse.nets import lenet5_caffe, mlp


def pruned(net, *shape, inputs=False):
    graph = groups(net, torch.zeros(2, *shape))
    keep = {}
    for group in graph:
        if group.prunable and (inputs or group.name != "input"):
            keep[group.name] = torch.rand(group.size) < 0.5
            keep[group.name][0] = True
    return compact_network(net, graph, {}, keep)


class Functional(nn.Module):
    """Arguments of every kind that a forward can have."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.randn(3))
        self.register_buffer("shift", torch.randn(3), persistent=False)

    def forward(self, x):
        x = F.max_pool2d(self.norm(self.conv(x)).relu(), (2, 2), stride=2)
        x = F.pad(x, (0, 1, 0, 0), value=float("-inf"))[..., :, slice(0, 3)]
        x = torch.cat([x[:, :2], x[:, 2:]], dim=1).mean(-1).to(torch.float32)
        x = torch.clamp(x, min=-1e3)
        return F.softmax(self.fc(x.flatten(1)) * self.scale + self.shift, dim=-1)


NETWORKS = {
    "mlp": (mlp([20, 12, 9, 4], "sigmoid"), (4, 5)),
    "lenet": (lenet5_caffe("silu", in_channels=3, widths=(6, 7, 8)), (3, 28, 28)),
    "functional": (Functional(), (2, 6, 6)),
}

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import load
assert load.__file__.startswith(sys.argv[1])
from safetensors.torch import load_file, save_file
data = load_file(sys.argv[2])
net = load.load()
assert not net.training
save_file({"output": net(data["input"]).detach()}, sys.argv[2])
assert not {"pyro", "pyro_sparse"} & set(sys.modules)
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    net, shape = NETWORKS[name]
    small = pruned(net, *shape, inputs=name != "functional")
    folder = save(small, tmp_path / "out" / "net")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "load.py", "model.safetensors"),
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["net"]
    loaded = load(folder)
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        assert torch.equal(loaded(x), small(x))
    assert {name for name, _ in loaded.named_parameters()} == {
        name for name, _ in small.named_parameters()
    }


def test_loads_in_a_process_that_has_only_the_folder(tmp_path):
    net, shape = NETWORKS["mlp"]
    small = pruned(net, *shape, inputs=True)
    folder = save(small, tmp_path / "net")
    x = torch.randn(3, *shape)
    data = tmp_path / "data.safetensors"
    save_file({"input": x}, data)
    # -I: neither the working directory nor the user's environment is on the path.
    subprocess.run([sys.executable, "-I", "-c", SCRIPT, folder, data], check=True, cwd="/")
    assert torch.equal(load_file(data)["output"], small(x))


LAYERS = {
    "Linear": (nn.Linear(4, 3, bias=False), (4,)),
    "Conv1d": (nn.Conv1d(2, 4, 3, 2, 1, 2, groups=2), (2, 9)),
    "Conv2d": (nn.Conv2d(2, 4, (3, 1), padding="same", padding_mode="circular"), (2, 5, 5)),
    "Conv3d": (nn.Conv3d(1, 2, 2, bias=False), (1, 3, 3, 3)),
    "ConvTranspose1d": (nn.ConvTranspose1d(2, 4, 3, 2, 1, 1), (2, 9)),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 4, 3, bias=False), (2, 5, 5)),
    "ConvTranspose3d": (nn.ConvTranspose3d(1, 2, 2), (1, 3, 3, 3)),
    "BatchNorm1d": (nn.BatchNorm1d(3, eps=0.1, affine=False), (3,)),
    "BatchNorm2d": (nn.BatchNorm2d(3, momentum=None), (3, 4, 4)),
    "BatchNorm3d": (nn.BatchNorm3d(3, track_running_stats=False), (3, 2, 2, 2)),
    "InstanceNorm1d": (nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "InstanceNorm2d": (nn.InstanceNorm2d(3, eps=0.1), (3, 4, 4)),
    "InstanceNorm3d": (nn.InstanceNorm3d(3), (3, 2, 2, 2)),
    "GroupNorm": (nn.GroupNorm(2, 4, eps=0.1), (4, 3)),
    "LayerNorm": (nn.LayerNorm((3, 4), bias=False), (3, 4)),
    "LocalResponseNorm": (nn.LocalResponseNorm(2, alpha=0.3, k=2.0), (4, 3, 3)),
    "RMSNorm": (nn.RMSNorm(4, eps=0.1), (3, 4)),
    "ConstantPad1d": (nn.ConstantPad1d((1, 2), 0.5), (2, 3)),
    "ConstantPad2d": (nn.ConstantPad2d((1, 2, 0, 1), -1.0), (2, 3, 3)),
    "ConstantPad3d": (nn.ConstantPad3d(1, 2.0), (2, 3, 3, 3)),
    "ReflectionPad1d": (nn.ReflectionPad1d(2), (2, 5)),
    "ReflectionPad2d": (nn.ReflectionPad2d((1, 2, 0, 1)), (2, 4, 4)),
    "ReplicationPad1d": (nn.ReplicationPad1d(2), (2, 5)),
    "ReplicationPad2d": (nn.ReplicationPad2d((1, 2, 0, 1)), (2, 4, 4)),
    "PixelShuffle": (nn.PixelShuffle(2), (8, 3, 3)),
    "Dropout2d": (nn.Dropout2d(0.3), (2, 3, 3)),
    "Dropout3d": (nn.Dropout3d(0.3), (2, 3, 3, 3)),
    "LeakyReLU": (nn.LeakyReLU(0.3), (4,)),
    "PReLU": (nn.PReLU(4, 0.1), (4,)),
    "ELU": (nn.ELU(0.3), (4,)),
    "CELU": (nn.CELU(0.3), (4,)),
    "GELU": (nn.GELU("tanh"), (4,)),
    "Softplus": (nn.Softplus(2, 1), (4,)),
    "Softshrink": (nn.Softshrink(0.1), (4,)),
    "Hardshrink": (nn.Hardshrink(0.1), (4,)),
    "Hardtanh": (nn.Hardtanh(-0.2, 0.1), (4,)),
    "Threshold": (nn.Threshold(0.1, float("-inf")), (4,)),
    "Softmax": (nn.Softmax(1), (4, 3)),
    "LogSoftmax": (nn.LogSoftmax(2), (4, 3)),
    "Flatten": (nn.Flatten(2), (2, 3, 4)),
    "Unflatten": (nn.Unflatten(1, (2, 3)), (6,)),
    "Upsample": (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), (2, 3, 4)),
    "ZeroPad1d": (nn.ZeroPad1d((1, 2)), (2, 3)),
    "ZeroPad2d": (nn.ZeroPad2d((1, 2, 0, 1)), (2, 3, 3)),
    "ZeroPad3d": (nn.ZeroPad3d(1), (2, 3, 3, 3)),
    "MaxPool1d": (nn.MaxPool1d(3, 2, 1), (2, 7)),
    "MaxPool2d": (nn.MaxPool2d((3, 2), ceil_mode=True), (2, 7, 7)),
    "MaxPool3d": (nn.MaxPool3d(2, dilation=2), (2, 4, 4, 4)),
    "AvgPool1d": (nn.AvgPool1d(3, 2, 1, count_include_pad=False), (2, 7)),
    "AvgPool2d": (nn.AvgPool2d(3, divisor_override=2), (2, 7, 7)),
    "AvgPool3d": (nn.AvgPool3d(2, 1, 1), (2, 4, 4, 4)),
    "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(3), (2, 7)),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((3, None)), (2, 7, 7)),
    "AdaptiveAvgPool3d": (nn.AdaptiveAvgPool3d(2), (2, 3, 3, 3)),
    "AdaptiveMaxPool1d": (nn.AdaptiveMaxPool1d(3), (2, 7)),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d((3, 2)), (2, 7, 7)),
    "AdaptiveMaxPool3d": (nn.AdaptiveMaxPool3d(2), (2, 3, 3, 3)),
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_layer_of_the_loader(name, tmp_path):
    """Its constructor arguments are found again."""
    if name == "Embedding":
        layer, x = nn.Embedding(7, 3, padding_idx=0), torch.randint(7, (2, 4))
    else:
        layer, shape = LAYERS.get(name) or (getattr(nn, name)(), (4,))
        x = torch.randn(2, *shape)
    net = nn.Sequential(layer).eval()
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2)
    loaded = load(save(net, tmp_path))
    assert torch.equal(loaded(x), net(x))
    assert repr(loaded.get_submodule("0")) == repr(layer)
    # Also what shows in training only.
    for key in ("momentum", "p", "track_running_stats"):
        assert getattr(loaded.get_submodule("0"), key, None) == getattr(layer, key, None)


def test_config_records_what_was_said(tmp_path):
    small = pruned(mlp([6, 5, 2]), 6)
    mean = torch.tensor([0.25, 0.5])
    save(small, tmp_path, preprocessing={"mean": mean}, metadata={"seed": 3, "from": Path("a/b")})
    config = read_config(tmp_path)
    assert config["preprocessing"] == {"mean": [0.25, 0.5]}
    assert config["metadata"] == {"seed": 3, "from": "a/b"}
    assert config["compaction"] == small.compaction
    assert [node["name"] for node in config["architecture"]["nodes"]][1:4] == [
        *("flatten", "fc1", "act1"),
    ]


def test_layers_of_double_precision_and_tied_weights(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    loaded, x = load(save(net, tmp_path)), torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(loaded(x), net(x))


# -- what is refused -----------------------------------------------------------------------------


def test_overwriting(tmp_path):
    first, second = mlp([3, 2]), mlp([4, 2])
    save(first, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty.*overwrite=True"):
        save(second, tmp_path)
    # A network that cannot be saved does no harm either.
    with pytest.raises(ValueError, match="does not know GRU"):
        save(nn.Sequential(nn.GRU(3, 2)), tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="Out of range float"):
        save(second, tmp_path, metadata={"accuracy": float("nan")}, overwrite=True)
    with pytest.raises(TypeError, match="cannot write a object as JSON"):
        save(second, tmp_path, metadata={"data": object()}, overwrite=True)
    assert load(tmp_path).out.in_features == 3
    save(second, tmp_path, overwrite=True)
    assert load(tmp_path).out.in_features == 4
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="is a file"):
        save(first, tmp_path / "notes.txt")


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Unusual(nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


def hooked():
    net = nn.Sequential(nn.ReLU())
    net[0].register_forward_hook(lambda module, args, output: output + 1)
    return net


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (Branching(), UntraceableError, "cannot trace Branching"),
        (nn.Sequential(nn.GRU(3, 2)), ValueError, "the loader does not know GRU"),
        (Unusual(torch.fft.fft), ValueError, "does not know the function .*fft"),
        (Unusual(lambda x: x.cumsum(0)), ValueError, "does not know the method 'cumsum'"),
        (Unusual(lambda x: x.to(torch.device("cpu"))), ValueError, "argument of type device"),
        (hooked(), ValueError, "'0': it has hooks"),
    ],
)
def test_networks_that_cannot_be_saved(net, error, message, tmp_path):
    with pytest.raises(error, match=message):
        save(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    return save(mlp([3, 4, 2]), tmp_path)


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def set_node(index, **values):
    return lambda config: config["architecture"]["nodes"][index].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "does not describe an exported network"),
        (lambda c: c.update(format_version=2), "format version 2, this loader reads version 1"),
        (
            lambda c: c["architecture"]["modules"]["fc1"].update({"class": "Bilinear"}),
            "the layer 'Bilinear' is not among those",
        ),
        (
            lambda c: c["architecture"]["modules"]["fc1"]["arguments"].update(out_features=5),
            r"(?s)model.safetensors does not fit config.json.*size mismatch",
        ),
        (lambda c: c["architecture"]["tensors"].update(scale="buffer"), "has no tensor 'scale'"),
        (set_node(1, op="call_function", target="os.system"), "function 'os.system' is not among"),
        (set_node(1, op="call_method", target="__class__"), "method '__class__' is not among"),
        (set_node(1, op="exec"), "unknown kind of operation 'exec'"),
        (set_node(1, target="a;import os"), "'a;import os' is no name"),
        (set_node(0, target="x=print()"), "'x=print\\(\\)' is no name"),
        (set_node(1, args=[{"code": "1"}]), "unknown kind of argument 'code'"),
    ],
)
def test_folders_that_are_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(FormatError, match=message):
        load(folder)


def test_files_that_are_missing_or_broken(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({"fc1.weight": tensors["fc1.weight"]}, folder / "model.safetensors")
    with pytest.raises(FormatError, match=r"(?s)does not fit config.json.*Missing key"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match="is not valid JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load(folder)
