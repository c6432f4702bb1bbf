"""Several adapters on one live model: switched, weighted, one per row, folded, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import surgery
from surgery.common.errors import JournalError, PassError


def test_switched_and_weighted(two, ids):
    both = two(ids).logits
    with surgery.using(two, "film"):
        film = two(ids).logits
    with surgery.using(two):
        bare = two(ids).logits
    assert torch.equal(two(ids).logits, both)
    assert len({tuple(t.flatten()[:3].tolist()) for t in (both, film, bare)}) == 3
    surgery.weight_(two, {"news": 0})
    assert torch.equal(two(ids).logits, film)
    surgery.weight_(two, {"news": 1, "film": 0.5})
    half = two(ids).logits
    assert not torch.equal(half, both)
    mask = torch.ones_like(ids)
    assert torch.equal(surgery.program_of(two).run(input_ids=ids, attention_mask=mask)["logits"], half)
    surgery.remove_(two, "news")
    surgery.weight_(two, {"film": 1})
    assert torch.equal(two(ids).logits, film)


def test_rows_with_adapters_of_their_own(two, ids):
    choices = ["film", None, "news", ("film", "news")]
    alone = []
    for row, choice in enumerate(choices):
        names = () if choice is None else (choice,) if isinstance(choice, str) else choice
        with surgery.using(two, *names):
            alone.append(two(ids[row : row + 1]).logits[0])
    with surgery.mixed_batch(two, choices):
        mixed = two(ids).logits
        generated = two.generate(ids, max_new_tokens=4, do_sample=False)
    for row, logits in enumerate(alone):
        # Products of fewer rows are summed in another order.
        torch.testing.assert_close(mixed[row], logits, rtol=1e-5, atol=1e-6)
    for row, choice in enumerate(choices):
        names = () if choice is None else (choice,) if isinstance(choice, str) else choice
        with surgery.using(two, *names):
            assert torch.equal(generated[row], two.generate(ids, max_new_tokens=4, do_sample=False)[row])


@pytest.mark.parametrize("choices", [["film", None, "film", None], [None] * 4, ["film"] * 4])
def test_what_no_row_names_is_out(two, ids, choices):
    alone = []
    for choice in choices:
        with surgery.using(two, *([choice] if choice else [])):
            alone.append(two(ids).logits)
    with surgery.mixed_batch(two, choices):
        mixed = two(ids).logits
    for row, logits in enumerate(alone):
        torch.testing.assert_close(mixed[row], logits[row], rtol=1e-5, atol=1e-6)


def test_rows_of_a_merged_model(two, ids):
    surgery.merge_(two)
    with (
        pytest.raises(PassError, match=r"folded into the weights.*remove_"),
        surgery.mixed_batch(two, ["film"] * 4),
    ):
        pass
    with (
        pytest.raises(PassError, match=r"give a list, such as \['film', None\]"),
        surgery.mixed_batch(two, "film"),
    ):
        pass


def test_a_block_changes_nothing(two, ids):
    both = two(ids).logits
    with surgery.using(two, "film"):
        for change in (
            lambda: surgery.remove_(two, "news"),
            lambda: surgery.merge_(two),
            lambda: surgery.weight_(two, {"film": 0.5}),
            lambda: surgery.apply_(two, surgery.Bitfit()),
            lambda: surgery.combine_(two, {"film": 1}, label="one"),
        ):
            with pytest.raises(PassError, match="inside a `using` block"):
                change()
        with surgery.using(two, "news"):
            pass
    assert torch.equal(two(ids).logits, both)
    surgery.remove_(two, "news")


def test_what_is_no_weight_and_no_format(two, tmp_path):
    with pytest.raises(JournalError, match="give a finite number"):
        surgery.weight_(two, {"film": float("nan")})
    with pytest.raises(PassError, match="no format 'gguf'"):
        surgery.save_(two, tmp_path / "x", format="gguf")
    assert not (tmp_path / "x").exists()


def test_rows_of_beams(two, ids):
    def scores():
        given = {"num_beams": 2, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        return two.generate(ids, max_new_tokens=4, **given).sequences_scores

    with surgery.using(two, "film"):
        film = scores()
    with surgery.using(two, "news"):
        news = scores()
    with surgery.mixed_batch(two, ["film", "news", "film", "news"]):
        mixed = scores()
    # Rows that were picked out lie elsewhere in memory, and are summed in another order.
    torch.testing.assert_close(mixed[::2], film[::2], rtol=1e-5, atol=0)
    torch.testing.assert_close(mixed[1::2], news[1::2], rtol=1e-5, atol=0)
    assert not torch.allclose(film, news, rtol=1e-3)


def test_rows_that_do_not_fit(two, ids):
    with (
        surgery.mixed_batch(two, ["film", None, "news"]),
        pytest.raises(PassError, match=r"4 rows, .* for 3"),
    ):
        two(ids)
    with pytest.raises(JournalError, match="no pass 'flim'"), surgery.mixed_batch(two, ["flim"]):
        pass
    both = two(ids).logits
    assert torch.equal(two(ids).logits, both)


def test_folded_and_unfolded(two, ids):
    both = two(ids).logits
    surgery.merge_(two)
    assert type(two.model.layers[0].mlp.up_proj) is torch.nn.Linear
    # As Program.merge allows: each weight is rounded once more.
    assert float((two(ids).logits - both).abs().max()) <= 2e-4 * float(both.abs().max())
    surgery.remove_(two, "merge")
    assert torch.equal(two(ids).logits, both)


def test_a_merge_that_is_not_possible(llama, ids):
    surgery.apply_(llama, surgery.LowRank(target="mlp.up", rank=2), verify=False)
    before = llama(ids).logits
    with pytest.raises(PassError, match=r"merge: nothing can be folded \(low-rank: "):
        surgery.merge_(llama)
    assert torch.equal(llama(ids).logits, before)
    with pytest.raises(PassError, match="no pass has been applied"):
        surgery.merge_(torch.nn.Linear(2, 2))


def test_saved_in_one_form_loads_in_the_other(llama, ids, randomised, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    surgery.apply_(
        live, surgery.Lora(target="attn.*", rank=2), surgery.SparseTune(target="mlp.up", density=0.1)
    )
    randomised(live)
    logits, mask = live(ids).logits, torch.ones_like(ids)
    surgery.save_(live, tmp_path / "saved")
    assert not (
        tmp_path / "saved" / "base.safetensors"
    ).exists()  # the directory of the model gives all of it
    graph = surgery.load(str(tmp_path / "saved"))
    assert torch.equal(graph.run(input_ids=ids, attention_mask=mask)["logits"], logits)
    graph.save(tmp_path / "graph")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    surgery.load_(other, tmp_path / "graph")
    assert torch.equal(other(ids).logits, logits)
    surgery.remove_(other)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(other(ids).logits, bare(ids).logits)


def test_a_directory_for_another_model(two, tmp_path, ids):
    from transformers import LlamaForCausalLM

    surgery.save_(two, tmp_path / "saved")
    config = two.config.__class__(**{**two.config.to_dict(), "num_hidden_layers": 1})
    other = LlamaForCausalLM(config).eval()
    before = other(ids).logits
    with pytest.raises(JournalError):
        surgery.load_(other, tmp_path / "saved")
    assert torch.equal(other(ids).logits, before)
    LlamaForCausalLM(two.config).save_pretrained(tmp_path / "there")
    surgery.apply_(other, surgery.Full())
    with pytest.raises(surgery.SurgeryError, match="is another model"):
        surgery.save_(other, tmp_path / "x", ref=f"hf:{tmp_path / 'there'}")
