"""An unknown name is answered with the nearest known ones and with all of them."""

import pytest

from pyro_sparse import data, nets
from pyro_sparse.names import nearest
from pyro_sparse.runs import zoo


def test_nearest_and_all():
    assert nearest("model", "ss-gsh", ["ss-ig", "ss-ghs", "dense"]) == (
        "unknown model 'ss-gsh'. Did you mean ss-ghs or ss-ig? Known: ss-ig, ss-ghs, dense."
    )


def test_nothing_is_near():
    assert nearest("model", "xyz", ["dense"]) == "unknown model 'xyz'. Known: dense."
    assert nearest("model", "xyz", []) == "unknown model 'xyz'. Known: none."


def test_case_does_not_matter():
    assert "Did you mean SS-IG?" in nearest("model", "ss-ig", ["SS-IG", "dense"])


def test_what_follows_a_colon_is_an_argument():
    assert "Did you mean mlp:400-400?" in nearest("net", "mpl:8", ["mlp:400-400", "lenet5-caffe"])


@pytest.mark.parametrize(
    ("lookup", "near"),
    [
        (lambda: zoo.find("ss_ghs"), "ss-ghs"),
        (lambda: zoo.find("DENSE"), "dense"),
        (lambda: nets.build("lenet5", (1, 28, 28), 10), "lenet5-caffe"),
        (lambda: nets.build("mlp", (3,), 10), "mlp:400-400"),
        (lambda: data.load("digit"), "digits"),
        (lambda: data.load("fashionmnist"), "fashion-mnist"),
        (lambda: data.load("uic:yacht"), "uci:NAME"),
    ],
)
def test_models_nets_and_data(lookup, near):
    with pytest.raises(ValueError, match=f"Did you mean [^?]*{near}"):
        lookup()


def test_every_entry_of_the_zoo_says_what_it_is():
    from pyro_sparse import guides, models

    for name, entry in zoo.ZOO.items():
        assert entry.name == name
        assert zoo.find(name) is entry
        assert hasattr(models, entry.model)
        assert hasattr(guides, entry.model)
        assert all([entry.title, entry.paper, entry.prior, entry.guide, entry.rule, entry.use])
