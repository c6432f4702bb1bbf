"""Fetching from the hub, with huggingface_hub's real client against a small hub on loopback, in real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import surgery
from surgery.capture import LoadOptions
from surgery.capture import timm as timm_loader
from surgery.capture.hf_files import choose, weight_files
from surgery.common.errors import LoadError
from tests.shared import forked, hub

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
VIT = "timm/test_vit.r160_in1k"
LORA = ("--pass", "lora", "--target", "attn.q", "--rank", "2")


@pytest.fixture(scope="module")
def server():
    with hub.serve() as made:
        yield made


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def environment(server, home):
    return hub.environment(server.url, home)


@pytest.fixture(scope="module")
def run(environment):
    with forked.commands(**environment) as started:
        yield started


@pytest.fixture(autouse=True)
def _no_faults(server):
    yield
    server.cuts.clear()
    server.down = False
    server.requests.clear()


def bert(seed: int, folder: Path) -> Path:
    """A tiny BERT with a file of code and a pickle beside it, which must not be fetched."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit('code was run')")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "vocab.txt").write_text("\n".join(f"w{i}" for i in range(99)))
    return folder


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    return [bert(seed, tmp_path_factory.mktemp(f"bert{seed}")) for seed in (11, 12)]


@pytest.fixture(scope="module")
def hashes(berts):
    """Hash of the weights of each of them."""
    return [forked.weights_hash(transformers.BertForMaskedLM.from_pretrained(folder)) for folder in berts]


def vit(seed: int, **settings) -> bytes:
    """Bytes of a safetensors file with weights of timm's test_vit."""
    torch.manual_seed(seed)
    return save(timm.create_model("test_vit", **settings).state_dict())


def stored(path: Path) -> dict:
    return json.loads((path / "surgery.json").read_text())["base"]


def in_cache(home: Path, ending: str) -> list[Path]:
    return [path for path in (home / "hub").rglob("*") if path.name.endswith(ending)]


def test_a_whole_process_fetches_and_another_is_offline(server, environment, tmp_path):
    """The installed command, without the fork of the other tests."""
    server.commit(VIT, {"config.json": b"{}", "model.safetensors": vit(5)})
    command = [str(Path(sys.executable).parent / "surgery"), "inspect", "timm:test_vit", "--json"]
    own = {**environment, "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": str(forked.ROOT)}
    offline = {**own, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=forked.ROOT)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: timm:test_vit: {VIT} is not in the local cache, and the hub is not asked, because HF_HUB_OFFLINE is "
        "set; give --random for random weights, or --model-kwarg checkpoint_path=FILE.safetensors\n"
    )
    assert not server.requests
    done = subprocess.run(command, capture_output=True, text=True, env=own, cwd=forked.ROOT)
    assert done.returncode == 0, done.stderr
    assert f"weights: {VIT} at commit {server.repos[VIT].branches['main'][:12]}" in done.stderr
    assert "random" not in done.stderr
    assert json.loads(done.stdout)["parameters"] == 371_240


def test_timm_is_pretrained_and_says_which(server, run, tmp_path):
    sha = server.commit(VIT, {"config.json": b"{}", "model.safetensors": vit(6)})
    done = run("apply", "timm:test_vit", *LORA, "-o", tmp_path / "adapted")
    assert f"weights: {VIT} at commit {sha[:12]}" in done.err
    facts = stored(tmp_path / "adapted")
    assert facts["hub"] == {"repo": VIT, "commit": sha}
    assert facts["random"] is False
    assert list(facts["files"]) == ["model.safetensors"]
    # Only the adapter is stored, since the weights are on the hub.
    assert not (tmp_path / "adapted" / "base.safetensors").exists()
    assert server.downloads() == [f"/{VIT}/resolve/{sha}/model.safetensors"]
    # The weights are those that the hub has.
    torch.manual_seed(6)
    weights = forked.weights_hash(timm.create_model("test_vit"))
    assert run("load", "timm:test_vit", offline=True).json == {"commit": sha, "weights": weights, "notes": []}
    # With the flag they are random, and that is said.
    done = run("inspect", "timm:test_vit", "--random", offline=True)
    assert "note: all weights are random" in done.err
    assert "weights:" not in done.err
    # The adapter loads on the weights that it was made for, without the network.
    run("inspect", tmp_path / "adapted", offline=True)


def test_timm_with_another_head_stores_the_head_alone(server, run, tmp_path):
    server.commit(VIT, {"config.json": b"{}", "model.safetensors": vit(7)})
    wider = ("--model-kwarg", "num_classes=3", "--model-kwarg", "in_chans=1")
    done = run("apply", "timm:test_vit", *wider, *LORA, "-o", tmp_path / "adapted")
    assert "note: head.weight and 1 more: not in the checkpoint, so random" in done.err
    # The first convolution is adapted to one channel by timm; its values are stored, so they cannot change.
    own = load_file(tmp_path / "adapted" / "base.safetensors")
    assert set(own) == {"head.weight", "head.bias", "patch_embed.proj.weight"}
    run("inspect", tmp_path / "adapted", offline=True)


def test_standalone_timm_needs_no_hub(server, run, tmp_path):
    server.commit(VIT, {"config.json": b"{}", "model.safetensors": vit(8)})
    run("apply", "timm:test_vit", *LORA, "--standalone", "-o", tmp_path / "alone")
    assert stored(tmp_path / "alone")["random"] is True
    server.requests.clear()
    alone = surgery.load(str(tmp_path / "alone"))
    assert not server.requests
    torch.manual_seed(8)
    expected = timm.create_model("test_vit").state_dict()
    for name, tensor in alone.base.loaded.module.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_first_fetch_then_the_cache_then_offline(server, run, berts, hashes, home, tmp_path):
    sha = server.commit("acme/bert", berts[0])
    done = run("apply", "hf:acme/bert", *LORA, "-o", tmp_path / "adapted")
    assert f"weights: acme/bert at commit {sha[:12]}" in done.err
    names = sorted(path.rpartition("/")[2] for path in server.downloads())
    # Neither the code nor the pickle.
    assert names == ["config.json", "model.safetensors", "vocab.txt"]
    assert stored(tmp_path / "adapted")["hub"] == {"repo": "acme/bert", "commit": sha}
    server.requests.clear()
    own = {"commit": sha, "weights": hashes[0], "notes": []}
    assert run("load", "hf:acme/bert").json == own
    assert not server.downloads()
    server.requests.clear()
    assert run("load", "hf:acme/bert", offline=True).json == own
    run("inspect", tmp_path / "adapted", offline=True)
    assert not server.requests
    # A hub that does not answer is said, and the cache is used.
    server.down = True
    note = "the hub answers with the status 503; the copy in the local cache is used"
    assert run("load", "hf:acme/bert").json == {**own, "notes": [note]}
    assert f"note: {note}" in run("inspect", tmp_path / "adapted").err
    # The tokenizer goes where the weights go.
    run("merge", tmp_path / "adapted", "--format", "hf", "-o", tmp_path / "merged")
    assert (tmp_path / "merged" / "vocab.txt").read_text() == (berts[0] / "vocab.txt").read_text()


def test_random_weights_of_a_configuration(server, run, berts, tmp_path):
    server.commit("acme/plan", berts[0])
    done = run("apply", "hf:acme/plan", "--random", *LORA, "-o", tmp_path / "adapted")
    assert "note: all weights are random" in done.err
    assert not [path for path in server.downloads() if path.endswith(("safetensors", "bin"))]
    program = surgery.load(str(tmp_path / "adapted"), base=f"hf:{berts[0]}")
    assert program.base.options.random
    own = load_file(tmp_path / "adapted" / "base.safetensors")
    for name, tensor in own.items():
        assert torch.equal(tensor, program.base.tensors[name]), name


def test_a_branch_that_moved(server, run, berts, hashes, tmp_path):
    first = server.commit("acme/moving", berts[0])
    run("apply", "hf:acme/moving", *LORA, "-o", tmp_path / "adapted")
    second = server.commit("acme/moving", berts[1])
    assert first != second
    # The reference loads the new commit; the directory loads what it was saved with.
    new, old = (
        {"commit": c, "weights": h, "notes": []} for c, h in ((second, hashes[1]), (first, hashes[0]))
    )
    assert run("load", "hf:acme/moving").json == new
    assert run("load", f"hf:acme/moving@{first}").json == old
    done = run("verify", tmp_path / "adapted", f"hf:{berts[0]}", "--tolerance", 0)
    assert f"weights: acme/moving at commit {first[:12]}" in done.err
    # An explicit base is taken at its word, and refused with both commits.
    said = run("inspect", tmp_path / "adapted", "--base", "hf:acme/moving", rc=2).error
    assert f"it was acme/moving at {first} and this is acme/moving at {second}" in said
    assert f"--base hf:acme/moving@{first}" in said
    # A branch and an argument can name a revision as well.
    third = server.commit("acme/moving", berts[0], branch="refs/pr/1")
    assert run("load", "hf:acme/moving@refs/pr/1").json == {**old, "commit": third}
    done = run("inspect", "hf:acme/moving", "--model-kwarg", f"revision={first}")
    assert f"at commit {first[:12]}" in done.err


def test_refusals_in_one_line(server, run, berts, tmp_path):
    server.commit("acme/gated", berts[0], gated=True)
    server.commit("acme/private", berts[0], private=True)
    server.commit(
        "acme/pickle", {"config.json": (berts[0] / "config.json").read_bytes(), "model.ckpt": b"\x80"}
    )
    server.commit("acme/adapter", {"adapter_config.json": b"{}"})
    for ref, part in {
        "hf:acme/nothing": "there is no model acme/nothing on the hub, or it is private; check the name",
        "hf:acme/gated": "acme/gated is gated; ask for access on its page, then log in with `hf auth login`",
        "hf:acme/private": "there is no model acme/private on the hub, or it is private",
        "hf:acme/gated@nowhere": "acme/gated has no revision 'nowhere'",
        "hf:acme/pickle": "model.ckpt is not read, convert it to safetensors",
        "hf:acme/adapter": "is a PEFT checkpoint",
        "hf:acme/a..b": "is neither a directory nor a name on the hub",
        "hf:acme/gated@../../x": "is no revision",
        "timm:test_vit.nothing": "Invalid pretrained tag (nothing) for test_vit.; did you mean 'test_vit.r160_in1k'",
        "timm:test_vitt": "did you mean 'test_vit",
    }.items():
        assert part in run("load", ref, rc=2).error
    # With a token both can be read.
    for ref in ("hf:acme/gated", "hf:acme/private"):
        run("load", ref, token=hub.TOKEN)


def test_an_interrupted_download_is_resumed_or_nothing_is_used(server, run, berts, hashes, home, tmp_path):
    server.commit("acme/cut", berts[0])
    # Cut once in the middle: the client asks for the rest.
    server.cuts["model.safetensors"] = [1000]
    assert run("load", "hf:acme/cut").json["weights"] == hashes[0]
    assert len([path for path in server.downloads() if path.endswith("safetensors")]) == 2
    # Cut for good: one line, and no half file, neither in this run nor offline.
    server.commit("acme/broken", berts[1])
    server.cuts["model.safetensors"] = [1000, *[0] * 20]
    said = run("apply", "hf:acme/broken", *LORA, "-o", tmp_path / "adapted", rc=2).error
    assert "hf:acme/broken: the download broke off" in said
    assert "run it again; no half file is used" in said
    assert not (tmp_path / "adapted").exists()
    assert not in_cache(home, ".incomplete")
    said = run("load", "hf:acme/broken", offline=True, rc=2).error
    assert "the copy of acme/broken in the local cache is incomplete, it lacks model.safetensors" in said
    server.cuts.clear()
    assert run("load", "hf:acme/broken").json["weights"] == hashes[1]


def test_a_directory_wins_over_the_hub_except_for_a_saved_commit(server, run, berts, hashes, tmp_path):
    server.commit("acme/shadow", berts[0])
    run("apply", "hf:acme/shadow", *LORA, "-o", tmp_path / "adapted")
    # A directory of the name of the repository, with other weights, in the current directory.
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "shadow").symlink_to(berts[1])
    assert run("load", "hf:acme/shadow", cwd=tmp_path).json["weights"] == hashes[1]
    run("verify", tmp_path / "adapted", f"hf:{berts[0]}", "--tolerance", 0, cwd=tmp_path)


def test_files_that_are_fetched():
    def chosen(*names, **keywords):
        return choose("hf:a/b", "a/b", names, keywords=keywords)

    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = "model.safetensors.index.json"
    assert chosen("config.json", index, *shards, "pytorch_model.bin", "x.py") == [
        "config.json",
        *shards,
        index,
    ]
    assert chosen("config.json", "model.safetensors", "model.fp16.safetensors") == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    assert chosen("config.json", "model.safetensors", "model.fp16.safetensors", variant="fp16") == [
        "config.json", "model.fp16.safetensors",
    ]  # fmt: skip
    assert chosen("config.json", "pytorch_model.bin") == ["config.json", "pytorch_model.bin"]
    assert chosen("config.json", "text/config.json", "text/model.safetensors", subfolder="text") == [
        "text/config.json", "text/model.safetensors",
    ]  # fmt: skip
    assert chosen("m-Q4.gguf", "tokenizer.json", gguf_file="m-Q4.gguf") == ["tokenizer.json", "m-Q4.gguf"]
    with pytest.raises(LoadError, match=r"has no config\.json; give --model-kwarg gguf_file=m-Q4\.gguf"):
        chosen("m-Q4.gguf")
    with pytest.raises(LoadError, match=r"has no file other\.gguf"):
        chosen("m-Q4.gguf", gguf_file="other.gguf")


def test_the_fingerprint_has_the_files_that_are_read(tmp_path):
    for name in ("config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path, {})] == ["model.safetensors", "config.json"]
    assert [path.name for path in weight_files(tmp_path, {"variant": "fp16"})] == [
        "model.fp16.safetensors", "config.json",
    ]  # fmt: skip


def test_arguments_that_would_be_stored_are_refused(tmp_path):
    for key in ("token", "cache_dir"):
        with pytest.raises(LoadError, match=f"--model-kwarg {key} is not used; "):
            surgery.load("hf:acme/bert", model_kwargs={key: "x"})


def test_random_and_pretrained_contradict():
    with pytest.raises(LoadError, match="leave it out, or the argument that names others"):
        timm_loader.load("timm:test_vit", LoadOptions(random=True, model_kwargs={"pretrained": True}))
    with pytest.raises(LoadError, match="random weights can be asked for hf:, timm: and diffusers: models"):
        surgery.load("py:tests.shared.models:attention", random=True)
