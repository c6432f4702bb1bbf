"""The pass contract: few members, and a class that defines an old one is refused."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from surgery.api import EXACT, SWAP, Fold, RewritePass, Stage
from surgery.api.programs import PluginError
from surgery.engine.contract import renamed
from surgery.engine.contract.base import default_names, merges


def test_it_is_small():
    own = [n for n in dir(RewritePass) if not n.startswith("_") and n not in dir(BaseModel)]
    flags = [n for n in RewritePass.__class_vars__ if not n.startswith("_")]
    # 25, and the command that the page of a pass shows.
    assert len(own) <= 26, own
    assert len(flags) <= 9, flags


@pytest.mark.parametrize("old", ["mergeable", "weightable", "keeps", "tensor_names", "combine"])
def test_an_old_member_is_refused_with_its_new_name(old):
    with pytest.raises(PluginError, match=rf"defines '{old}', which passes no longer have; define "):
        type("Old", (RewritePass,), {"__module__": __name__, "__annotations__": {}, old: lambda self: None})


def test_every_new_name_exists():
    for old, new in renamed._RENAMED.items():
        first = new.split()[0].rstrip(",")
        assert hasattr(RewritePass, first) or first in ("the",), (old, new)
        assert not hasattr(RewritePass, old), old


def test_constants_need_no_annotation():
    class Plain(RewritePass):
        name = "plain"
        numerics = EXACT
        effect = SWAP

    assert Plain(target="all").effect.replaces_weight
    assert not merges(Plain)


def test_a_pass_is_mergeable_if_it_defines_merge():
    class Merged(RewritePass):
        name = "merged"

        def merge(self, site, tensors, weight):
            return {"weight": Fold()}

    assert merges(Merged)
    assert merges(Merged(target="all"))
    assert Fold.stage is Stage.BRANCH


def test_names_of_tensors(forms):
    sites = {site.path: site for site in forms.sites}
    pass_ = RewritePass.model_construct(label="film")
    names = default_names(pass_, sites["linear"], ("A",))
    assert names == {"A": "linear._film.A"}
    assert default_names(pass_, sites["linear"], ("A",), "_merge") == {"A": "linear._film_merge.A"}
    assert default_names(pass_, sites["addmm_weight"], ("A",)) == {"A": "addmm_weight__film.A"}


@pytest.fixture(scope="module")
def forms():
    import surgery
    from tests.shared import models

    return surgery.capture(*models.forms())
