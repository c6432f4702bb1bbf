"""Saved directories: loaded by another process with another seed and thread count, checked, never half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.common.errors import JournalError, LoadError, SurgeryError
from surgery.store import saved

ATTENTION = "py:tests.shared.models:attention"

OTHER_PROCESS = """
import sys, torch
torch.manual_seed(int(sys.argv[3])); torch.set_num_threads(int(sys.argv[4]))
import surgery
program = surgery.load(sys.argv[1], base=sys.argv[5] or None)
torch.manual_seed(0)
torch.save(next(iter(torch.utils._pytree.tree_leaves(program.run()))), sys.argv[2])
"""


def load_elsewhere(directory, out, base=""):
    command = [sys.executable, "-c", OTHER_PROCESS, str(directory), str(out), "99", "2", base]
    subprocess.run(command, check=True, cwd=os.getcwd(), capture_output=True, text=True)
    return torch.load(out, weights_only=True)


@pytest.fixture
def adapted(randomise):
    program = surgery.load(ATTENTION).apply(surgery.Lora(target="attn.*", rank=2))
    return randomise(program)


def test_another_process_gives_the_same_bits_for_a_random_head(minilm, tmp_path, randomise):
    program = randomise(minilm.apply(surgery.Lora(target="attn.*")))
    program.save(tmp_path / "adapted")
    torch.set_num_threads(2)
    expected = program.run()["logits"]
    torch.set_num_threads(1)
    assert torch.equal(load_elsewhere(tmp_path / "adapted", tmp_path / "out.pt"), expected)
    stored = load_file(tmp_path / "adapted" / saved.BASE)
    assert set(stored) == {"classifier.weight", "classifier.bias"}


@pytest.mark.slow
def test_another_process_gives_the_same_bits_for_timm(tmp_path, randomise):
    pytest.importorskip("timm")
    torch.manual_seed(11)
    program = randomise(surgery.load("timm:resnet18", random=True).apply(surgery.Lora(target="conv", rank=2)))
    program.save(tmp_path / "adapted")
    torch.set_num_threads(2)
    expected = program.run()
    torch.set_num_threads(1)
    assert torch.equal(load_elsewhere(tmp_path / "adapted", tmp_path / "out.pt"), expected)


def test_a_timm_directory_of_an_earlier_version_needs_no_hub(tmp_path, randomise):
    """Weights of timm models were random before they could be fetched, and all of them are in the directory."""
    pytest.importorskip("timm")
    torch.manual_seed(12)
    made = {"num_classes": 3}
    program = surgery.load("timm:test_vit", random=True, model_kwargs=made)
    program = randomise(program.apply(surgery.Lora(target="attn.*", rank=2)))
    program.save(tmp_path / "adapted")
    path = tmp_path / "adapted" / saved.MANIFEST
    manifest = json.loads(path.read_text())
    assert manifest["base"].pop("random") is True
    manifest["checksum"] = saved._checksum(manifest)
    path.write_text(json.dumps(manifest))
    torch.manual_seed(13)
    again = surgery.load(str(tmp_path / "adapted"))
    assert torch.equal(again.run(), program.run())
    # Saved again, it says so itself.
    again.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / saved.MANIFEST).read_text())["base"]["random"] is True


def test_trained_base_tensors_and_buffers_come_back(tmp_path):
    program = surgery.load("py:tests.shared.models:convnet").apply(surgery.Freeze(target="!head"))
    module = program.module().train()
    (x,), _ = program.example_inputs
    module(x).square().sum().backward()
    torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.5).step()
    module.eval()
    program.save(tmp_path / "trained")
    changed = load_file(tmp_path / "trained" / saved.CHANGED)
    assert {"7.weight", "7.bias", "1.running_mean"} <= set(changed)
    again = surgery.load(str(tmp_path / "trained"), base="py:tests.shared.models:convnet")
    assert torch.equal(again.run(), program.run())
    assert not torch.equal(again.undo_all().run(), program.run())


def test_merged_and_weighted_programs_come_back(adapted, tmp_path):
    for name, program in {"merged": adapted.merge(), "half": adapted.weighted({"lora": 0.5})}.items():
        program.save(tmp_path / name)
        again = surgery.load(str(tmp_path / name), base=ATTENTION)
        assert torch.equal(again.run(), program.run())
        assert torch.equal(again.undo_all().run(), adapted.undo_all().run())
    again = surgery.load(str(tmp_path / "merged"), base=ATTENTION)
    assert torch.equal(again.undo("merge").run(), adapted.run())


def test_code_runs_only_when_named_again(adapted, tmp_path):
    adapted.save(tmp_path / "adapted")
    with pytest.raises(LoadError, match=r"is code, py:.*--base py:tests.shared.models:attention"):
        surgery.load(str(tmp_path / "adapted"))
    with pytest.raises(LoadError, match="is code, py:"):
        surgery.load(str(tmp_path / "adapted"), base="py:tests.shared.models:forms")


def test_a_module_from_python_needs_its_module_again(tmp_path, randomise):
    from tests.shared import models

    module, inputs = models.attention()
    program = randomise(surgery.capture(module, inputs).apply(surgery.Lora(target="attn.*", rank=2)))
    program.save(tmp_path / "adapted")
    with pytest.raises(LoadError, match=r"base=surgery\.capture"):
        surgery.load(str(tmp_path / "adapted"))
    torch.manual_seed(123)
    again = surgery.load(str(tmp_path / "adapted"), base=surgery.capture(models.Attention(), inputs))
    assert torch.equal(again.run(*inputs), program.run(*inputs))


def test_standalone_needs_no_base(tmp_path, randomise):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).save_pretrained(base)
    program = randomise(surgery.load(f"hf:{base}").apply(surgery.Lora(target="attn.*", rank=2)))
    program.save(tmp_path / "alone", standalone=True)
    for file in base.iterdir():
        file.unlink()
    (tmp_path / "alone").rename(tmp_path / "moved")
    expected = program.run()["logits"]
    assert torch.equal(surgery.load(str(tmp_path / "moved")).run()["logits"], expected)


def damage(path, what):
    if what == "tensor file cut":
        file = path / saved.INSERTED
        file.write_bytes(file.read_bytes()[:-10])
    elif what == "tensor edited":
        content = load_file(path / saved.INSERTED)
        next(iter(content.values())).add_(1)
        save_file(content, path / saved.INSERTED)
    elif what == "tensor file gone":
        (path / saved.INSERTED).unlink()
    elif what == "journal edited":
        file = path / saved.MANIFEST
        file.write_text(file.read_text().replace('"rank": 2', '"rank": 4'))
    elif what == "no JSON":
        (path / saved.MANIFEST).write_text("{")
    elif what == "newer schema":
        manifest = json.loads((path / saved.MANIFEST).read_text())
        manifest["schema"] = 99
        (path / saved.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("tensor file cut", "was changed after it was saved"),
        ("tensor edited", "was changed after it was saved"),
        ("tensor file gone", "is missing"),
        ("journal edited", "was edited or damaged"),
        ("no JSON", "is not valid JSON"),
        ("newer schema", "has schema 99.*upgrade"),
    ],
)
def test_damage_is_seen(adapted, tmp_path, what, says):
    adapted.save(tmp_path / "adapted")
    damage(tmp_path / "adapted", what)
    with pytest.raises(JournalError, match=says):
        surgery.load(str(tmp_path / "adapted"), base=ATTENTION)


def test_a_changed_base_is_seen(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def write(**options):
        config = GPT2Config(vocab_size=101, n_embd=32, n_head=4, n_positions=64, **options)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")

    write(n_layer=2)
    program = surgery.load(f"hf:{tmp_path / 'base'}").apply(surgery.Lora(target="attn.*", rank=2))
    program.save(tmp_path / "adapted")
    write(n_layer=2)
    with pytest.raises(JournalError, match=r"base of .* has changed: model.safetensors"):
        surgery.load(str(tmp_path / "adapted"))
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "model-00001-of-00001.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(_names(tmp_path), "model-00001-of-00001.safetensors"),
    }
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(JournalError, match=r"it has no model.safetensors now"):
        surgery.load(str(tmp_path / "adapted"))


def _names(folder):
    return load_file(folder / "base" / "model-00001-of-00001.safetensors").keys()


def test_another_architecture_lists_the_sites(adapted, tmp_path):
    adapted.save(tmp_path / "adapted")
    from tests.shared import models

    class Wider(models.Attention):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.extra(super().forward(x))

    other = surgery.capture(Wider(), (torch.randn(3, 5, 8),))
    with pytest.raises(JournalError, match=r"these sites differ: extra\.weight"):
        surgery.load(str(tmp_path / "adapted"), base=other)


def test_a_taken_path_is_left_alone(adapted, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(SurgeryError, match="exists; choose another -o, or pass --overwrite"):
        adapted.save(taken)
    with pytest.raises(SurgeryError, match="a directory with other files and not a saved model"):
        adapted.save(taken, overwrite=True)
    assert [file.name for file in taken.iterdir()] == ["mine.txt"]
    adapted.save(tmp_path / "again")
    adapted.undo("lora").save(tmp_path / "again", overwrite=True)
    assert not (tmp_path / "again" / "inserted.safetensors").exists()


def test_a_full_disk_leaves_nothing(adapted, tmp_path, monkeypatch):
    """A quota on file size makes the kernel refuse the write in the middle of the file."""
    code = (
        "import resource, signal, sys, surgery\n"
        "program = surgery.load('py:tests.shared.models:attention').apply(surgery.Lora(target='attn.*', rank=2))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "try:\n    program.save(sys.argv[1])\n"
        "except surgery.SurgeryError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "full")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "could not be written: " in printed
    assert len(printed.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_saving_leaves_what_was_there(adapted, tmp_path):
    adapted.save(tmp_path / "adapted")
    before = (tmp_path / "adapted" / saved.MANIFEST).read_bytes()
    code = (
        "import os, sys, time, surgery\nfrom surgery.store import saved\n"
        "program = surgery.load(sys.argv[1], base='py:tests.shared.models:attention').weighted({'lora': 0.5})\n"
        "real = saved.sha256\n"
        "def slow(path):\n    print('writing', flush=True); time.sleep(60); return real(path)\n"
        "saved.sha256 = slow\n"
        "program.save(sys.argv[1], overwrite=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "adapted")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "adapted" / saved.MANIFEST).read_bytes() == before
    time.sleep(0.01)
    adapted.save(tmp_path / "adapted", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapted"]  # the killed one's leavings are swept


def test_hf_format_loads_in_transformers(tmp_path, randomise):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    program = surgery.load(f"hf:{tmp_path / 'base'}")
    from surgery.store.hf import write_hf

    for target, tied in (("attn.*", True), ("lm_head", False)):
        merged = randomise(program.apply(surgery.Lora(target=target, rank=2))).merge()
        folder = tmp_path / target.strip(".*")
        write_hf(merged, folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert model.config.tie_word_embeddings is tied
        args, kwargs = merged.example_inputs
        with torch.no_grad():
            assert torch.equal(model(*args, **kwargs).logits, merged.run()["logits"])
    with pytest.raises(SurgeryError, match="'lora' is not folded"):
        write_hf(program.apply(surgery.Lora(target="attn.*")), tmp_path / "no")
