"""References and options in files: no file makes surgery run code, unpickle, or read outside its directory."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy
import onnx
import pytest
import torch
import yaml

import surgery
from surgery.capture import stored_options
from surgery.capture.budget import limited
from surgery.cli import main
from surgery.cli.loading import _read_tensors
from surgery.cli.recipe import read_recipe, refuse_code
from surgery.common.errors import ExportError, LoadError, SurgeryError
from surgery.export import OnnxModel, generator, provenance_of
from surgery.export.untrusted import read_checked
from tests.security import crafted
from tests.security.mutations import MARKER

# -- recipes


def recipe(tmp_path, **sections):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"passes": [{"pass": "full", "target": "all"}], **sections}))
    return path


CODE_IN_TRAIN = {
    "a teacher": {"objective": {"name": "distill", "teacher": "py:evil:make"}},
    "a nested objective": {"objective": {"name": "distill", "teacher": "hf:x", "of": "classification,label=evil:score"}},  # noqa: E501
    "a reward": {"objective": {"name": "ppo", "reward": "evil:score"}},
    "a system call as a reward": {"objective": {"name": "ppo", "reward": "os:system"}},
    "an attribute of a module": {"objective": {"name": "grpo", "reward": "subprocess:call"}},
}  # fmt: skip


@pytest.mark.parametrize("what", CODE_IN_TRAIN)
def test_a_recipe_names_no_code(what, tmp_path, plugins, elsewhere):
    train = {**CODE_IN_TRAIN[what], "data": "x.jsonl"}
    with pytest.raises(SurgeryError, match=r"'train': it names code, .*--allow-code"):
        read_recipe(recipe(tmp_path, train=train), plugins)
    assert not (elsewhere / MARKER).exists()


def test_code_that_is_named_again_may_be_named(tmp_path, plugins):
    path = recipe(tmp_path, train={**CODE_IN_TRAIN["a teacher"], "data": "x.jsonl"})
    assert read_recipe(path, plugins, ("py:evil:make",)).train is not None
    with pytest.raises(SurgeryError, match="names code"):
        read_recipe(path, plugins, ("py:evil:other",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("passes: &p [{pass: full}]\nfinish: *p", "has an alias, \\*p in line 2"),
        ("passes: [{pass: full}]\npasses: []", "has the key 'passes' twice in line 2"),
        ("passes: [{pass: lora, rank: 2, rank: 3}]", "has the key 'rank' twice"),
        ("passes: [{pass: head, head-name: a, head_name: b}]", "'head_name' is given twice"),
        ("passes: [{pass: full}]\ntrue: 1", "has the key 'true'"),
        ("passes: [{pass: full}]\n? [a]\n: 1", "has the key 'a list or mapping'"),
        ("passes: !!python/object/apply:os.system ['x']", "has the tag"),
        ("passes: [{pass: lora, alpha: .inf}]", "the number '.inf'"),
        ("passes: [{pass: lora, rank: " + "9" * 40 + "}]", "give a finite one below"),
        ("passes: " + "[" * 200 + "]" * 200, "nested more than 32 deep"),
        ("passes: [{pass: full}]\nmodle: x", "unknown key 'modle'; did you mean 'model'"),
        ("passes: [{pass: full}]\nmodel: 3", "'model' must be a reference"),
        ("passes: [{pass: full}]\ntask: [a]", "'task' must be the name of a task"),
        ("passes: [{pass: full}]\nfreeze_base: maybe", "'freeze_base' must be true or false"),
        ("passes: [{pass: full, target: 're:(?=a)b'}]", "is not read from a recipe"),
        ("passes: [{pass: lora, as: 'a b'}]", "is not a valid name"),
        ("passes: [{pass: full}]\nexport: {file: ../x.onnx}", "must be a name in the directory"),
        ("passes: [{pass: lora, rank: 1}]\n" + "#" * 2**21, "is longer than"),
    ],
)
def test_yaml_of_a_recipe(text, said, tmp_path, plugins):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SurgeryError, match=said):
        read_recipe(path, plugins)


def test_nested_aliases_take_no_memory(tmp_path, plugins):
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    with crafted.memory_below(path), pytest.raises(SurgeryError, match="has an alias"):
        read_recipe(path, plugins)


KWARGS = [
    {"trust_remote_code": True}, {"weights_only": False}, {"use_safetensors": False}, {"allow_all_kernels": True},
    {"use_kernels": True}, {"code_revision": "main"}, {"auto_map": {"AutoModel": "x--y.Z"}}, {"_from_auto": True},
    {"attn_implementation": "someone/kernel"}, {"attn_implementation": {"": "someone/kernel"}},
    {"text_config": {"attn_implementation": "someone/kernel"}}, {"text_config": {"auto_map": {}}},
    {"quantization_config": {}}, {"offload_folder": "/tmp/x"}, {"cache_dir": "/tmp/x"}, {"state_dict": {}},
    {"gguf_file": "/etc/passwd"}, {"gguf_file": "../x.gguf"}, {"subfolder": ".."}, {"subfolder": "C:\\x"},
    {"dtype": "load"}, {"num_labels": 10**9}, {"num_hidden_layers": 10**6}, {"hidden_size": 10**12},
    {"image_size": 10**6}, {"vision_config": {"image_size": 10**6}}, {"device_map": "auto"}, {"proxies": {}},
    {"rope_theta": float("inf")}, {"x": "a\nb"}, {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": {}}}}}}}}}},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", KWARGS, ids=lambda kwargs: json.dumps(kwargs)[:50])
def test_constructor_arguments_from_files(kwargs, tmp_path):
    with pytest.raises(SurgeryError):
        stored_options.check_kwargs(kwargs, "hf:x", "here", LoadError)
    with pytest.raises(SurgeryError):
        refuse_code(None, "hf:x", tmp_path / "recipe.yaml", kwargs)


def test_usual_constructor_arguments_pass():
    usual = {
        "num_labels": 3, "dtype": "float32", "num_hidden_layers": 2, "id2label": {"0": "a", "1": "b"},
        "attn_implementation": "eager", "gguf_file": "x.gguf", "rope_theta": 1e6, "problem_type": None,
        "trust_remote_code": False, "ignore_mismatched_sizes": True, "checkpoint_path": "/x/y.safetensors",
    }  # fmt: skip
    stored_options.check_kwargs(usual, "hf:x", "here", LoadError)
    stored_options.check_kwargs({"anything": 10**12}, "py:mine:make", "here", LoadError)
    stored_options.check_example({"batch": 4, "seq": 512}, "here", LoadError)
    for sizes in ({"batch": 10**9}, {"batch": 2**12, "seq": 2**12}, {"image_size": 10**5}, {"seq": 0}):
        with pytest.raises(LoadError):
            stored_options.check_example(sizes, "here", LoadError)


# -- saved directories


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("py:evil:make", "is code, py:evil:make"),
        ("evil.pt2", "there is no such file"),
        ("x.bin", "holds a pickle"),
        ("nothing:x", "is not a model reference"),
        ("hf:./nowhere", "there is no directory"),
        ("", "was saved from a module given in Python"),
    ],
)
def test_the_base_of_a_manifest(ref, said, folder, plugins, elsewhere):
    manifest = crafted.manifest_of(folder)
    manifest["base"]["ref"] = ref
    crafted.seal(folder, manifest)
    with pytest.raises(LoadError, match=said):
        surgery.load(str(folder), plugins=plugins)
    assert not (elsewhere / MARKER).exists()


def test_a_pt2_base_needs_trust(folder, plugins, elsewhere):
    (elsewhere / "evil.pt2").write_bytes(b"PK")
    manifest = crafted.manifest_of(folder)
    manifest["base"]["ref"] = "evil.pt2"
    crafted.seal(folder, manifest)
    with pytest.raises(LoadError, match="give --trust"):
        surgery.load(str(folder), plugins=plugins)
    (elsewhere / "evil.pt2").unlink()


@pytest.mark.parametrize("kwargs", KWARGS[:6], ids=str)
def test_the_arguments_of_a_manifest(kwargs, folder, plugins):
    manifest = crafted.manifest_of(folder)
    manifest["base"].update(ref="hf:./base", model_kwargs=kwargs)
    crafted.seal(folder, manifest)
    with pytest.raises(LoadError, match="model_kwargs: the argument"):
        surgery.load(str(folder), plugins=plugins)


def test_a_small_file_asks_for_no_huge_model():
    with (
        pytest.raises(LoadError, match="asks for a model of over"),
        limited(1000, "here"),
        torch.device("meta"),
    ):
        torch.nn.Linear(10**6, 10**6)
    with (
        pytest.raises(LoadError, match="asks for a model of over"),
        limited(1000, "here"),
        torch.device("meta"),
    ):
        torch.nn.ModuleList(torch.nn.Linear(1000, 1000) for _ in range(10**6))
    torch.nn.Linear(3, 3)  # the limit is gone


# -- ONNX


def model_with(tmp_path, location=None, dims=(2, 2), raw=b"", **external):
    """A file whose only weight has its data elsewhere, or claims a shape."""
    helper, kinds = onnx.helper, onnx.TensorProto
    weight = kinds(name="w", data_type=kinds.FLOAT, dims=dims, raw_data=raw)
    if location is not None:
        weight.data_location = kinds.EXTERNAL
        for key, value in {"location": location, **external}.items():
            weight.external_data.add(key=key, value=value)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g", [value("x", kinds.FLOAT, ["batch", 2])], [value("y", kinds.FLOAT, ["batch", 2])], [weight],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "here" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd", "../secret", "a/../../secret", "..", "", "C:\\secret", "C:secret", "\\\\host\\share", "missing",
        "*/_ORT_MEM_ADDR_/*", "a\nb", "link", "x" * 5000, "http://host/x",
    ],
)  # fmt: skip
def test_external_data_stay_in_the_directory(location, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(16))
    path = model_with(tmp_path, location)
    (path.parent / "link").symlink_to(tmp_path / "secret")
    for read in (read_checked, OnnxModel, provenance_of):
        with pytest.raises(ExportError):
            read(path)
    with pytest.raises(SystemExit) as raised:
        main(["verify", str(path), str(path)])
    assert raised.value.code == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"location": "data", "offset": "-1"}, "a number from 0 on"),
        ({"location": "data", "length": "9" * 30}, "a number from 0 on"),
        ({"location": "data", "offset": "8"}, "holds fewer values"),
        ({"location": "data", "offset": "1000"}, "too short"),
        ({"location": "data", "length": "1000"}, "too short"),
        ({"location": "data", "dims": (10**6, 10**6)}, "holds fewer values"),
        ({"dims": (10**6, 10**6), "raw": bytes(16)}, "holds fewer values"),
        ({"dims": (2**40, 2**40), "raw": bytes(16)}, "which no tensor has"),
        ({"dims": (-1, 2), "raw": bytes(16)}, "which no tensor has"),
        ({"raw": b""}, "holds fewer values"),
    ],
)
def test_claims_of_a_tensor(given, said, tmp_path):
    path = model_with(tmp_path, **given)
    (path.parent / "data").write_bytes(bytes(16))
    with crafted.memory_below(path), pytest.raises(ExportError, match=said):
        OnnxModel(path)


def test_good_files_are_read(tmp_path):
    path = model_with(tmp_path, "data")
    (path.parent / "data").write_bytes(numpy.ones(4, numpy.float32).tobytes())
    assert OnnxModel(path).run({"x": torch.ones(3, 2)})["y"].tolist() == [[2, 2]] * 3
    path = model_with(tmp_path, "sub/data", offset="4", length="16")
    (path.parent / "sub").mkdir()
    (path.parent / "sub" / "data").write_bytes(numpy.ones(5, numpy.float32).tobytes())
    assert OnnxModel(path).run({"x": torch.ones(1, 2)})["y"].tolist() == [[2, 2]]


def test_inputs_of_two_files_have_bounds(tmp_path):
    path = model_with(tmp_path, raw=bytes(16))
    made = onnx.load(path)
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40
    path.write_bytes(made.SerializeToString())
    with crafted.memory_below(path), pytest.raises(SystemExit) as raised:
        main(["verify", str(path), str(path)])
    assert raised.value.code == 2


# -- directories for generation


def generation(tmp_path, **changes):
    """The manifest of an export for generation, with two graphs that are never read."""
    spec = '[1, {"type": "builtins.dict", "context": "[]", "children_spec": []}]'
    entry = {"metadata": {"architecture": "GPT2LMHeadModel", "in_spec": spec, "out_spec": spec}}
    entry["metadata"].update(changes.pop("metadata", {}))
    manifest = {
        "schema_version": 1, "export_format": "onnx",
        "components": {part: {"file": f"{part}.onnx", **entry} for part in ("prefill", "decode")}, **changes,
    }  # fmt: skip
    (tmp_path / "export.json").write_text(json.dumps(manifest))
    for part in ("prefill", "decode"):
        (tmp_path / f"{part}.onnx").write_bytes(b"")
    return tmp_path


class Bomb:
    def __reduce__(self):
        return open, (MARKER, "w")


DEFAULTDICT = json.dumps(
    [1, {"type": "collections.defaultdict", "children_spec": [], "context": json.dumps(
        {"default_factory_module": "evil", "default_factory_name": "make", "dict_context": []}
    )}]
)  # fmt: skip
ENUM = json.dumps([1, {"type": "builtins.dict", "children_spec": [], "context": json.dumps(
    [{"\u005f_enum__": True, "fqn": "evil:make", "name": "x"}]
)}])  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"export_format": "dynamo"},
        {"export_format": ["onnx"]},
        {"components": {}},
        {"components": {p: {"file": "../x.onnx", "metadata": {}} for p in ("prefill", "decode")}},
        {"metadata": {"in_spec": DEFAULTDICT}},
        {"metadata": {"out_spec": ENUM}},
        {"metadata": {"in_spec": "[" * 5000}},
        {"metadata": {"in_spec": 3}},
        {"metadata": {"architecture": "pipeline(1)"}},
        {"metadata": {"architecture": None}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_directory_for_generation_runs_no_code(changes, tmp_path, elsewhere):
    folder = generation(tmp_path, **changes)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # the start of what torch.export.load unpickles
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    for part in ("prefill", "decode"):
        (folder / f"{part}.onnx").write_bytes(buffer.getvalue())
    with pytest.raises(ExportError):
        generator.open_generator(folder)
    assert not (elsewhere / MARKER).exists()


def test_trees_of_usual_exports_are_read():
    cache = '[1, {"type": "transformers.cache_utils.DynamicCache", "context": "[[\\"a\\"], null]", "children_spec": []}]'  # noqa: E501
    assert generator._is_tree(cache, 0)
    assert not generator._is_tree(cache.replace("transformers.", "evil."), 0)


# -- data


def test_inputs_from_files(tmp_path):
    numpy.savez(tmp_path / "good.npz", x=numpy.ones(3))
    assert _read_tensors(tmp_path / "good.npz")["x"].tolist() == [1, 1, 1]
    numpy.savez(tmp_path / "objects.npz", x=numpy.array([Bomb()], dtype=object))
    numpy.savez_compressed(tmp_path / "zeros.npz", x=numpy.zeros(60_000_000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:50])
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 8)
    with crafted.memory_below(tmp_path / "good.npz"):
        for name in ("objects.npz", "zeros.npz", "cut.npz", "cut.safetensors"):
            with pytest.raises(SurgeryError, match="cannot be read"):
                _read_tensors(tmp_path / name)
