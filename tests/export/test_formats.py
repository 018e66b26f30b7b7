"""ONNX, int8 and torch.export files: right at every batch size, and no harm when they fail."""

import importlib.util
import json
import subprocess
import sys
import zipfile

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pyro_sparse.export import compact_network, load, read_config, save
from pyro_sparse.export import save as save_function
from pyro_sparse.export.check import example_rows, input_of, largest_difference
from pyro_sparse.export.scores import wilson
from pyro_sparse.graph import groups
from pyro_sparse.inputs import Inputs
from pyro_sparse.nets import lenet5_caffe, mlp

save_module = sys.modules[save_function.__module__]


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


class Several(nn.Module):
    """Inputs by name, one of them not needed; outputs by name, and something that is no tensor."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.o = nn.Embedding(9, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, numbers, words=None, *, scale=1.0, use_cache=True):
        h = self.a(numbers)
        if words is not None:
            h = h + self.table(words).mean(1)
        cache = object() if use_cache else None
        return {"logits": self.o(h.relu()) * scale, "hidden": (h, h.exp()), "cache": cache}


class OneBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 3) * 2


class ByBatch(nn.Module):
    """Right for any batch in torch, whatever an exporter makes of it."""

    def forward(self, x):
        return x * x.size(0)


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
    "several": (Several, {"numbers": torch.rand(4, 3), "words": torch.randint(9, (4, 5))}),
    "by batch": (ByBatch, torch.randn(2, 3)),
    "residual": (residual, torch.randn(5, 2, 6, 6)),
    "words": (Words, torch.arange(7).reshape(7, 1).expand(7, 5)),
    "double": (lambda: mlp([4, 3, 2]).double(), torch.zeros(1, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_formats(name, tmp_path):
    make, example = NETWORKS[name]
    net = make()
    folder = save(net, tmp_path / "net", onnx=True, example=example)
    config = read_config(folder)
    program, session = load(folder), onnxruntime.InferenceSession(str(folder / "model.onnx"))
    inputs = input_of(net, example)
    for batch in (1, 3, 64):
        rows = example_rows(inputs, batch)
        with torch.no_grad():
            expected = rows.call(net)
            got = Inputs(rows.args, {k: v for k, v in rows.kwargs.items() if v is not False}).call(
                program
            )
        arrays = {
            one["name"]: v.numpy() for one, v in zip(config["inputs"], rows.tensors, strict=True)
        }
        arrays = dict(zip(config["outputs"], session.run(None, arrays), strict=True))
        if name == "several":
            assert got.keys() == {"logits", "hidden_0", "hidden_1"}
            expected, got = expected["logits"], got["logits"]
        for other in (got, torch.from_numpy(arrays.get("logits", arrays.get("output")))):
            assert (other - expected).abs().max() <= 1e-5
    # Nothing of the machine that wrote them.
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(tmp_path).encode() not in content
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        assert not any(b".py" in archive.read(part) for part in archive.namelist())
    # The weights by the network's own names, in both files.
    assert load_file(folder / "model.safetensors").keys() == net.state_dict().keys()
    assert program.state_dict().keys() == net.state_dict().keys()


def test_a_batch_size_that_is_not_free(tmp_path):
    """It is that of the example, and the card says so."""
    folder = save(OneBatch(), tmp_path / "net", onnx=True, example=torch.randn(2, 3))
    assert read_config(folder)["batch"]["only"] == 2
    assert "it runs at a batch of 2 only (" in (folder / "README.md").read_text()
    x = torch.randn(2, 3)
    assert torch.equal(load(folder)(x), 2 * x)


def test_integers_are_never_invented(tmp_path):
    """Rows are those of the example, even where they are all alike."""
    seen = []

    class Watched(Words):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    example = torch.full((1, 5), 3)
    largest_difference(
        net := Watched(), lambda rows: {"output": net(*rows.args)}, input_of(net, example), "itself"
    )
    assert {int(value) for x in seen for value in x.flatten()} == {3}


# -- int8 ------------------------------------------------------------------------------------------


def test_int8(tmp_path):
    """Near the network, in a quarter of the bytes, with scores beside the others'."""
    torch.manual_seed(0)
    net = mlp([8, 64, 32, 3])
    x = torch.randn(300, 8)
    y = net(x).argmax(-1)
    folder = save(
        net, tmp_path / "net", int8=True, example=x[:50], calibration=x[:200], test=(x, y)
    )
    config = read_config(folder)
    assert config["files"]["model-int8.onnx"].keys() == {"bytes", "sha256"}
    test = config["test"]
    assert test["rows"] == 300
    for key in ("torch", "pt2", "onnx"):
        assert test["scores"][key]["accuracy"] == 1
    score = test["scores"]["int8"]
    assert 0.9 < score["low"] < score["accuracy"] <= score["high"] <= 1
    assert score["same"] == score["accuracy"]
    difference = config["formats"]["int8"]
    assert 1e-4 < difference["max_abs_diff"] < 0.1 * difference["max_abs_output"]
    session = onnxruntime.InferenceSession(str(folder / "model-int8.onnx"))
    (outputs,) = session.run(None, {"input": x.numpy()})
    assert (torch.from_numpy(outputs).argmax(-1) == y).double().mean() == score["accuracy"]
    card = (folder / "README.md").read_text()
    assert f"{score['accuracy']:.2%} ({score['low']:.2%}–{score['high']:.2%})" in card


def test_int8_of_numbers_and_of_nothing(tmp_path):
    net, x = mlp([3, 16, 1]), torch.randn(100, 3)
    y = net(x).detach()
    folder = save(net, tmp_path / "net", int8=True, example=x, test=(x, y))
    scores = read_config(folder)["test"]["scores"]
    assert scores["torch"]["rmse"] == 0
    assert 0 < scores["int8"]["rmse"] < 0.1 * float(y.std())
    with pytest.raises(ValueError, match="nothing in the network that ONNX Runtime quantises"):
        save(nn.Tanh(), tmp_path / "none", int8=True, example=x)
    with pytest.raises(ValueError, match=r"as many targets as inputs in test=, got 5 and 100"):
        save(net, tmp_path / "none", example=x, test=(x, y[:5]))
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_wilson():
    # Both ends solve |p̂ - p| = z √(p (1 - p) / n).
    for right, rows in ((0, 10), (7, 10), (990, 1000)):
        for end in wilson(right, rows):
            distance = abs(right / rows - end)
            assert distance == pytest.approx(1.959964 * (end * (1 - end) / rows) ** 0.5, abs=1e-6)


# What a stranger does with the folder, where neither package can be imported.
STRANGER = """
import json, re, sys

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

results = {}
for block in re.findall("```python\\n(.*?)```", open("README.md").read(), re.DOTALL):
    names = {}
    exec(block, names)
    results[str(len(results))] = names["outputs"].tolist()
json.dump(results, open(sys.argv[1], "w"))
"""


def test_the_model_cards_code_runs_without_this_package(tmp_path):
    net = compacted()
    net.input_shape = (2, 16, 16)
    folder = save(net, tmp_path / "net", int8=True)
    result = tmp_path / "result.json"
    subprocess.run([sys.executable, "-c", STRANGER, result], check=True, cwd=folder, env={})
    outputs = {key: torch.tensor(v) for key, v in json.loads(result.read_text()).items()}
    assert len(outputs) == 3  # torch, ONNX Runtime, int8
    for index, output in outputs.items():
        bar = 0.05 if index == "2" else 1e-5
        assert (output - net(torch.zeros(2, 2, 16, 16))).abs().max() <= bar


# -- what fails does no harm -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """An exported folder with every file, and the bytes of each."""
    folder = save(mlp([3, 4, 2]), tmp_path / "net", onnx=True, example=torch.zeros(1, 3))
    (folder / "bench.json").write_text("{}")
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def test_failures_leave_the_folder_as_it_was(folder, monkeypatch):
    folder, before = folder
    options = {"onnx": True, "overwrite": True}

    def unchanged():
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        return {path.name: path.read_bytes() for path in folder.iterdir()} == before

    with pytest.raises(ValueError, match="pass example="):
        save(mlp([3, 2]), folder, **options)
    assert unchanged()
    with pytest.raises(ValueError, match="expected example to be a tensor"):
        save(mlp([3, 2]), folder, example=torch.zeros(()), **options)
    with pytest.raises(ValueError, match="OneBatch does not run on inputs of shape"):
        save(OneBatch(), folder, example=torch.randn(3, 3), **options)
    assert unchanged()
    wrong = {"output": torch.ones(1, 2)}
    monkeypatch.setattr(save_module, "onnx_runner", lambda *given: lambda inputs: wrong)
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
    (folder / "load.py").write_text("# as earlier versions wrote it")
    save(mlp([4, 2]), folder, example=torch.zeros(1, 4), overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.pt2", "model.safetensors", "README.md")
    }
    assert load(folder)(torch.zeros(3, 4)).shape == (3, 2)
    assert "model.onnx" in before


def test_comparison():
    net = mlp([3, 4, 2])
    example = input_of(net, torch.zeros(1, 3))

    def runs(function):
        return lambda rows: {"output": function(*rows.args).detach()}

    same = largest_difference(net, runs(net), example, "itself")
    assert same["max_abs_diff"] == 0
    assert same["max_abs_output"] > 0
    assert 0 < same["rounding"] < 1e-6
    nearly = largest_difference(net, runs(lambda x: net(x) + 5e-6), example, "nearly")
    assert nearly["max_abs_diff"] > 1e-6
    for wrong, message in (
        (lambda x: net(x) + 1e-3, "wrong differs from torch by 0.001"),
        (lambda x: net(x) * float("nan"), "wrong differs from torch by inf"),
        (lambda x: net(x[:1]), r"returns shape \(1, 2\) for a batch of 3.*fixed batch size"),
        (lambda x: net(x[:, :2]), "wrong does not run on a batch of 1, which torch does"),
    ):
        with pytest.raises(ValueError, match=message):
            largest_difference(net, runs(wrong), example, "wrong")


def test_a_network_that_rounds_is_given_its_rounding():
    """Outputs of 1 that are differences of large numbers."""

    class Cancelling(nn.Module):
        def forward(self, x):
            return (x + 3e3) * 1.1 - 3.3e3

    net = Cancelling()
    example = input_of(net, torch.randn(5, 2))
    found = largest_difference(
        net, lambda rows: {"output": net(*rows.args) + 2e-4}, example, "another"
    )
    assert found["rounding"] > 5e-5


def test_example_rows():
    def rows(example, batch):
        (value,) = example_rows(input_of(nn.Tanh(), example), batch).args
        return value

    one = rows(torch.zeros(1, 2, 3), 4)
    assert one.shape == (4, 2, 3)
    assert one.std() > 0.5
    assert torch.equal(one, rows(torch.zeros(1, 2, 3), 4))
    # What is not 0 was meant.
    assert torch.equal(rows(torch.ones(3, 2), 4), torch.ones(4, 2))
    several = torch.tensor([[1.0], [2.0], [3.0]])
    assert set(rows(several, 64).flatten().tolist()) == {1.0, 2.0, 3.0}
    assert rows(torch.tensor([[0]]), 3).tolist() == [[0], [0], [0]]


def test_input_of():
    net = mlp([3, 2]).double()
    with pytest.raises(ValueError, match="pass example="):
        input_of(net, None)
    net.input_shape = (3,)
    (value,) = input_of(net, None).args
    assert value.shape == (2, 3)
    assert value.dtype == torch.float64
    net.example = torch.ones(4, 3, dtype=torch.float64)
    assert torch.equal(input_of(net, None).args[0], net.example)
    assert input_of(net, torch.ones(2, 3)).args[0].shape == (2, 3)


def test_saving_leaves_the_network_as_it_was(tmp_path):
    net = residual().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    save(net, tmp_path / "net", example=torch.zeros(1, 2, 6, 6), dense=net)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(load(tmp_path / "net")(x), net.eval()(x))
