"""load: each kind of data set, from files made here and from the real ones where they are."""

import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyro_sparse.data import Dataset, load

GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.randn(30, 4, generator=GENERATOR, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRO_SPARSE_DATA", raising=False)


def rows_of(data: Dataset) -> list[bytes]:
    return [
        x.numpy().tobytes() for part in (data.train, data.validation, data.test) for x in part.x
    ]


def write_idx(path: Path, values: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def write_images(root: Path, folder: str = "MNIST") -> tuple[Tensor, Tensor]:
    """60 training and 20 test images in torchvision's layout; returns all."""
    x = torch.randint(0, 256, (80, 28, 28), generator=GENERATOR, dtype=torch.uint8)
    y = torch.arange(80) % 10
    for part, rows in (("train", slice(0, 60)), ("t10k", slice(60, 80))):
        write_idx(root / folder / "raw" / f"{part}-images-idx3-ubyte", x[rows])
        write_idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte", y[rows])
    return x, y


def write_uci(root: Path, name: str = "tiny", table: Tensor = TABLE) -> Path:
    """Columns 0, 1, 3 are features, 2 is the target; splits 0 and 1 test on rows 0-5 and 6-11."""
    folder = root / "uci" / name
    folder.mkdir(parents=True)
    lines = ["\t".join(map(repr, row)) + " \n" for row in table.tolist()]
    (folder / "data.txt").write_text("".join(lines) + "\n")
    (folder / "index_features.txt").write_text("0\n1\n3\n")
    (folder / "index_target.txt").write_text("2\n")
    for split in (0, 1):
        test = range(6 * split, 6 * split + 6)
        train = [row for row in range(len(table)) if row not in test]
        (folder / f"index_test_{split}.txt").write_text("\n".join(map(str, test)))
        (folder / f"index_train_{split}.txt").write_text("\n".join(map(str, train)))
    return folder


# Embedded


def test_digits() -> None:
    data = load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 144, 359)
    assert (data.task, data.classes, data.outputs) == ("classification", 10, 10)
    assert data.input_shape == (1, 8, 8)
    assert (data.train.x.dtype, data.train.y.dtype) == (torch.float32, torch.int64)
    assert (data.train.x.min().item(), data.train.x.max().item()) == (0.0, 1.0)
    for part in (data.train, data.validation, data.test):  # stratified: each class about a tenth
        share = part.y.bincount(minlength=10) / len(part)
        assert (share - 0.1).abs().max() < 0.01
    assert len(set(rows_of(data))) == 1797  # no two images are the same: disjoint and complete


def test_diabetes() -> None:
    data = load("diabetes")
    assert (len(data.train), len(data.validation), len(data.test)) == (319, 35, 88)
    assert (data.task, data.classes, data.outputs) == ("regression", None, 1)
    assert data.input_shape == (10,)
    assert data.feature_names == ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
    assert data.train.y.dtype == torch.float32
    assert len(set(rows_of(data))) == 442
    target = data.preprocessing["target"]
    assert 60 < target["std"] < 90  # in the target's own unit
    raw = torch.cat([data.train.y, data.validation.y, data.test.y]) * target["std"] + target["mean"]
    assert raw.min().item() == pytest.approx(25, abs=1e-3)
    assert raw.max().item() == pytest.approx(346, abs=1e-3)


@pytest.mark.parametrize("name", ["digits", "diabetes"])
def test_the_seed_chooses_the_validation_rows_and_nothing_else(name: str) -> None:
    def raw(data: Dataset, part: str) -> Tensor:
        facts = data.preprocessing["inputs"]
        x: Tensor = getattr(data, part).x.double()
        return x * torch.tensor(facts["std"]) + torch.tensor(facts["mean"])

    one, again, other = load(name, seed=1), load(name, seed=1), load(name, seed=2)
    assert rows_of(one) == rows_of(again)
    assert not torch.equal(one.validation.y, other.validation.y)
    torch.testing.assert_close(raw(one, "test"), raw(other, "test"), rtol=1e-5, atol=1e-5)
    if one.classes is not None:
        assert torch.equal(one.test.y, other.test.y)
    without = load(name, validation=0.0)
    assert len(without.validation) == 0
    assert len(without.train) == len(one.train) + len(one.validation)


# Images in torchvision's layout


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_images_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    x, y = write_images(tmp_path, folder)
    monkeypatch.setenv("PYRO_SPARSE_DATA", str(tmp_path))
    data = load(name, validation=1 / 6)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 10, 20)
    assert (data.input_shape, data.classes) == ((1, 28, 28), 10)
    assert data.validation.y.bincount().tolist() == [1] * 10
    assert torch.equal(data.test.y, y[60:])
    facts = data.preprocessing["inputs"]
    torch.testing.assert_close(
        data.test.x[:, 0].double() * facts["std"] + facts["mean"],
        x[60:].double() / 255,
        rtol=0,
        atol=1e-6,
    )
    assert len(set(rows_of(data))) == 80


def test_missing_images_say_where_and_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load("mnist", tmp_path)
    message = str(error.value)
    for word in (
        str(tmp_path / "MNIST" / "raw"),
        "train-images-idx3-ubyte",
        "--data-root",
        "PYRO_SPARSE_DATA",
        "--download",
    ):
        assert word in message
    write_images(tmp_path)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="which lacks t10k-labels-idx1-ubyte"):
        load("mnist", tmp_path)


def test_damaged_images(tmp_path: Path) -> None:
    write_images(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = file.read_bytes()
    for damaged in (content[:1000], b"not an IDX file", b""):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"raw is damaged: .* fetch the files again"):
            load("mnist", tmp_path)
    write_idx(file, torch.zeros(59, 28, 28))
    with pytest.raises(ValueError, match="59 images, but there are 60 labels"):
        load("mnist", tmp_path)


def test_download_only_when_asked_and_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    calls = []

    def download(self: datasets.MNIST) -> None:
        calls.append(self.root)
        write_images(tmp_path)

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with pytest.raises(FileNotFoundError):
        load("mnist", tmp_path)
    assert not calls
    assert len(load("mnist", tmp_path, download=True).test) == 20
    load("mnist", tmp_path, download=True)
    assert len(calls) == 1


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def download(self: datasets.MNIST) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with pytest.raises(ConnectionError, match=r"could not download train-images.*no route to host"):
        load("mnist", tmp_path, download=True)


# UCI


def test_uci_splits_are_the_official_ones(tmp_path: Path) -> None:
    write_uci(tmp_path)
    for split in (0, 1):
        data = load("uci:tiny", tmp_path, split=split, validation=0.25)
        assert (len(data.train), len(data.validation), len(data.test)) == (18, 6, 6)
        inputs, target = data.preprocessing["inputs"], data.preprocessing["target"]
        rows = slice(6 * split, 6 * split + 6)
        x = data.test.x.double() * torch.tensor(inputs["std"]) + torch.tensor(inputs["mean"])
        y = data.test.y.double() * target["std"] + target["mean"]
        torch.testing.assert_close(x, TABLE[rows][:, [0, 1, 3]], rtol=0, atol=1e-6)
        torch.testing.assert_close(y, TABLE[rows, 2], rtol=0, atol=1e-6)
        assert len(set(rows_of(data))) == 30


def test_uci_name_and_split_errors(tmp_path: Path) -> None:
    write_uci(tmp_path, "concrete")
    write_uci(tmp_path, "yacht")
    with pytest.raises(FileNotFoundError, match=r"Did you mean concrete\? Known: concrete, yacht"):
        load("uci:concret", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Known: none.*data\.txt.*--data-root"):
        load("uci:concrete", tmp_path / "elsewhere")
    for split in (2, -1):
        with pytest.raises(ValueError, match=f"which are 0, 1; got {split}"):
            load("uci:yacht", tmp_path, split=split)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data.txt", "\n", r"data\.txt: empty"),
        ("data.txt", "1 2 3 4\n1 2 3\n", "row 2 has 3 columns, expected 4"),
        ("data.txt", "1 2 three 4\n", "could not convert string to float: 'three'"),
        ("data.txt", "1 2 3 4\n" * 29 + "1 nan 3 4\n", "1 of 90 values of x .* row 29, column 1"),
        ("data.txt", "1 2 3 4\n" * 29 + "1 2 inf 4\n", "1 of 30 values of y .* row 29"),
        ("data.txt", "1 2 3 4\n", r"index_train_0.txt: expected row numbers 0\.\.0, got 6"),
        ("index_features.txt", "0\n4\n", r"expected column numbers 0\.\.3, got 4"),
        ("index_features.txt", "0\n0.5\n", "got 0.5"),
        ("index_features.txt", "0\n2\n", "one column that index_features.txt does not name"),
        ("index_test_0.txt", "0\n7\n", r"1 of its rows are test rows too \(the first is 7\)"),
        ("index_train_0.txt", "7\n8\n8\n", "expected each row once"),
    ],
)
def test_bad_uci_files(tmp_path: Path, file: str, content: str, message: str) -> None:
    (write_uci(tmp_path) / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load("uci:tiny", tmp_path)


def test_missing_uci_index(tmp_path: Path) -> None:
    (write_uci(tmp_path) / "index_target.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"index_target\.txt, which lists column numbers"):
        load("uci:tiny", tmp_path)


# CSV


def write_csv(path: Path, targets: list[str], header: str = "") -> str:
    lines = [f"{a:.6f}, {b:.6f},{y}\n" for (a, b), y in zip(TABLE[:, :2], targets, strict=True)]
    path.write_text(header + "".join(lines), encoding="utf-8-sig")
    return f"csv:{path}"


def test_csv_with_whole_targets_is_classification(tmp_path: Path) -> None:
    name = write_csv(tmp_path / "a.csv", ["3", "5", "-1"] * 10, "width, height,kind\n")
    data = load(name, validation=0.25)
    assert (data.task, data.classes) == ("classification", 3)
    assert data.feature_names == ("width", "height")
    assert data.preprocessing["target"] == {"labels": [-1, 3, 5]}
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 6, 6)
    assert data.test.y.bincount().tolist() == [2, 2, 2]
    assert data.train.y.dtype == torch.int64
    inputs = data.preprocessing["inputs"]
    x = data.train.x.double() * torch.tensor(inputs["std"]) + torch.tensor(inputs["mean"])
    for row, label in zip(x, data.train.y, strict=True):  # each row kept its own label
        original = (TABLE[:, :2] - row).abs().sum(1).argmin()
        assert int(label) == [1, 2, 0][original % 3]


@pytest.mark.parametrize(
    "targets",
    [["3.0", "5.0", "1.0"] * 10, [str(i) for i in range(30)], ["7"] * 30],
    ids=["written with a point", "too many values", "one value"],
)
def test_other_csv_is_regression(tmp_path: Path, targets: list[str]) -> None:
    data = load(write_csv(tmp_path / "a.csv", targets))
    assert (data.task, data.classes, data.outputs) == ("regression", None, 1)
    assert data.feature_names is None
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows of numbers"),
        ("a,b\n", "no rows of numbers"),
        ("1\n2\n", "one column; .* separated by commas"),
        ("1,2,3\n1,2\n", "line 2: 2 columns, expected 3"),
        ("a,b,y\n1,2,3\n\n1,,3\n2,1,3\n2,2,3\n4,5,6", "line 4, column 'b': a value is missing"),
        ("1,2,3\n1,nan,3\n2,1,3\n2,2,3\n4,5,6\n", "line 2, column 2: a value is missing"),
        ("1,2,3\n1,x,3\n2,1,3\n2,2,3\n4,5,6\n", "line 2, column 2: expected a number, got 'x'"),
        ("1,2,3\n1,inf,3\n2,1,3\n2,2,3\n4,5,6\n", "line 2, column 2: expected a finite number"),
        ("1,2,3\n1,2,4\n", "2 rows are too few to hold out test rows"),
    ],
)
def test_bad_csv_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(f"csv:{file}", missing="refuse")


def test_missing_csv_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none.csv")):
        load("csv:none.csv")


# Names and arguments


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digit",
            r"unknown data set 'digit'. Did you mean digits\? Known: digits, diabetes, mnist",
        ),
        ("MNIST", r"Did you mean mnist or fashion-mnist\?"),
        ("fashion_mnist", r"Did you mean fashion-mnist"),
        ("uci", r"Did you mean uci:NAME"),
        ("csv:", r"Did you mean csv:FILE"),
        ("zzz", r"unknown data set 'zzz'. Known: .*folder:DIR\."),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name)


@pytest.mark.parametrize("name", ["mnist", "uci:concrete"])
def test_no_data_root(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data-root DIR .* PYRO_SPARSE_DATA") as error:
        load(name)
    assert ("--download" in str(error.value)) == (name == "mnist")


@pytest.mark.parametrize("validation", [-0.1, 1.0, float("nan")])
def test_validation_share_out_of_range(validation: float) -> None:
    with pytest.raises(ValueError, match="validation share of at least 0 and below 1"):
        load("digits", validation=validation)


def test_split_where_there_is_only_one() -> None:
    with pytest.raises(ValueError, match="digits has a single split"):
        load("digits", split=1)


# The real files


def test_real_mnist(data_root: Path) -> None:
    if not (data_root / "MNIST").is_dir():
        pytest.skip(f"needs {data_root / 'MNIST'}")
    data = load("mnist", data_root)
    assert (len(data.train), len(data.validation), len(data.test)) == (54_000, 6_000, 10_000)
    assert data.train.x.mean().item() == pytest.approx(0.1307, abs=1e-3)
    assert data.train.x.std().item() == pytest.approx(0.3081, abs=1e-3)
    assert data.test.y[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [
        ("concrete", (8,), 1030),
        ("energy", (8,), 768),
        ("wine-quality-red", (11,), 1599),
        ("yacht", (6,), 308),
    ],
)
def test_real_uci(data_root: Path, name: str, shape: tuple[int, ...], rows: int) -> None:
    if not (data_root / "uci" / name).is_dir():
        pytest.skip(f"needs {data_root / 'uci' / name}")
    tests = []
    for split in range(5):
        data = load(f"uci:{name}", data_root, split=split)
        assert (data.task, data.input_shape) == ("regression", shape)
        assert len(data.train) + len(data.validation) + len(data.test) == rows
        tests.append(tuple(data.test.y.tolist()))
    assert len(set(tests)) == 5


# Folders of images, and CIFAR-10


def write_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), size: int = 6) -> Path:
    from PIL import Image

    generator = torch.Generator().manual_seed(1)
    for part, count in (("train", 5), ("test", 2)):
        for name in classes:
            (root / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = torch.randint(256, (size, size, 3), generator=generator)
                image = Image.fromarray(pixels.to(torch.uint8).numpy())
                image.save(root / part / name / f"{i}.png")
    return root


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    folder = write_folder(tmp_path / "pets")
    data = load(f"folder:{folder}", validation=0.4)
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 4, 4)
    assert (data.input_shape, data.classes) == ((3, 6, 6), 2)
    assert data.test.y.tolist() == [0, 0, 1, 1]
    assert data.preprocessing["target"] == {"labels": ["cat", "dog"]}
    first = torch.tensor(list(Image.open(folder / "test/cat/0.png").tobytes())).reshape(6, 6, 3)
    assert torch.allclose(data.test.x[0], first.permute(2, 0, 1) / 255)
    # A relative path is looked for in the data root as well.
    monkeypatch.setenv("PYRO_SPARSE_DATA", str(tmp_path))
    assert len(load("folder:pets").test) == 4


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found no train and no test"):
        load(f"folder:{tmp_path}")
    write_folder(tmp_path)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "cow")
    with pytest.raises(ValueError, match="expected the same classes in train and test"):
        load(f"folder:{tmp_path}")
    (tmp_path / "test" / "cow").rename(tmp_path / "test" / "cat")
    write_folder(tmp_path / "large", size=7)
    (tmp_path / "large/test/cat/0.png").rename(tmp_path / "test/cat/0.png")
    with pytest.raises(ValueError, match=r"images of one size.*\(3, 6, 6\).*\(3, 7, 7\)"):
        load(f"folder:{tmp_path}")
    (tmp_path / "test/cat").rename(tmp_path / "kept")
    (tmp_path / "test/cat").mkdir()
    with pytest.raises(ValueError, match="cat"):
        load(f"folder:{tmp_path}")


def test_cifar10_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py.*--download"):
        load("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match="missing or damaged"):
        load("cifar10", tmp_path)

    class Stub:
        """As torchvision's class: arrays of pixels, channels last."""

        classes = ["plane", "car"]

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            count = 10 if train else 4
            self.data = (torch.arange(count * 32 * 32 * 3) % 251).to(torch.uint8)
            self.data = self.data.reshape(count, 32, 32, 3).numpy()
            self.targets = [i % 2 for i in range(count)]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stub)
    data = load("cifar10", tmp_path, validation=0.2)
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 2, 4)
    assert data.input_shape == (3, 32, 32)
    assert torch.allclose(data.test.x[0, :, 0, 1] * 255, torch.tensor([3.0, 4.0, 5.0]))
