"""Blocks such as `using` choose adapters for the running thread or asyncio task alone."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from transformers import BertConfig, BertModel

import surgery
from surgery.common.errors import PassError
from tests.techniques.catalogue import of


def together(*calls):
    """Results of functions that run in threads of their own; each gets a barrier that waits for all."""
    barrier, found = threading.Barrier(len(calls), timeout=60), [None] * len(calls)

    def run(number, call):
        try:
            found[number] = call(barrier)
        except Exception as error:
            found[number] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def alone(model, ids, *names):
    with surgery.using(model, *names), torch.no_grad():
        return model(ids).logits


def test_each_thread_has_its_own_choice(two, ids):
    def inside(*names):
        def run(barrier):
            with surgery.using(two, *names), torch.no_grad():
                barrier.wait()
                first = two(ids).logits
                barrier.wait()  # all are inside at the same time
                program = surgery.program_of(two).run(input_ids=ids, attention_mask=torch.ones_like(ids))
                return first, program["logits"]

        return run

    def rows(barrier):
        with surgery.mixed_batch(two, ["film", None, "news", None]), torch.no_grad():
            barrier.wait()
            barrier.wait()
            return two(ids).logits

    def outside(barrier):
        barrier.wait()
        with torch.no_grad():
            found = two(ids).logits
        with pytest.raises(PassError, match=r"inside a `\w+` block \(of this or another thread\)"):
            surgery.remove_(two, "film")
        barrier.wait()
        return found

    with torch.no_grad():
        both = two(ids).logits
    film, news, bare = (alone(two, ids, *names) for names in (["film"], ["news"], []))
    found = together(inside("film"), inside("news"), inside(), rows, outside)
    for logits, expected in zip(found, ((film,) * 2, (news,) * 2, (bare,) * 2), strict=False):
        assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    # Rows that were picked out lie elsewhere in memory, and are summed in another order.
    for row, own in enumerate((film, bare, news, bare)):
        torch.testing.assert_close(found[3][row], own[row], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[4], both)
    with torch.no_grad():
        assert torch.equal(two(ids).logits, both)
    assert not any(hasattr(type(m), "surgery_chosen") for m in two.modules())


def test_each_task_has_its_own_choice(two, ids):
    film, news = alone(two, ids, "film"), alone(two, ids, "news")

    async def inside(name):
        with surgery.using(two, name):
            await asyncio.sleep(0)
            first = two(ids).logits
            await asyncio.sleep(0)
            return first, two(ids).logits

    async def both():
        return await asyncio.gather(inside("film"), inside("news"))

    with torch.no_grad():
        found = asyncio.run(both())
    for pair, expected in zip(found, (film, news), strict=True):
        assert all(torch.equal(logits, expected) for logits in pair)


@pytest.fixture
def biased():
    """A BERT whose own biases train: switching that off changes values of the model."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = BertModel(config).eval()
    model.before = model(torch.arange(3, 9)[None])[0].detach()
    surgery.apply_(model, of("bitfit", target="attn.q,mlp.*"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    return model


def test_values_are_not_changed_under_other_threads(biased):
    ids = torch.arange(3, 9)[None]

    def first(barrier):
        with surgery.using(biased), torch.no_grad():
            barrier.wait()
            found = biased(ids)[0]
            barrier.wait()
            return found

    def second(barrier):
        barrier.wait()
        with pytest.raises(PassError, match=r"another thread or task .* use a copy of the model"):
            biased(ids)
        with (
            pytest.raises(PassError, match=r"another thread or task .* use a copy of the model"),
            surgery.using(biased),
        ):
            pass
        barrier.wait()
        return True

    trained = biased(ids)[0].detach()
    assert float((trained - biased.before).abs().max()) > 0.01
    found = together(first, second)
    assert torch.equal(found[0], biased.before)
    assert found[1] is True
    assert torch.equal(biased(ids)[0].detach(), trained)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_the_adapters_of_the_block(two, ids, copied):
    film = alone(two, ids, "film")
    with surgery.using(two, "film"):
        other = copied(two)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, film)
    with surgery.mixed_batch(two, [None] * 4):
        whole = copied(two)
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, two(ids).logits)
    surgery.weight_(other, {"news": 1})
    with torch.no_grad():
        assert torch.equal(other(ids).logits, two(ids).logits)


def test_blocks_of_a_compiled_model():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)), torch.randn(5, 4)
    surgery.apply_(model, surgery.Lora(target="path:0", rank=2, label="film"), inputs=(x,))
    program = surgery.apply_(model, surgery.Lora(target="path:1", rank=2, label="news"))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for tensor in program.tensors.values():
            tensor.normal_()
        both = compiled(x)
        for names in (["film"], ["news"], []):
            with surgery.using(model, *names):
                expected = model(x)
                assert not torch.equal(expected, both)
                assert torch.equal(compiled(x), expected)
        assert torch.equal(compiled(x), both)


def test_a_block_of_a_model_that_trains_with_checkpoints(two, ids):
    two.train()
    two.gradient_checkpointing_enable({"use_reentrant": False})
    with surgery.using(two, "film"):
        two(ids, labels=ids).loss.backward()
    moved = {n for n, p in two.named_parameters() if p.grad is not None}
    assert moved == {n for n, _ in two.named_parameters() if "film" in n}


def test_a_model_is_not_converted_inside_a_block(two):
    with (
        surgery.using(two, "film"),
        pytest.raises(PassError, match="cannot be converted inside a `using` block"),
    ):
        two.double()
