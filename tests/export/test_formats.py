"""ONNX and torch.export files: right at every batch size, no pickle, no harm when they fail."""

import importlib.util
import pickletools
import subprocess
import sys
import zipfile

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pyro_sparse.export import compact_network, load, save
from pyro_sparse.export import save as save_function
from pyro_sparse.export.check import example_inputs, input_of, largest_difference
from pyro_sparse.export.program import _pickles, export_program, write_program
from pyro_sparse.graph import groups
from pyro_sparse.nets import lenet5_caffe, mlp

save_module = sys.modules[save_function.__module__]


def run_onnx(folder, x):
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])


def run_program(folder, x):
    return torch.export.load(folder / "model.pt2").module()(x)


class Residual(nn.Module):
    """What small images' networks are made of, and a tensor that is not a layer's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = x + nn.functional.silu(self.depthwise(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)) * self.scale


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.embedding(x).mean(1))


def compacted():
    """LeNet-5 with a sigmoid, so that constants are folded, and half of its units."""
    net = lenet5_caffe("sigmoid", in_channels=2, size=16, widths=(6, 8, 9))
    graph = groups(net, torch.zeros(2, 2, 16, 16))
    keep = {name: torch.arange(graph[name].size) % 2 == 0 for name in ("conv1", "conv2", "fc1")}
    return compact_network(net, graph, {}, keep)


def residual():
    net = Residual()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


NETWORKS = {
    "compact": (compacted, torch.zeros(1, 2, 16, 16)),
    "residual": (residual, torch.randn(5, 2, 6, 6)),
    "words": (Words, torch.arange(7).reshape(7, 1).expand(7, 5)),
    "double": (lambda: mlp([4, 3, 2]).double(), torch.zeros(1, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_formats(name, tmp_path):
    make, example = NETWORKS[name]
    net = make()
    folder = save(net, tmp_path / "net", onnx=True, pt2=True, example=example)
    for batch in (1, 3, 64):
        x = example_inputs(example, batch)
        expected = net(x)
        assert (run_onnx(folder, x) - expected).abs().max() <= 1e-5
        assert (run_program(folder, x) - expected).abs().max() <= 1e-5
    # Nothing of the machine that wrote them, and no pickle.
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(tmp_path).encode() not in content
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        for part in archive.namelist():
            content = archive.read(part)
            assert b".py" not in content
            assert not is_pickle(content), part
            assert content[:2] != b"PK", part
    assert load_file(folder / "model.safetensors").keys() == net.state_dict().keys()


def is_pickle(content):
    """Whether the bytes are a pickle from first to last."""
    try:
        *_, (last, _, position) = pickletools.genops(content)
    except (ValueError, IndexError, UnicodeDecodeError):
        return False
    return last.name == "STOP" and position == len(content) - 1


def test_a_pickle_would_be_found(tmp_path):
    # What torch writes by itself holds its example inputs as one.
    torch.export.save(export_program(mlp([3, 2]), torch.zeros(1, 3)), tmp_path / "plain.pt2")
    found = _pickles((tmp_path / "plain.pt2").read_bytes())
    assert found
    assert all("sample_inputs" in name for name in found)
    write_program(mlp([3, 2]), torch.zeros(1, 3), tmp_path / "ours.pt2")
    assert _pickles((tmp_path / "ours.pt2").read_bytes()) == []


def test_a_torch_that_pickles_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "save", lambda program, path: torch.save([1], path))
    with pytest.raises(ValueError, match=r"writes pickles into \.pt2 files"):
        save(mlp([3, 2]), tmp_path / "net", pt2=True, example=torch.zeros(1, 3))
    assert not list(tmp_path.iterdir())


# What a stranger does with the folder, where neither package can be imported.
STRANGER = """
import re, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pyro", "pyro_sparse"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Blocked())
try:
    import pyro_sparse
except ImportError:
    pass
else:
    raise AssertionError("the package is not blocked")

import torch
from safetensors.torch import save_file

results = {}
for block in re.findall("```python\\n(.*?)```", open("README.md").read(), re.DOTALL):
    names = {}
    exec(block, names)
    outputs = torch.as_tensor(names["outputs"]).detach().contiguous()
    results[str(len(results))] = outputs
save_file(results, sys.argv[1])
"""


def test_the_model_cards_code_runs_without_this_package(tmp_path):
    net = compacted()
    net.input_shape = (2, 16, 16)
    folder = save(net, tmp_path / "net", onnx=True, pt2=True)
    result = tmp_path / "result.safetensors"
    subprocess.run([sys.executable, "-c", STRANGER, result], check=True, cwd=folder, env={})
    outputs = load_file(result)
    assert len(outputs) == 3  # safetensors, ONNX Runtime, torch.export
    for output in outputs.values():
        assert (output - net(torch.zeros(2, 2, 16, 16))).abs().max() <= 1e-5


# -- what fails does no harm -----------------------------------------------------------------------


class OneBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 3) * 2


class ByBatch(nn.Module):
    """Right for any batch in torch, whatever an exporter makes of it."""

    def forward(self, x):
        return x * x.size(0)


@pytest.fixture
def folder(tmp_path):
    """An exported folder with every file, and the bytes of each."""
    folder = save(mlp([3, 4, 2]), tmp_path / "net", onnx=True, pt2=True, example=torch.zeros(1, 3))
    (folder / "bench.json").write_text("{}")
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def test_failures_leave_the_folder_as_it_was(folder, monkeypatch):
    folder, before = folder
    options = {"onnx": True, "pt2": True, "overwrite": True}

    def unchanged():
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        return {path.name: path.read_bytes() for path in folder.iterdir()} == before

    with pytest.raises(ValueError, match="pass example="):
        save(mlp([3, 2]), folder, **options)
    assert unchanged()
    with pytest.raises(ValueError, match="expected example to be a tensor"):
        save(mlp([3, 2]), folder, example=torch.zeros(()), **options)
    with pytest.raises(ValueError, match="free batch size"):
        save(OneBatch(), folder, example=torch.randn(2, 3), **options)
    assert unchanged()
    monkeypatch.setattr(save_module, "onnx_runner", lambda path: lambda x: torch.ones(len(x), 2))
    with pytest.raises(ValueError, match=r"model\.onnx differs from torch by"):
        save(mlp([3, 2]), folder, example=torch.zeros(1, 3), **options)
    assert unchanged()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    message = r"need onnxscript: pip install 'pyro-sparse\[onnx\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        save(mlp([3, 2]), folder, example=torch.zeros(1, 3), **options)
    assert unchanged()


def test_overwriting_leaves_nothing_of_the_earlier_export(folder):
    folder, before = folder
    save(mlp([4, 2]), folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "load.py", "model.safetensors", "README.md")
    }
    assert load(folder).out.in_features == 4
    assert "model.onnx" in before


def test_the_batch_size_is_free_or_refused():
    with pytest.raises(ValueError, match="cannot be exported with a free batch size"):
        export_program(OneBatch(), torch.randn(2, 3))
    program = export_program(ByBatch(), torch.zeros(1, 3)).module()
    assert torch.equal(program(torch.ones(5, 3)), torch.full((5, 3), 5.0))


def test_comparison():
    net, example = mlp([3, 4, 2]), torch.zeros(1, 3)
    same = largest_difference(net, net, example, "itself")
    assert same["max_abs_diff"] == 0
    assert same["max_abs_output"] > 0

    def off(x):
        return net(x) + 5e-6

    assert largest_difference(net, off, example, "nearly")["max_abs_diff"] > 1e-6
    for wrong, message in (
        (lambda x: net(x) + 1e-3, "wrong differs from torch by 0.001"),
        (lambda x: net(x) * float("nan"), "wrong differs from torch by nan"),
        (lambda x: net(x[:1]), r"returns shape \(1, 2\) for a batch of 3.*fixed batch size"),
        (lambda x: net(x[:, :2]), "wrong does not run on a batch of 1, which torch does"),
    ):
        with pytest.raises(ValueError, match=message):
            largest_difference(net, wrong, example, "wrong")

    with pytest.raises(ValueError, match=r"OneBatch does not run on inputs of shape \(1, 3\)"):
        largest_difference(OneBatch(), net, example, "other")


def test_example_inputs():
    one = example_inputs(torch.zeros(1, 2, 3), 4)
    assert one.shape == (4, 2, 3)
    assert one.std() > 0.5
    assert torch.equal(one, example_inputs(torch.zeros(1, 2, 3), 4))
    # Equal inputs say no more than one.
    assert example_inputs(torch.zeros(3, 2), 4).std() > 0.5
    several = torch.tensor([[1.0], [2.0], [3.0]])
    assert set(example_inputs(several, 64).flatten().tolist()) == {1.0, 2.0, 3.0}
    assert example_inputs(torch.tensor([[5]]), 3).tolist() == [[5], [5], [5]]


def test_input_of():
    net = mlp([3, 2]).double()
    assert input_of(net, None) is None
    net.input_shape = (3,)
    assert input_of(net, None).shape == (1, 3)
    assert input_of(net, None).dtype == torch.float64
    assert input_of(net, torch.ones(2, 3)).shape == (2, 3)


def test_saving_leaves_the_network_as_it_was(tmp_path):
    net = residual().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    save(net, tmp_path / "net", pt2=True, example=torch.zeros(1, 2, 6, 6), dense=net)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    x = torch.randn(3, 2, 6, 6)
    save_file({"x": x}, tmp_path / "x.safetensors")
    assert torch.equal(load(tmp_path / "net")(x), net.eval()(x))
