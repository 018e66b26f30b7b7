"""A .pt2 file is read as data: whatever would run, or make torch run something, is refused."""

import io
import json
import pickle
import zipfile

import pytest
import torch

from pyro_sparse.export.archive import FormatError, checked, hollowed
from pyro_sparse.export.check import input_of
from pyro_sparse.export.program import export_program, read_program, write_program
from pyro_sparse.nets import mlp

WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
PROGRAM = "models/model.json"


class Marks:
    """A pickle that would leave a mark."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The parts of a network's file, by name."""
    net = mlp([3, 4, 2])
    path = tmp_path_factory.mktemp("archive") / "model.pt2"
    write_program(export_program(net, input_of(net, torch.randn(2, 3))), path)
    with zipfile.ZipFile(path) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def packed(parts, **options):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, part in parts.items():
            file.writestr(f"model/{name}", part, **options)
    return made.getvalue()


def edited(archive, name, change):
    value = json.loads(archive[name])
    change(value)
    return {**archive, name: json.dumps(value).encode()}


def test_what_was_written_is_read(archive):
    net = read_program(packed(archive))
    assert net(torch.randn(5, 3)).shape == (5, 2)
    again = checked(packed(archive))
    assert checked(again) == again


def test_what_torch_writes_by_itself_holds_a_pickle():
    net = mlp([3, 2])
    program = export_program(net, input_of(net, torch.randn(2, 3))).program
    made = io.BytesIO()
    torch.export.save(program, made)
    with pytest.raises(FormatError, match="sample inputs, which are a pickle"):
        checked(made.getvalue())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (SAMPLES, "marks"),
        ("data/weights/model.pt", "marks"),
        ("data/constants/model.pt", "marks"),
        ("data/constants/custom_obj_0", "marks"),
        ("data/constants/opaque_obj_0", "marks"),
        ("data/aotinductor/model/model.so", b"\x7fELF"),
        ("extra/notes", b"text"),
        ("../outside", b"text"),
    ],
)
def test_files_that_are_not_a_networks(archive, tmp_path, name, content):
    if content == "marks":
        content = pickle.dumps(Marks(tmp_path / "mark"))
    with pytest.raises(FormatError, match=r"model\.pt2 holds "):
        read_program(packed({**archive, name: content}))
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_pickles(archive, tmp_path):
    def change(config):
        next(iter(config["config"].values()))["use_pickle"] = True

    parts = edited(archive, WEIGHTS, change)
    parts["data/weights/weight_0"] = pickle.dumps(Marks(tmp_path / "mark"))
    with pytest.raises(FormatError, match="as a pickle, which is not read"):
        read_program(packed(parts))

    def elsewhere(config):
        config["config"]["more"] = {"path_name": "opaque_obj_0", "use_pickle": False}

    with pytest.raises(FormatError, match="'more' as a pickle"):
        read_program(packed(edited(archive, CONSTANTS, elsewhere)))
    assert not list(tmp_path.iterdir())


def node(number=0, **values):
    return lambda program: program["graph_module"]["graph"]["nodes"][number].update(values)


def signature(**values):
    def change(program):
        program["graph_module"]["module_call_graph"][0]["signature"].update(values)

    return change


def size(text):
    def change(program):
        values = program["graph_module"]["graph"]["tensor_values"]
        values["input"]["sizes"][0] = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}

    return change


def tree(type_, context):
    leaf = {"type": type_, "context": context, "children_spec": []}
    return signature(in_spec=json.dumps([1, leaf]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(guards_code=["__import__('os').abort()"]), "holds Python expressions"),
        (node(target="torch.load"), "names the operation 'torch.load'"),
        (node(target="torch.hub.load"), "names the operation"),
        (node(target="torch.ops.load_library"), "names the operation"),
        (node(target="torch.ops.aten.from_file.default"), "names the operation"),
        (node(target="torch.ops.aten.linear.__class__"), "names the operation"),
        (node(target="torch.ops.other.linear.default"), "names the operation"),
        (node(target="_operator.methodcaller"), "names the operation"),
        (node(metadata={"torch_fn": "x"}), "holds notes on its operations"),
        (node(outputs=[{"as_tensor": {"name": "x=print()"}}]), "something called 'x=print"),
        (
            node(inputs=[{"name": "a", "arg": {"as_operator": "torch.load"}, "kind": 1}]),
            "operation",
        ),
        (node(inputs=[{"name": "a", "arg": {"as_custom_obj": {"name": "o"}}}]), "holds objects"),
        (size("__import__('os').abort()"), "names a size"),
        (size("open(s0)"), "names a size"),
        (size("s0.__class__"), "names a size"),
        (signature(forward_arg_names=["x=print()"]), "something called 'x=print"),
        (tree("collections.defaultdict", "{}"), "a structure of type 'collections.defaultdict'"),
        (tree("builtins.dict", '["x=print()"]'), "something called 'x=print"),
        (tree("builtins.dict", '[{"__enum__": true, "fqn": "os:name"}]'), "is unclear"),
        (lambda p: p.clear(), "does not describe a network"),
    ],
)
def test_programs_that_are_refused(archive, change, message):
    with pytest.raises(FormatError, match=message):
        checked(packed(edited(archive, PROGRAM, change)))


def test_damage(archive):
    content = packed(archive)
    for wrong in (b"", content[:-40], content[: len(content) // 2], b"PK" + content[:9]):
        with pytest.raises(FormatError, match="is damaged"):
            checked(wrong)
    with pytest.raises(FormatError, match="is no stored part"):
        checked(packed(archive, compress_type=zipfile.ZIP_DEFLATED))
    with pytest.raises(FormatError, match="is missing"):
        checked(packed({name: part for name, part in archive.items() if name != PROGRAM}))
    with pytest.raises(FormatError, match="not valid JSON"):
        checked(packed({**archive, PROGRAM: b"[" * 10**6}))
    # As long as was written, but not what torch knows.
    with pytest.raises(FormatError, match="does not read"):
        read_program(packed(edited(archive, PROGRAM, node(target="math.nothing"))))


def test_sizes_are_not_believed(archive):
    """A weight without bytes would be made of as many zeros as are declared."""
    empty = {**archive, "data/weights/weight_0": b""}
    with pytest.raises(FormatError, match="12 numbers of its tensors are missing"):
        checked(packed(empty))
    hollow = hollowed(packed(archive))
    assert len(hollow) < len(packed(archive))
    net = read_program(hollow, hollow=True)
    assert not any(value.any() for value in net.parameters())

    def large(config):
        meta = next(iter(config["config"].values()))["tensor_meta"]
        meta["sizes"] = [{"as_int": 2**20}, {"as_int": 2**20}]

    with pytest.raises(FormatError, match="numbers of its tensors are missing"):
        checked(packed(edited(empty, WEIGHTS, large)), hollow=True)
