"""What is wrong is refused before anything is trained, and by whom it was written."""

import json

import pytest

from pyro_sparse import infer
from pyro_sparse.names import OPTIMIZERS, SCHEDULES
from pyro_sparse.runs import experiment
from pyro_sparse.runs.comparison import compare
from pyro_sparse.runs.settings import settings_for

WRONG = {
    "schedule=cosin": "Did you mean cosine",
    "optimizer=adamw": "Did you mean adam",
    "precision=fp16": "unknown precision",
    "epochs=0": "epochs to be at least 1",
    "batch-size=-1": "batch_size to be at least 1",
    "num-particles=0": "num_particles to be at least 1",
    "lr=-1": "lr to be a positive number",
    "lr=nan": "lr to be a positive number",
    "inclusion-lr=0": "inclusion_lr to be a positive number",
    "noise-rate=0": "noise_rate to be a positive number",
    "kl-hold=0.9,kl-rise=0.9": "kl_hold . kl_rise ≤ 1",
    "inclusion-hold=0.9,inclusion-stop=0.5": "inclusion_hold ≤ inclusion_stop",
    "prune-every=-1": "prune_every to be at least 0",
    "retrain=0": "retrain to be a share",
    "rule=snr": "signal-to-noise rule needs",
    "rule=nothing": "unknown rule",
    "net=mpl:4": "Did you mean mlp",
    "net=vgg": "square images",
    "slab-scale=-1": "positive",
    "slab-scale=wide": "expected a positive slab_scale or 'learnt'",
    "variance=fll": "variance",
    "guide=mtched": "Did you mean matched",
    "epochs=1.5": "epochs must be a whole number",
    "epochs=1,epochs=2": "epochs is there twice",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_entry_is_checked_before_the_first_is_trained(wrong, tmp_path):
    entries = ["ss-ig", f"ss-gl:{wrong}"]
    plain = {"epochs": 1, "net": "mlp:4", "measured": False, "progress": False}
    with pytest.raises(ValueError, match=WRONG[wrong]):
        compare(entries, "diabetes", tmp_path / "out", **plain)
    assert not (tmp_path / "out").exists()


def test_names_are_those_that_there_are():
    assert set(SCHEDULES) == set(infer.schedules.LEARNING_RATES)
    assert set(OPTIMIZERS) == set(infer.OPTIMIZERS)


@pytest.mark.parametrize(
    ("name", "value"), [("net", "os:abort"), ("guide", "os:abort"), ("net", "evil:make")]
)
def test_a_folder_may_not_name_code(name, value, tmp_path):
    settings = settings_for("ss-ig", "digits")
    config = {**vars(settings), name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"names code to import and call, {name} '{value}'"):
        experiment.read_settings(tmp_path)
    assert getattr(experiment.read_settings(tmp_path, trust=True), name) == value


def test_folders_of_older_versions(tmp_path):
    config = {"model": "ss-ig", "epochs": 3, "variance": "tied"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of an older version"):
        experiment.read_settings(tmp_path)
