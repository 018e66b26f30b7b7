"""Exported folders: what stands in them, and what is said of those that are damaged or foreign."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pyro_sparse.export import FormatError, compact_network, load, read_config, reference, save
from pyro_sparse.graph import groups
from pyro_sparse.nets import mlp

FILES = ("model.pt2", "model.safetensors", "dense.pt2")


def pruned(net, inputs):
    graph = groups(net, torch.zeros(2, inputs))
    keep = {group.name: torch.arange(group.size) % 2 == 0 for group in graph if group.prunable}
    return compact_network(net, graph, {}, keep)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    net, folder = mlp([3, 4, 2]), tmp_path_factory.mktemp("written")
    save(net, folder, example=torch.zeros(1, 3), dense=mlp([3, 9, 2]), overwrite=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(written, tmp_path):
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# -- what stands in it -----------------------------------------------------------------------------


def test_config_records_what_was_said(tmp_path):
    small = pruned(mlp([6, 5, 2]), 6)
    mean = torch.tensor([0.25, 0.5])
    save(
        small,
        tmp_path,
        example=torch.zeros(1, 6),
        preprocessing={"mean": mean},
        metadata={"seed": 3, "from": Path("a/b")},
    )
    config = read_config(tmp_path)
    assert config["preprocessing"] == {"mean": [0.25, 0.5]}
    assert config["metadata"] == {"seed": 3, "from": "a/b"}
    assert config["compaction"] == small.compaction
    assert config["architecture"]["tensors"]["fc1.weight"] == [3, 3]
    assert "in_features=3, out_features=3" in config["architecture"]["layers"]["fc1"]
    assert config["inputs"] == [{"name": "input", "shape": [6], "dtype": "float32", "batch": True}]
    assert config["batch"] == "any"
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["fc1.weight"], small.state_dict()["fc1.weight"]
    )


def test_tied_weights_of_double_precision(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    net[2].weight = net[0].weight
    x = torch.randn(2, 3, dtype=torch.float64)
    loaded = load(save(net, tmp_path, example=x))
    assert torch.equal(loaded(x), net(x))


def test_what_is_loaded_is_in_eval_mode(folder):
    net = load(folder)
    assert net.eval() is net
    assert net.train(False) is net
    with pytest.raises(ValueError, match="train the one that was saved"):
        net.train()
    assert all(isinstance(value, nn.Parameter) for value in net.parameters())
    assert len(list(net.parameters())) == 4


def test_hooks_and_every_operation_are_saved(tmp_path):
    """There is no list of layers or functions."""

    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.GRU(3, 4, batch_first=True)
            self.body.register_forward_hook(lambda module, args, output: output[0].cumsum(1))

        def forward(self, x):
            return torch.fft.rfft(self.body(x), dim=1).abs()

    net, x = Unusual(), torch.randn(2, 5, 3)
    assert torch.allclose(load(save(net, tmp_path, example=x))(x), net(x), atol=1e-6)


def test_overwriting(tmp_path):
    first, second = mlp([3, 2]), mlp([4, 2])
    one, two = {"example": torch.zeros(1, 3)}, {"example": torch.zeros(1, 4), "overwrite": True}
    save(first, tmp_path, **one)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty.*overwrite=True"):
        save(second, tmp_path, **one)

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    # A network that cannot be saved does no harm either.
    with pytest.raises(ValueError, match="Branching cannot be exported"):
        save(Branching(), tmp_path, **two)
    with pytest.raises(ValueError, match="Out of range float"):
        save(second, tmp_path, metadata={"accuracy": float("nan")}, **two)
    with pytest.raises(TypeError, match="cannot write a object as JSON"):
        save(second, tmp_path, metadata={"data": object()}, **two)
    assert load(tmp_path)(torch.zeros(1, 3)).shape == (1, 2)
    save(second, tmp_path, **two)
    assert load(tmp_path)(torch.zeros(1, 4)).shape == (1, 2)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="is a file"):
        save(first, tmp_path / "notes.txt", **one)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "does not describe an exported network"),
        (lambda c: c.update(format_version=3), "format version 3, this version reads 2"),
        (lambda c: c.update(format_version=1), "was written by an earlier version"),
        (lambda c: c.pop("files"), "does not list the folder's files"),
        (lambda c: c["files"].pop("model.pt2"), "does not list the folder's files"),
        (
            lambda c: c["files"].update({"../other.pt2": {}}),
            r"lists '\.\./other\.pt2', which is none",
        ),
        (lambda c: c["files"].update({"/etc/passwd": {}}), "lists '/etc/passwd', which is none"),
        (lambda c: c["files"].update({"model.onnx": {}}), "does not have the digest of model.onnx"),
    ],
)
def test_folders_that_are_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(FormatError, match=message):
        load(folder)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(folder, name):
    path = folder / name
    content = path.read_bytes()
    assert load(folder)(torch.zeros(1, 3)).shape == (1, 2)
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for wrong, message in (
        (flipped, "is damaged: it does not have the digest"),
        (content[:-1], f"is damaged: it has {len(content) - 1} bytes, {len(content)} were written"),
        (content + b"0", "is damaged: it has"),
        (b"", "is damaged: it has 0 bytes"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(FormatError, match=message):
            load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        load(folder)
    (folder / "aside").write_bytes(content)
    path.symlink_to(folder / "aside")
    with pytest.raises(FormatError, match=f"{name} is a link to another file"):
        load(folder)


def test_a_description_that_is_damaged(folder):
    path = folder / "config.json"
    content = path.read_text()
    for wrong in ("{", "[" * 10**6, "\\"):
        path.write_text(wrong)
        with pytest.raises(FormatError, match="is not valid JSON"):
            load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load(folder)
    (folder / "aside").write_text(content)
    path.symlink_to(folder / "aside")
    with pytest.raises(FormatError, match="is a link to another file"):
        load(folder)


def test_a_card_may_be_edited(folder):
    (folder / "README.md").write_text("mine")
    assert load(folder)(torch.zeros(1, 3)).shape == (1, 2)
    assert reference(folder)(torch.zeros(1, 3)).shape == (1, 2)
