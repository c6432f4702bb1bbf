"""`--target` given twice selects what both name."""

from surgery.cli.pass_groups import split_groups
from surgery.passes import Lora


def test_targets_add_up():
    line = ["model", "--pass", "lora", "--target", "attn.q", "--rank", "4", "--target", "attn.v"]
    assert split_groups(line, {}, "--pass", lambda name: Lora) == (
        ["model"],
        [("lora", {"target": "attn.q,attn.v", "rank": "4"})],
    )
