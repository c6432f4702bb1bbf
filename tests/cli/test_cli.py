"""The command line: the session of the README, and one clear line for every bad input."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertModel, LlamaForCausalLM

from surgery.cli import main
from tests.conftest import minilm_path
from tests.shared import tiny
from tests.train.conftest import bert_config

ATTENTION = "py:tests.shared.models:attention"
ROOT = Path(__file__).parents[2]


def process(*args):
    """Run the installed command in a separate process; returns its output."""
    command = [str(Path(sys.executable).parent / "surgery"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def surgery(*args, code=0):
    """Run a command in this process, since starting forty processes takes minutes; returns its output."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        main([str(arg) for arg in args])
    assert (stopped.value.code or 0) == code, out.getvalue() + err.getvalue()
    return out.getvalue() if code in (0, 1) else err.getvalue()


def refused(*args):
    """Error line of a command with bad input, which must exit with code 2."""
    lines = surgery(*args, code=2).strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.slow
def test_session_on_minilm(tmp_path):
    model = f"hf:{minilm_path()}"
    tree = json.loads(surgery("inspect", model, "--json"))
    assert tree["parameters"] == 22_713_216
    assert {site["role"] for site in tree["sites"]} >= {"attn.q", "attn.out", "mlp.up", "embed.token", "norm"}
    session(model, 24, "73.7k", tmp_path)


def test_session_on_a_small_llama(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path / "llama")
    session(f"hf:{tmp_path / 'llama'}", 8, "1.79k", tmp_path)


def test_arguments_for_one_of_two_models(tmp_path):
    """A saved directory has its head; the other side of diff and verify needs one, and not the same for both sides."""
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(tmp_path / "bert")
    model, head = f"hf:{tmp_path / 'bert'}", ("--task", "text-classification")
    three = (*head, "--model-kwarg", "num_labels=3")
    surgery("apply", model, *three, "--pass", "full", "-o", tmp_path / "saved")
    assert "0 added, 0 removed, 0 rewired; 0 weights differ" in surgery(
        "diff", model, tmp_path / "saved", *three
    )
    assert "agree" in surgery("verify", tmp_path / "saved", model, *three)
    sides = ("--model-kwarg", "A:num_labels=2", "--model-kwarg", "B:num_labels=3")
    said = surgery("diff", model, model, *head, *sides, "--json")
    changed = json.loads(said)["weights"]
    assert {name.split(".")[-2] for name in changed} == {"classifier"}
    assert "for diff and verify" in refused("inspect", model, *head, *sides)
    assert "leave out num_labels" in refused("diff", tmp_path / "saved", tmp_path / "saved", *three)


def session(model, sites, added, tmp_path):
    """plan → apply (in a separate process) → export → merge → verify → diff → undo."""
    lora = ["--pass", "lora", "--target", "attn.*", "--rank", "4"]
    freeze = ["--pass", "freeze", "--target", "embed.*"]
    planned = json.loads(surgery("plan", model, *lora, *freeze, "--json"))
    assert [p["pass"] for p in planned] == ["lora", "freeze"]
    count = planned[0]["parameters_added"]
    said = process("apply", model, *lora, "-o", tmp_path / "adapted")
    assert f"lora: {sites} sites, {added} parameters; outputs unchanged, bit for bit" in said
    assert f"{count:,} trainable" in said
    said = surgery("export", tmp_path / "adapted", "-o", tmp_path / "adapted.onnx")
    assert "parity in onnxruntime" in said
    assert "input_ids[batch, seq]" in said
    assert f"folded lora into {sites} weights" in surgery(
        "merge", tmp_path / "adapted", "-o", tmp_path / "merged"
    )
    assert "agree" in surgery("verify", tmp_path / "merged", tmp_path / "adapted.onnx")
    assert f"0 removed, {sites} rewired" in surgery("diff", model, tmp_path / "adapted")
    surgery("undo", tmp_path / "adapted", "--pass", "lora", "-o", tmp_path / "undone")
    equal = json.loads(surgery("verify", tmp_path / "undone", model, "--json"))
    assert all(output["equal"] for output in equal["outputs"])


def test_verify_names_the_first_diverging_node(tmp_path):
    import surgery as library

    program = library.load(ATTENTION).apply(library.Lora(target="attn.out", rank=2))
    with torch.no_grad():
        program.tensors["out.lora.B"].normal_()
    program.save(tmp_path / "adapted")
    said = surgery("verify", ATTENTION, tmp_path / "adapted", "--base", ATTENTION, code=1)
    assert "differ" in said
    assert "first diverging node: " in said
    assert "in out, by " in said
    assert "after lora at out" in said


def test_adapters_are_switched_and_weighted(tmp_path):
    one = ["--pass", "lora", "--target", "attn.out", "--rank", "2", "--as", "one"]
    two = ["--pass", "lora", "--target", "attn.*", "--rank", "2", "--as", "two"]
    surgery("apply", ATTENTION, *one, *two, "-o", tmp_path / "both", "--no-freeze-base")
    said = surgery(
        "merge", tmp_path / "both", "--base", ATTENTION, "--without", "one", "-o", tmp_path / "two"
    )
    assert "folded lora:two into 2 weights" in said
    surgery(
        "export", tmp_path / "both", "--base", ATTENTION, "--weight", "one=0.5", "-o", tmp_path / "half.onnx"
    )
    line = refused(
        "merge", tmp_path / "both", "--base", ATTENTION, "--without", "three", "-o", tmp_path / "x"
    )
    assert "no pass 'three' in the journal" in line


def test_recipe_is_the_file_form(tmp_path):
    options = ["--pass", "lora", "--target", "attn.*", "--rank", "2", "--as", "a", "--pass", "freeze"]
    recipe = tmp_path / "recipe.yaml"
    surgery("apply", ATTENTION, *options, "-o", tmp_path / "one", "--save-recipe", recipe)
    assert yaml.safe_load(recipe.read_text()) == {
        "model": ATTENTION,
        "passes": [{"pass": "lora", "target": "attn.*", "as": "a", "rank": 2}, {"pass": "freeze"}],
    }
    surgery("apply", ATTENTION, "--recipe", recipe, "-o", tmp_path / "two")
    first, second = (
        json.loads((tmp_path / d / "surgery.json").read_text())["journal"] for d in ("one", "two")
    )
    assert first == second


def apply(*options):
    return ("apply", ATTENTION, *options, "-o", "/nonexistent-root/never")


BAD = {
    "unknown pass": (
        apply("--pass", "lroa", "--target", "x"),
        "there is no pass 'lroa'; did you mean 'lora'",
    ),
    "unknown option": (apply("--pass", "lora", "--rnak", "8"), "has no option --rnak; did you mean 'rank'"),
    "wrong type": (apply("--pass", "lora", "--rank", "eight"), "--rank is 'eight'"),
    "out of range": (apply("--pass", "lora", "--rank", "0"), "greater than 0"),
    "typo in a target": (apply("--pass", "lora", "--target", "projct"), "did you mean 'project'"),
    "target missing in part": (apply("--pass", "lora", "--target", "attn.*,nil"), "'nil' matches no site"),
    "no target": (apply("--pass", "lora"), "needs a target"),
    "no pass": (apply(), "no pass was given"),
    "no value": (("plan", ATTENTION, "--pass", "lora", "--target"), "--target needs a value"),
    "unknown command": (("aply",), "there is no command 'aply'; did you mean 'apply'"),
    "no such reference": (("inspect", "nope"), "is not a model reference; use hf:DIR"),
    "no such scheme": (("inspect", "hff:x"), "did you mean 'hf:'?"),
    "no such directory": (("inspect", "hf:/nonexistent"), "there is no directory /nonexistent"),
    "no such timm model": (("inspect", "timm:resnet18x"), "did you mean 'resnet18'"),
    "no such module": (("inspect", "py:nope.mod:fn"), "there is no module 'nope'"),
    "cannot be captured": (
        ("inspect", "py:tests.shared.models:breaks_on_data"),
        "control flow depends on the values",
    ),
    "a pickle": (("inspect", "model.bin"), "holds a pickle, which can run code"),
    "code that is not named": (("inspect", "{saved}"), "to run that code, name it again with --base py:"),
    "unwritable": (("export", ATTENTION, "-o", "/proc/never/model.onnx"), "/proc/never"),
    "no recipe": (("plan", "--recipe", "/nonexistent.yaml"), "recipe /nonexistent.yaml: No such file"),
    "undo what is not there": (
        ("undo", "{saved}", "--base", ATTENTION, "--pass", "x", "-o", "/tmp/never"),
        "no pass 'x'",
    ),
    "hf format of no transformers model": (
        ("merge", "{saved}", "--base", ATTENTION, "--format", "hf", "-o", "/tmp/never"),
        "--format hf needs a transformers model",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import surgery as library

    folder = tmp_path_factory.mktemp("cli") / "saved"
    library.load(ATTENTION).apply(library.Lora(target="attn.*", rank=2)).save(folder)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, saved, capsys, monkeypatch):
    args, says = BAD[case]
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main([str(arg).replace("{saved}", str(saved)) for arg in args])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert not Path("/tmp/never").exists()


def test_a_pt2_runs_nothing_without_trust(tmp_path):
    """A file whose pickle would write a marker is refused unread, so the marker does not appear."""
    from torch import nn

    program = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    torch.export.save(program, tmp_path / "model.pt2")
    assert "which can run code; give --trust" in refused("inspect", tmp_path / "model.pt2")
    assert "weight  head  4×4 f32" in surgery("inspect", tmp_path / "model.pt2", "--trust")

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "marker",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pt2")
    refused("inspect", tmp_path / "evil.pt2")
    assert not (tmp_path / "marker").exists()


def test_a_pickle_in_a_transformers_directory_is_not_run(tmp_path):
    from transformers import GPT2Config

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "marker",))

    GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path / "model")
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "model" / "pytorch_model.bin")
    refused("inspect", f"hf:{tmp_path / 'model'}")
    assert not (tmp_path / "marker").exists()


def test_a_missing_extra_is_named():
    hide = (
        "import sys\n"
        "for name in ('transformers', 'timm', 'onnx', 'onnxscript', 'onnxruntime'): sys.modules[name] = None\n"
        "from surgery.cli import main\nmain(sys.argv[1:])"
    )
    for args, extra in (
        (["inspect", "hf:/tmp"], "hf"),
        (["inspect", "timm:resnet18"], "timm"),
        (["export", ATTENTION, "-o", "/tmp/never.onnx"], "onnx"),
    ):
        done = subprocess.run([sys.executable, "-c", hide, *args], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2, done.stderr
        assert f"pip install 'torch-surgery[{extra}]'" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_overwrite_spares_what_is_not_ours(tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("secret")
    (tmp_path / "note.txt").write_text("hello")
    request = ["apply", ATTENTION, "--pass", "lora", "--target", "attn.*", "--overwrite", "-o"]
    for name, what in (("precious", "a directory with other files"), ("note.txt", "a file")):
        with pytest.raises(SystemExit) as stop:
            main([*request, str(tmp_path / name)])
        assert stop.value.code == 2
        assert f"is {what} and not a saved model" in capsys.readouterr().err
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "secret"
    assert (tmp_path / "note.txt").read_text() == "hello"


def test_a_recipe_runs_no_code_of_its_own(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {ATTENTION}\npasses:\n- pass: lora\n  target: attn.*\n")
    with pytest.raises(SystemExit) as stop:
        main(["apply", "--recipe", str(recipe), "-o", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "pass it again as MODEL" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pass_options_before_the_pass(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", ATTENTION, "--target", "attn.*", "--pass", "lora"])
    assert stop.value.code == 2
    said = "--target stands before the first --pass; put the options of a pass after its --pass NAME"
    assert said in capsys.readouterr().err


def test_undo_says_which_trained_weights_stay(tmp_path):
    """Without its only pass a program is not the base, if the rest of the base was trained."""
    import surgery as library

    program = library.load(ATTENTION).apply(library.Freeze(target="attn.out"))
    with torch.no_grad():
        trained = [t for t in program.module().parameters() if t.requires_grad]
        trained[0].add_(1)
    program.save(tmp_path / "trained")
    said = surgery(
        "undo", tmp_path / "trained", "--base", ATTENTION, "--pass", "freeze", "-o", tmp_path / "one"
    )
    assert "nothing, but 1 tensors of the base keep their trained values" in " ".join(said.split())
    said = surgery("undo", tmp_path / "trained", "--base", ATTENTION, "--all", "-o", tmp_path / "all")
    assert "nothing: it is the base, bit for bit" in " ".join(said.split())
