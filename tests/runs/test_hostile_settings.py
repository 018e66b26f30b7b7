"""config.json of a stranger: refused in a sentence, whatever stands in it."""

import json

import pytest

from pyro_sparse.runs import experiment
from pyro_sparse.runs.settings import settings_for


@pytest.mark.parametrize(
    "text", ["[" * 3000, '{"epochs": ' + "1" * 400 + "}", "\ufeff{}", "\x00", ""]
)
def test_refused_in_a_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json"):
        experiment.read_settings(tmp_path)


@pytest.mark.parametrize("name", ["lr", "batch_size", "kl_hold"])
def test_a_number_too_large(tmp_path, name):
    values = json.loads(json.dumps(vars(settings_for("ss-ig", "digits")), default=str))
    values[name] = 10**400
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json does not hold the settings of a run"):
        experiment.read_settings(tmp_path)


@pytest.mark.parametrize("name", ["model", "net", "guide", "data"])
def test_a_name_that_is_none(tmp_path, name):
    values = json.loads(json.dumps(vars(settings_for("ss-ig", "digits")), default=str))
    values[name] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json does not hold the settings of a run"):
        experiment.read_settings(tmp_path)
