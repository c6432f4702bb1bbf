"""Uploads to the hub, with huggingface_hub's real client against a small hub on loopback, in real processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy
import onnxruntime
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import surgery
from surgery.common.errors import SurgeryError
from surgery.export.publish.artifact import read_artifact
from surgery.export.publish.card import MARK, escaped, write_card
from surgery.store.peft import export_peft
from surgery.store.provenance import PROVENANCE
from tests.shared import forked, hub, tiny

CLOSE = 1e-5  # of the outputs' scale: fp32 sums in another order
BASE = "acme/base"


@pytest.fixture(scope="module")
def server():
    with hub.serve() as made:
        yield made


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def run(server, home):
    with forked.commands(**hub.environment(server.url, home)) as started:
        yield started


@pytest.fixture(scope="module")
def program(server, run, home, tmp_path_factory):
    """A classifier with a random LoRA, whose base was fetched from the hub."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(21)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "base")
    (folder / "base" / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(99)))
    server.commit(BASE, folder / "base", card={"license": "mit"})
    run(
        *("apply", f"hf:{BASE}", "--task", "text-classification"),
        *("--pass", "lora", "--target", "attn.*", "--rank", "2", "-o", folder / "adapted"),
    )
    with pytest.MonkeyPatch.context() as patch:
        # This process is offline, and reads the same cache.
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        made = surgery.load(str(folder / "adapted"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in made.tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return made


@pytest.fixture(scope="module")
def written(program, tmp_path_factory):
    """What surgery writes in each format."""
    folder = tmp_path_factory.mktemp("written")
    program.merge().save(folder / "surgery")
    surgery.Program.write(program.merge(), folder / "hf", "hf")
    export_peft(program, folder / "peft")
    (folder / "onnx").mkdir()
    program.export(folder / "onnx" / "model.onnx")
    return folder


def pushed(server, run, folder: Path, name: str, *more: object) -> dict[str, bytes]:
    """Push a directory; its files as the hub has them."""
    done = run("push", folder, name, *more, token=hub.TOKEN)
    assert done.out.splitlines()[-1] == f"{server.url}/{name}"
    return server.files(name)


def card_of(files: dict[str, bytes]) -> ModelCard:
    return ModelCard(files["README.md"].decode())


def test_a_transformers_model(server, run, written, program, tmp_path):
    files = pushed(server, run, written / "hf", "acme/merged")
    local = {path.name: path.read_bytes() for path in (written / "hf").iterdir()}
    assert {name: content for name, content in files.items() if name in local} == local
    assert set(files) - set(local) == {"README.md", ".gitattributes"}
    # Another process loads what was pushed, and it gives the program's outputs.
    fetched = run("load", "hf:acme/merged").json
    model = transformers.BertForSequenceClassification.from_pretrained(written / "hf")
    assert fetched["weights"] == forked.weights_hash(model)
    card = card_of(files)
    commit = server.repos[BASE].branches["main"]
    assert card.data.to_dict() == {
        "library_name": "transformers", "license": "mit", "base_model": BASE, "base_model_relation": "finetune",
        "pipeline_tag": "text-classification", "tags": ["torch-surgery", "lora"],
    }  # fmt: skip
    assert f"[acme/base](https://huggingface.co/acme/base) at commit `{commit}`" in card.text
    steps = [line for line in card.text.splitlines() if line[:1].isdigit()]
    assert len(steps) == len(program.merge().journal.entries) == 3
    assert "**lora** applied the pass lora at 4 sites, with target attn.\\*, rank 2, alpha 16.0" in steps[1]
    assert "Change of the outputs: bit for bit (declared: exact)." in steps[1]
    assert "**merge** folded into the weights: lora." in steps[2]
    assert 'BertForSequenceClassification.from_pretrained("acme/merged")' in card.text.replace("'", '"')


def test_a_peft_checkpoint_loads_with_its_base(server, run, written, program, home, tmp_path):
    peft = pytest.importorskip("peft")
    files = pushed(server, run, written / "peft", "acme/adapter")
    config = json.loads(files["adapter_config.json"])
    commit = server.repos[BASE].branches["main"]
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, commit)
    assert card_of(files).data.base_model_relation == "adapter"
    assert f"AutoModel.from_pretrained('{BASE}', revision='{commit}'), 'acme/adapter')" in card_of(files).text
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    base = transformers.BertForSequenceClassification.from_pretrained(
        program.base.loaded.metadata["tokenizer"]
    )
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    _, inputs = program.example_inputs
    expected = program.run()["logits"]
    assert (model(**inputs).logits - expected).abs().max() <= CLOSE * expected.abs().max()


def test_an_onnx_file_says_how_near_it_is(server, run, written, program):
    files = pushed(server, run, written / "onnx", "acme/graph")
    session = onnxruntime.InferenceSession(files["model.onnx"])
    _, inputs = program.example_inputs
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    expected = program.run()["logits"].detach().numpy()
    assert numpy.abs(found - expected).max() <= CLOSE * numpy.abs(expected).max()
    card = card_of(files)
    assert card.data.tags == ["torch-surgery", "onnx", "lora"]
    assert card.data.base_model == BASE
    row = next(line for line in card.text.splitlines() if line.startswith("| logits |"))
    assert all(float(cell) <= CLOSE for cell in row.split("|")[2:4])
    assert "hf_hub_download('acme/graph', 'model.onnx')" in card.text


def test_a_card_of_somebody_else_is_kept(server, run, written, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(written / "hf", folder)
    server.commit("acme/kept", {"README.md": b"# Mine\n"})
    done = run("push", folder, "acme/kept", token=hub.TOKEN)
    assert "README.md of the repository is kept, since surgery did not write it" in done.out
    assert server.files("acme/kept")["README.md"] == b"# Mine\n"
    assert "model.safetensors" in server.files("acme/kept")
    # When asked, it is replaced; and a card of surgery is, without asking.
    run("push", folder, "acme/kept", "--overwrite-card", token=hub.TOKEN)
    assert MARK.encode() in server.files("acme/kept")["README.md"]
    run("push", folder, "acme/kept", "--license", "apache-2.0", token=hub.TOKEN)
    assert card_of(server.files("acme/kept")).data.license == "apache-2.0"
    # A card in the directory is the user's.
    (folder / "README.md").write_text("# Theirs\n")
    done = run("push", folder, "acme/kept", token=hub.TOKEN)
    assert "README.md of the directory is used" in done.out
    assert server.files("acme/kept")["README.md"] == b"# Theirs\n"


def test_private_branches_and_files_that_are_left_out(server, run, written, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(written / "hf", folder)
    (folder / ".env").write_text("SECRET=1")
    (folder / "notes.txt").write_text("draft")
    more = ("--private", "--revision", "v2")
    done = run("push", folder, "acme/new", *more, "--token", hub.TOKEN)
    assert "left out: .env, notes.txt" in done.out
    assert done.out.splitlines()[-1] == f"{server.url}/acme/new/tree/v2"
    assert server.repos["acme/new"].private
    assert set(server.files("acme/new")) == {".gitattributes"}
    assert "model.safetensors" in server.files("acme/new", "v2")
    assert not {".env", "notes.txt"} & set(server.files("acme/new", "v2"))


def test_refusals_upload_nothing(server, run, written, tmp_path):
    before = len(server.repos)
    server.requests.clear()
    pickled, changed, linked, plain = (tmp_path / name for name in ("pickled", "changed", "linked", "plain"))
    for folder in (pickled, changed, linked):
        shutil.copytree(written / "hf", folder)
    (pickled / "optimizer.pt").write_bytes(b"\x80")
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    (linked / "LICENSE").symlink_to("/etc/hostname")
    transformers.BertConfig().save_pretrained(plain)
    for folder, part in {
        pickled: "optimizer.pt can be a pickle, which runs code where it is read; move it elsewhere",
        changed: "model.safetensors is not as surgery wrote it; write the directory again",
        linked: "LICENSE is a link; replace it by the file",
        plain: "holds nothing that surgery wrote; write it with surgery merge --format hf, export-peft or export",
        written / "surgery": "is in surgery's own format, which nobody loads from the hub",
        tmp_path / "absent": "is no directory",
    }.items():
        assert part in run("push", folder, "acme/refused", token=hub.TOKEN, rc=2).error
    for name, part in {"acme": "'acme' names no owner; write ORG/NAME", "a/b/c": "write ORG/NAME"}.items():
        assert part in run("push", written / "hf", name, token=hub.TOKEN, rc=2).error
    assert not server.requests
    said = run("push", written / "hf", "acme/refused", rc=2).error
    assert "the hub refuses the token for acme/refused; log in with `hf auth login`, or set HF_TOKEN" in said
    said = run("push", written / "hf", "acme/refused", token=hub.TOKEN, offline=True, rc=2).error
    assert "HF_HUB_OFFLINE is set; nothing was committed" in said
    assert len(server.repos) == before


def test_the_provenance_tells_no_path_of_this_machine(tmp_path, program):
    merged = program.merge()
    # The same base, loaded from a directory.
    folder = Path(program.base.loaded.metadata["tokenizer"])
    local = surgery.load(f"hf:{folder}", task="text-classification").apply(surgery.Lora(target="attn.q"))
    surgery.Program.write(local.merge(), tmp_path / "local", "hf")
    text = (tmp_path / "local" / PROVENANCE).read_text()
    assert str(folder.parent) not in text
    assert json.loads(text)["base"]["ref"] == f"hf:{folder.name}"
    assert merged.base.ref == f"hf:{BASE}"


def test_texts_of_a_journal_have_no_meaning_in_markdown(written, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(written / "hf", folder)
    path = folder / PROVENANCE
    facts = json.loads(path.read_text())
    evil = "x](http://evil) <img src=y>\n# Title | `code` ![a](b)"
    facts["journal"][1]["options"]["target"] = evil
    facts["base"] |= {"repo": "", "commit": "", "ref": evil.replace("\n", " ")}
    path.write_text(json.dumps(facts))
    text = write_card(read_artifact(folder), "acme/evil")
    body = text.partition(MARK)[2]
    assert "<img" not in body.replace("\\<", "")
    assert "](http" not in body.replace("\\]", "")
    assert "\n# Title" not in body
    assert escaped(evil) in body
    assert ModelCard(text).data.library_name == "transformers"
    facts["base"]["repo"] = "a/b](c)"
    path.write_text(json.dumps(facts))
    with pytest.raises(SurgeryError, match=r"base\.repo"):
        read_artifact(folder)


@pytest.mark.slow
def test_a_directory_for_generation_can_be_uploaded_whole(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path / "llama")
    base = surgery.load(f"hf:{tmp_path / 'llama'}", task="text-generation")
    made = base.apply(surgery.Lora(target="attn.q", rank=2))
    made.export_generation(tmp_path / "onnx", adapters_as_inputs=True)
    found = read_artifact(tmp_path / "onnx")
    assert (found.format, found.left_out) == ("onnx", ())
    assert {"decode.onnx", "prefill.onnx", "export.json", "config.json"} <= set(found.files)
    assert found.base.ref == "hf:llama"
    assert "lora" in [entry.pass_name for entry in found.journal]
