"""Roles and parts on architectures whose weights have known names; the tested code never sees a name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from surgery.capture import from_module, trace
from surgery.graph.analysis.roles import Roles, find_roles
from surgery.graph.ops import BUILTIN_WEIGHT_OPS, Call, find_calls
from tests.shared.counting import lines_run

transformers = pytest.importorskip("transformers")

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
LLAMA = {**BERT, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}
MLA = {
    **LLAMA,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 99, **TOKENS}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    **TOKENS,
    "decoder_start_token_id": 1,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 99,
    **TOKENS,
    "decoder_start_token_id": 1,
}
VIT = {k: BERT[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
SPEECH = {
    **{k: v for k, v in BERT.items() if k != "max_position_embeddings"},
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}

BERT_NAMES = {
    r"word_embeddings|cls\.predictions\.decoder": "embed.token|head",
    r"position_embeddings": "embed.position",
    r"token_type_embeddings": "embed.type",
    r"\.query": "attn.q",
    r"\.key": "attn.k",
    r"\.value": "attn.v",
    r"attention\.output\.dense": "attn.out",
    r"intermediate\.dense": "mlp.up",
    r"layer\.\d+\.output\.dense": "mlp.down",
    r"pooler\.dense|transform\.dense": "head.dense",
    r"^classifier": "head",
}
LLAMA_NAMES = {
    r"embed_tokens": "embed.token",
    r"\.q_proj": "attn.q",
    r"\.k_proj": "attn.k",
    r"\.v_proj": "attn.v",
    r"\.o_proj": "attn.out",
    r"\.gate_proj": "mlp.gate",
    r"\.up_proj": "mlp.up",
    r"\.(experts\.)?down_proj": "mlp.down",
    r"experts\.gate_up_proj|mlp\.gate_up_proj": "mlp.gate_up",
    r"mlp\.gate\.weight": "mlp.router",
    r"lm_head": "head",
}
BART_NAMES = {
    r"lm_head|proj_out|embed_tokens|shared": "embed.token|head",
    r"embed_positions": "embed.position",
    r"\.q_proj": "attn.q",
    r"\.k_proj": "attn.k",
    r"\.v_proj": "attn.v",
    r"\.out_proj": "attn.out",
    r"\.fc1": "mlp.up",
    r"\.fc2": "mlp.down",
    r"encoder\.conv": "conv",
}
T5_NAMES = {
    r"lm_head|embed_tokens|shared": "embed.token|head",
    r"relative_attention_bias": "attn.bias",
    r"Attention\.q\.": "attn.q",
    r"Attention\.k\.": "attn.k",
    r"Attention\.v\.": "attn.v",
    r"Attention\.o\.": "attn.out",
    r"\.wi\.|\.wi_1": "mlp.up",
    r"\.wi_0": "mlp.gate",
    r"\.wo\.": "mlp.down",
}
FUSED_NAMES = {
    r"lm_head|embed_out|embed_tokens|embed_in|wte|word_embeddings": "embed.token|head",
    r"wpe": "embed.position",
    r"c_attn|query_key_value|qkv_proj": "attn.qkv",
    r"attn\.c_proj|attention\.dense|o_proj|attn\.out_proj": "attn.out",
    r"c_fc|h_to_4h|fc_in": "mlp.up",
    r"gate_up_proj": "mlp.gate_up",
    r"mlp\.c_proj|4h_to_h|down_proj|fc_out": "mlp.down",
}
VISION_NAMES = {
    r"patch_embed.*projection|patch_embedding": "embed.patch",
    r"position_embedding": "embed.position",
    r"token_embedding": "embed.token",
    r"\.(q_proj|query)": "attn.q",
    r"\.(k_proj|key)": "attn.k",
    r"\.(v_proj|value)": "attn.v",
    r"\.(o_proj|out_proj)|attention\.output\.dense": "attn.out",
    r"continuous_position_bias_mlp": "attn.bias",
    r"\.fc1|intermediate\.dense": "mlp.up",
    r"\.fc2|blocks\.\d+\.output\.dense": "mlp.down",
    r"downsample\.reduction": "linear",
    r"classifier|visual_projection|text_projection": "head",
}
SPEECH_NAMES = {
    r"conv": "conv",
    r"feature_projection": "linear",
    r"rel_attn_embed|gru_rel_pos_linear": "attn.bias",
    r"\.q_proj": "attn.q",
    r"\.k_proj": "attn.k",
    r"\.v_proj": "attn.v",
    r"\.out_proj": "attn.out",
    r"intermediate_dense": "mlp.up",
    r"output_dense": "mlp.down",
    r"lm_head": "head",
}
DEBERTA_NAMES = {
    r"word_embeddings": "embed.token",
    r"position_embeddings": "embed.position",
    r"\.query_proj": "attn.q",
    r"\.key_proj": "attn.k",
    r"\.value_proj": "attn.v",
    r"pos_(key|query)_proj": "attn.bias",
    **{k: v for k, v in BERT_NAMES.items() if "dense" in k or "classifier" in k},
}
ALBERT_NAMES = {
    r"predictions\.decoder": "embed.token|head",
    r"embedding_hidden_mapping_in": "linear",
    r"attention\.dense": "attn.out",
    r"ffn\.": "mlp.up",
    r"ffn_output": "mlp.down",
    r"predictions\.dense": "head.dense",
    **BERT_NAMES,
}


def text(decoder: bool = False) -> dict[str, Tensor]:
    inputs = {"input_ids": torch.randint(3, 90, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    return {**inputs, "decoder_input_ids": torch.randint(3, 90, (2, 5))} if decoder else inputs


def image(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


@dataclass(frozen=True)
class Case:
    """names: pattern of weight name -> role; `a|b` if a tied weight has both. cross: number of cross-attentions."""

    cls: str
    model_type: str
    config: dict[str, Any]
    names: Mapping[str, str]
    attentions: int
    cross: int = 0
    inputs: Callable[[], dict[str, Tensor]] = text
    eager: bool = False


LM, MLM, CLS = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"
S2S, IMG, CTC = "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModelForCTC"
both = lambda: text(decoder=True)  # noqa: E731
clip = lambda: {"input_ids": torch.randint(3, 90, (2, 7)), **image()}  # noqa: E731
wave = lambda: {"input_values": torch.randn(2, 1000)}  # noqa: E731
mel = lambda: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": text()["input_ids"]}  # noqa: E731
TOWERS = {
    "text_config": {**BERT, **TOKENS, "projection_dim": 16},
    "vision_config": {**VIT, "image_size": 32, "patch_size": 8, "projection_dim": 16},
    "projection_dim": 16,
}

CASES = {
    "bert": Case(CLS, "bert", BERT, BERT_NAMES, 2),
    "bert-eager": Case(MLM, "bert", BERT, BERT_NAMES, 2, eager=True),
    "albert": Case(MLM, "albert", {**BERT, "embedding_size": 16}, ALBERT_NAMES, 2),
    "deberta-v2": Case(
        CLS,
        "deberta-v2",
        {**BERT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True, "position_buckets": 16},
        DEBERTA_NAMES,
        2,
    ),
    "gpt2": Case(LM, "gpt2", GPT, FUSED_NAMES, 2),
    "bloom": Case(LM, "bloom", {**BERT, **TOKENS, "n_layer": 2, "n_head": 4}, FUSED_NAMES, 2),
    "falcon": Case(LM, "falcon", {**BERT, **TOKENS}, FUSED_NAMES, 2),
    "phi3": Case(LM, "phi3", {**LLAMA}, FUSED_NAMES, 2),
    "llama-eager": Case(LM, "llama", LLAMA, LLAMA_NAMES, 2, eager=True),
    "qwen3": Case(LM, "qwen3", LLAMA, LLAMA_NAMES, 2),
    "mixtral": Case(LM, "mixtral", {**LLAMA, "num_local_experts": 4}, LLAMA_NAMES, 2),
    "deepseek_v3": Case(
        LM,
        "deepseek_v3",
        MLA,
        {
            r"q_a_proj": "attn.q.a",
            r"q_b_proj": "attn.q.b",
            r"kv_a_proj": "attn.kv.a",
            r"kv_b_proj": "attn.kv.b",
            **LLAMA_NAMES,
        },
        2,
    ),
    "t5": Case(S2S, "t5", T5, T5_NAMES, 6, 2, both),
    "t5-gated-eager": Case(S2S, "t5", {**T5, "feed_forward_proj": "gated-gelu"}, T5_NAMES, 6, 2, both, True),
    "bart": Case(S2S, "bart", {**SEQ2SEQ, "max_position_embeddings": 64}, BART_NAMES, 6, 2, both),
    "whisper": Case(
        "WhisperForConditionalGeneration",
        "whisper",
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 30},
        BART_NAMES,
        6,
        2,
        mel,
    ),
    "swinv2": Case(
        IMG,
        "swinv2",
        {
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "image_size": 32,
            "patch_size": 2,
        },
        VISION_NAMES,
        3,
        inputs=image,
    ),
    "clip": Case("AutoModel", "clip", TOWERS, VISION_NAMES, 4, inputs=clip),
    "wavlm": Case(CTC, "wavlm", SPEECH, SPEECH_NAMES, 2, inputs=wave),
}


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[case.model_type](**case.config)
    cls = getattr(transformers, case.cls)
    make = cls.from_config if case.cls.startswith("Auto") else cls._from_config
    model = make(config, **({"attn_implementation": "eager"} if case.eager else {})).eval()
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    if case.model_type in ("mixtral", "deepseek_v3"):
        model.set_experts_implementation("batched_mm")
    return model


def capture(module: nn.Module, inputs: Any) -> tuple[fx.GraphModule, list[Call], Roles]:
    gm = trace(from_module(module, inputs, {}, copy_module=False), check=False).graph_module
    names = {name for name, _ in gm.named_parameters(remove_duplicate=False)}
    calls = find_calls(list(gm.graph.nodes), BUILTIN_WEIGHT_OPS, lambda node: node.target in names)
    return gm, calls, find_roles(gm.graph, calls)


def weight_name(call: Call) -> str:
    return str(call.weight.target) if call.weight is not None else call.computed_from[0]


@pytest.mark.parametrize("name", CASES)
def test_every_weight_of_an_architecture(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    _, calls, roles = capture(build(case), case.inputs())
    for call in calls:
        weight, role = weight_name(call), roles.role[call.node]
        if call.kind == "norm":
            assert role == "norm", weight
            continue
        expected = next((r for pattern, r in case.names.items() if re.search(pattern, weight)), None)
        assert expected is not None, f"{weight} ({role}) is in no pattern"
        assert role in expected.split("|"), f"{weight} is {role}"
    assert len(roles.attentions) == case.attentions
    assert sum(attention.cross for attention in roles.attentions) == case.cross
    assert all(attention.out for attention in roles.attentions)


def test_every_call_of_a_shared_weight_has_its_role() -> None:
    _, calls, roles = capture(build(CASES["albert"]), text())
    queries = [call for call in calls if roles.role[call.node] == "attn.q"]
    assert len(queries) == 2
    assert queries[0].weight is queries[1].weight


INTERLEAVED = {
    "gpt2": CASES["gpt2"],
    "bloom": CASES["bloom"],
    "gpt_neox": Case(LM, "gpt_neox", {**BERT, **TOKENS}, FUSED_NAMES, 2),
    "falcon, one key": CASES["falcon"],
    "falcon, groups": Case(
        LM, "falcon", {**BERT, **TOKENS, "new_decoder_architecture": True, "num_kv_heads": 2}, FUSED_NAMES, 2
    ),
    "codegen": Case(LM, "codegen", {**GPT, "rotary_dim": 4}, FUSED_NAMES, 2),
    "phi3": CASES["phi3"],
    "deepseek_v3": CASES["deepseek_v3"],
}


class Record(fx.Interpreter):
    """Keeps the values of some nodes."""

    def __init__(self, gm: fx.GraphModule, keep: Mapping[str, fx.Node]) -> None:
        super().__init__(gm)
        self.keep, self.kept = keep, {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for letter, node in self.keep.items():
            for reader in node.users:
                # Read where the attention reads it: writes in place may come after the node itself.
                if n is reader and reader.op == "call_function":
                    self.kept[letter] = self.env[node].clone() if node in self.env else None
            if n is node:
                self.kept.setdefault(letter, value)
        return value


def operands(gm: fx.GraphModule, roles: Roles, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Operands of the first attention."""
    record = Record(gm, roles.attentions[0].operands)
    record.garbage_collect_values = False
    record.run(*inputs.values())
    return record.kept


@pytest.mark.parametrize("name", INTERLEAVED)
def test_parts_are_the_rows_that_make_them(name: str) -> None:
    case = INTERLEAVED[name]
    inputs = case.inputs()
    model = build(case)
    gm, calls, roles = capture(model, inputs)
    call = next(c for c in calls if c.node in roles.parts)
    rows = roles.parts[call.node]
    assert set(rows) == ({"k", "v"} if name == "deepseek_v3" else {"q", "k", "v"})
    size = call.node.meta["val"].shape[-1]
    assert sorted(r for part in rows.values() for r in part) == list(range(size))
    before = operands(gm, roles, inputs)
    for part, indices in rows.items():
        changed = copy.deepcopy(gm)
        weight = changed.get_parameter(weight_name(call))
        with torch.no_grad():
            weight.index_fill_(call.layout.index("o"), torch.tensor(indices), 0.0)
            if call.bias is not None:
                changed.get_parameter(str(call.bias.target)).index_fill_(0, torch.tensor(indices), 0.0)
        copied = {n.name: n for n in changed.graph.nodes}
        mirror = [
            type(a)(a.core, {k: copied[n.name] for k, n in a.operands.items()}, (), (), ())
            for a in roles.attentions
        ]
        after = operands(changed, Roles({}, mirror), inputs)
        differs = {letter for letter in before if not torch.equal(before[letter], after[letter])}
        assert differs == {part}
        # DeepSeek's keys have a rotary part, which is made by kv_a.
        assert name == "deepseek_v3" or not after[part].any()


def test_timm_fused_convolution_norm_and_cross_covariance() -> None:
    timm = pytest.importorskip("timm")
    for name, settings, letters in (
        ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32}, "qkv"),
        ("xcit_nano_12_p16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32}, "qkv"),
        ("cait_xxs24_224", {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32}, "qkv"),
    ):
        model = timm.create_model(name, **settings).eval()
        _, calls, roles = capture(model, (torch.randn(2, 3, 32, 32),))
        by_name = {weight_name(call): roles.role[call.node] for call in calls}
        fused = [call.node for call in calls if weight_name(call).endswith("qkv.weight")]
        assert fused
        for node in fused:
            assert roles.role[node] == "attn." + letters
            assert roles.parts[node] == {
                part: tuple(range(32 * i, 32 * i + 32)) for i, part in enumerate("qkv")
            }
        assert by_name["head.weight"] == "head"
        if name.startswith("cait"):
            assert (
                by_name["blocks.0.attn.proj_l.weight"] == by_name["blocks.0.attn.proj_w.weight"] == "attn.mix"
            )


class Net(nn.Module):
    """A plain convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 8, 3, padding=1)
        self.dense = nn.Linear(8, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.norm(self.one(x)).relu()).relu().mean((2, 3))
        return self.head(self.dense(x).relu())


def test_a_convolutional_network() -> None:
    _, calls, roles = capture(Net().eval(), (torch.randn(2, 1, 8, 8),))
    assert [roles.role[c.node] for c in calls] == ["conv", "norm", "conv", "head.dense", "head"]
    assert roles.attentions == []
    assert roles.parts == {}


def test_a_plain_mlp_has_a_head_only() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    _, calls, roles = capture(model, (torch.randn(2, 4),))
    assert [roles.role[c.node] for c in calls][-1] == "head"
    assert not any(role.startswith("attn") for role in roles.role.values())


class Adapted(nn.Module):
    """Attention whose query has a low-rank update and whose scores are hand-made, keys first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x) + self.b(self.a(x))
        weights = torch.einsum("bjd,bid->bij", self.k(memory), q).softmax(-1)
        return x + self.o(weights @ self.v(memory) * self.gate(x).sigmoid())


def test_low_rank_update_gate_and_cross_attention() -> None:
    _, calls, roles = capture(Adapted(), (torch.randn(2, 3, 8), torch.randn(2, 5, 8)))
    found = {weight_name(call).split(".")[0]: roles.role[call.node] for call in calls}
    assert found == {
        "q": "attn.q",
        "a": "attn.q.a",
        "b": "attn.q.b",
        "k": "attn.k",
        "v": "attn.v",
        "o": "attn.out",
        "gate": "attn.gate",
    }
    assert [attention.cross for attention in roles.attentions] == [True]


class Interleaved(nn.Module):
    """Rows in turn: q0 k0 v0 q1 k1 v1 …; with `shared`, keys are values."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).clamp(-5, 5).unflatten(-1, (8, 3)).unbind(-1)
        return x + self.o(nn.functional.scaled_dot_product_attention(q, v if self.shared else k, v))


def test_rows_in_turn_and_no_parts_where_they_overlap() -> None:
    _, calls, roles = capture(Interleaved(False), (torch.randn(2, 3, 8),))
    assert roles.parts[calls[0].node] == {part: tuple(range(i, 24, 3)) for i, part in enumerate("qkv")}
    _, calls, roles = capture(Interleaved(True), (torch.randn(2, 3, 8),))
    assert roles.parts == {}
    assert roles.role[calls[0].node] == "attn.qkv"


def test_linear_in_the_number_of_nodes() -> None:
    def work(layers: int) -> int:
        graph, calls = deep(layers)
        return lines_run(lambda: find_roles(graph, calls))

    # Eight times the nodes: 8 where the work is linear, 64 where it is quadratic; a tenth for what is done once.
    assert work(160) < 8.8 * work(20)
    graph, calls = deep(1000)
    roles = find_roles(graph, calls)
    assert len(roles.attentions) == 1000
    assert {roles.role[c.node] for c in calls} == {
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.out",
        "mlp.up",
        "mlp.down",
    }


def deep(layers: int) -> tuple[fx.Graph, list[Call]]:
    """Transformer layers on one residual stream."""
    aten = torch.ops.aten
    graph, value, square = fx.Graph(), torch.empty(2, 3, 8), torch.empty(8, 8)
    calls: list[Call] = []

    def op(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = value
        return node

    def linear(x: fx.Node) -> fx.Node:
        weight = graph.create_node("get_attr", "w", name=f"w{len(calls)}")
        weight.meta["val"] = square
        node = op(aten.linear.default, x, weight)
        calls.append(Call(node, BUILTIN_WEIGHT_OPS[aten.linear.default], "linear", x, weight, "oi"))
        return node

    x = mask = graph.placeholder("x")
    x.meta["val"] = value
    for _ in range(layers):
        h = op(aten.mul.Tensor, x, op(aten.rsqrt.default, op(aten.pow.Tensor_Scalar, x, 2)))
        q, k, v = (op(aten.view.default, linear(h), [2, 3, 8]) for _ in range(3))
        x = op(aten.add.Tensor, x, linear(op(aten.scaled_dot_product_attention.default, q, k, v, mask)))
        x = op(aten.add.Tensor, x, linear(op(aten.gelu.default, linear(x))))
    graph.output((op(aten.alias.default, x),))
    return graph, calls
