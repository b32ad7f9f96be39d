"""Causal LLMs of many architectures: each is right in batches, windows crossed, or refused when it is loaded.

Right means: eight contexts of different lengths in one search give what transformers' own ``generate(num_beams=4)``
gives for each alone, and the states are those of one plain forward pass.
"""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers
from helpers import tiny_models

from sdumc.errors import UserError
from sdumc.pretrained import internals
from sdumc.pretrained.internals import EVERYTHING
from sdumc.pretrained.llm import SpeechLLM
from sdumc.training.projector import answer_loss

NAMES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**NAMES, "num_key_value_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 6}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
BOTH_LAYERS = {**WINDOW, "use_sliding_window": True, "max_window_layers": 0}
HEADS = {"head_dim": 8}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

RIGHT = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, **WINDOW}),
    "mistral-full": ("Mistral", {**GROUPED, "sliding_window": None}),
    "ministral": ("Ministral", {**GROUPED, **HEADS, **MIXED}),
    "gemma": ("Gemma", {**GROUPED, **HEADS}),
    "gemma2": ("Gemma2", {**GROUPED, **HEADS, **MIXED, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {**GROUPED, **HEADS, **MIXED, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", GROUPED),
    "phi3": ("Phi3", {**GROUPED, **WINDOW}),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", {**GROUPED, **MIXED}),
    "cohere2": ("Cohere2", {**GROUPED, **MIXED}),
    "gpt-oss": ("GptOss", {**EXPERTS, **HEADS, **MIXED}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-windows": ("Qwen2", {**GROUPED, **BOTH_LAYERS}),
    "qwen3": ("Qwen3", {**GROUPED, **HEADS}),
    "qwen3-windows": ("Qwen3", {**GROUPED, **HEADS, **BOTH_LAYERS}),
    "qwen2-moe": ("Qwen2Moe", {**GROUPED, "num_experts": 4, "moe_intermediate_size": 16}),
    "mixtral": ("Mixtral", {**EXPERTS, **WINDOW}),
    "deepseek-v3": (
        "DeepseekV3",
        {
            **NAMES,
            **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
            **{"qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
            **{"n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        },
    ),
    "starcoder2": ("Starcoder2", {**GROUPED, **WINDOW}),
    "smollm3": ("SmolLM3", GROUPED),
    "granite": ("Granite", GROUPED),
    "glm4": ("Glm4", {**GROUPED, **HEADS}),
    "stablelm": ("StableLm", GROUPED),
    "gpt-neox": ("GPTNeoX", NAMES),
    "gpt2": ("GPT2", OLD),
    "gptj": ("GPTJ", {**OLD, "rotary_dim": 8}),
    "falcon": ("Falcon", {**NAMES, "alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "opt": ("OPT", {**NAMES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128}),
    "modernbert-decoder": (
        "ModernBertDecoder",
        {**NAMES, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "exaone4": ("Exaone4", {**GROUPED, **MIXED, "sliding_window_pattern": 2}),
    "biogpt": ("BioGpt", {**NAMES, "max_position_embeddings": 128}),
    "gpt-bigcode": ("GPTBigCode", OLD),
    "gemma4": (
        "Gemma4Text",
        {
            **{**GROUPED, **HEADS, **MIXED, "num_experts": 4, "moe_intermediate_size": 16, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
        },
    ),
    "cohere2-moe": (
        "Cohere2Moe",
        {**GROUPED, **HEADS, **MIXED, "num_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["sparse"] * 2},
    ),
    "mimo-v2-flash": (
        "MiMoV2Flash",
        {
            **{**EXPERTS, **HEADS, **MIXED, "n_routed_experts": 4, "moe_intermediate_size": 16, "v_head_dim": 8},
            **{"n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
        },
    ),
    "vaultgemma": ("VaultGemma", {**GROUPED, **HEADS, **MIXED, "query_pre_attn_scalar": 8}),
    "dbrx": (
        "Dbrx",
        {
            **{"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "gpt-neo-global": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    ),
}

REFUSED = {
    "gpt-neo": (
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        "local attention",
    ),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "position ids"),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}, "position ids"),
    "falcon-rw": ("Falcon", {**NAMES, "alibi": True}, "position ids"),
    "qwen3-next": ("Qwen3Next", {**GROUPED, **HEADS, **LINEAR}, "linear_attention"),
    "lfm2": ("Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, "conv"),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        {
            **{**EXPERTS, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
            **{"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
        },
        "linear_attention|mamba",
    ),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "position ids"),
    "gemma3n": (
        "Gemma3nText",
        {
            **{**GROUPED, **HEADS, **MIXED, "intermediate_size": [48, 48], "vocab_size_per_layer_input": 40},
            **{"hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2},
            **{"activation_sparsity_pattern": [0.0, 0.0]},
        },
        "failed a trial",
    ),
    "gemma4, inputs per layer": (
        "Gemma4Text",
        {
            **{**GROUPED, **HEADS, **MIXED, "num_kv_shared_layers": 0},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40},
        },
        "failed a trial",
    ),
    "deepseek-v4": (
        "DeepseekV4",
        {
            **{**EXPERTS, **HEADS, **WINDOW, "n_routed_experts": 4, "moe_intermediate_size": 16, "q_lora_rank": 16},
            **{"qk_rope_head_dim": 8, "n_shared_experts": 1, "index_head_dim": 8, "index_n_heads": 2},
            **{"layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"]},
            **{"mlp_layer_types": ["hash_moe", "hash_moe"], "num_nextn_predict_layers": 0},
        },
        "compressed_sparse_attention",
    ),
    "rwkv": ("Rwkv", {**NAMES, "attention_hidden_size": 32}, "position ids"),
    "openai-gpt": ("OpenAIGPT", OLD, "not every layer keeps keys and values|trial"),
    "trocr": (
        "TrOCR",
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
        "position ids",
    ),
    "bert": ("Bert", NAMES, "architecture is not supported|trial"),
    "llama4": (
        "Llama4Text",
        {**EXPERTS, **HEADS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 6},
        "chunked_attention",
    ),
    "t5": ("T5", {}, "a t5 model is no causal LLM"),
}


def make(folder, name, settings):
    """A tiny random checkpoint of the real class, in which answers end at different lengths."""
    config_class = getattr(transformers, f"{name}Config", None)
    stem = name.removesuffix("Text")
    model_class = next(
        (
            found
            for form in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
            if (found := getattr(transformers, stem + form, None))
        ),
        None,
    )
    if config_class is None or model_class is None:
        pytest.skip(f"this transformers has no {name}")
    tokenizer = tiny_models.llm_tokenizer()
    torch.manual_seed(0)
    more = {} if name == "GPTNeoX" else {"tie_word_embeddings": False}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    model = model_class(config_class(vocab_size=len(tokenizer), **special, **more, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.25 + (1 if parameter.dim() == 1 else 0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def plain_loss(llm, context, answer):
    whole = torch.cat([context, llm.embed(answer)])[None]
    logits = llm.model(inputs_embeds=whole, use_cache=False).logits[0, len(context) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")


def contexts_of(llm):
    generator = torch.Generator().manual_seed(1)
    lengths = [2, 25, 9, 4, 14, 3, 19, 7]
    return llm.contexts([torch.randn(n, llm.dim, generator=generator) for n in lengths], chat=False)


@torch.no_grad()
def alone(llm, context, limit):
    """Tokens by ``generate``, and states (N, D) by one plain pass."""
    mask = torch.ones(1, len(context), dtype=torch.long)
    out = llm.model.generate(
        inputs_embeds=context[None], attention_mask=mask, num_beams=4, max_new_tokens=limit, do_sample=False
    )
    tokens = out[0].tolist()
    tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
    whole = torch.cat([context, llm.embed(tokens)])[None]
    hidden = llm.model(inputs_embeds=whole, use_cache=False, output_hidden_states=True).hidden_states
    return tokens, sum(hidden[layer][0, len(context) - 1 :] for layer in llm.layers)


QUICK = {"llama", "mistral", "gemma2", "phi3", "opt", "gpt2", "bloom", "falcon-rw", "lfm2", "gpt-neo"}


def kinds(table):
    return [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in table]


@pytest.mark.parametrize("kind", kinds(RIGHT))
def test_right(kind, tmp_path):
    llm = SpeechLLM(make(tmp_path / "llm", *RIGHT[kind]), layers=[-1, -2])
    contexts = contexts_of(llm)
    assert max(map(len, contexts)) > 6 * 3  # far beyond the windows
    written = llm.transcribe(contexts, max_new_tokens=24)
    encoded = llm.encode(contexts, [w.tokens for w in written])
    losses = 0.0
    for context, mine, states in zip(contexts, written, encoded, strict=True):
        tokens, expected = alone(llm, context, 24)
        assert mine.tokens == tokens
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(mine.states, expected[: len(mine.states)], rtol=1e-3, atol=2e-4)
        losses += float(plain_loss(llm, context, [*tokens, 2]))
    together = answer_loss(llm, contexts, [[*w.tokens, 2] for w in written])
    assert float(together) == pytest.approx(losses, rel=1e-4)


def test_the_language_model_of_one_that_sees_too(tmp_path):
    """Gemma 3 of 4B and more come with a vision tower."""
    text = SpeechLLM(make(tmp_path / "text", *RIGHT["gemma3"]), layers=[-1, -2])
    pictures = {**NAMES, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text.model.config.to_dict(),
        vision_config=pictures,
        mm_tokens_per_image=1,
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "tie_word_embeddings": False},
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.base.state_dict())
    model.lm_head.load_state_dict(text.model.lm_head.state_dict())
    model.save_pretrained(tmp_path / "both")
    text.tokenizer.save_pretrained(tmp_path / "both")
    both = SpeechLLM(str(tmp_path / "both"), layers=[-1, -2])
    assert both.attention == text.attention
    assert both.most_positions is None
    contexts = contexts_of(text)[:3]
    for a, b in zip(
        text.transcribe(contexts, max_new_tokens=12), both.transcribe(contexts, max_new_tokens=12), strict=True
    ):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.states, b.states, rtol=1e-4, atol=1e-4)


def test_the_windows_of_these_tests_matter(tmp_path, monkeypatch):
    """Without them, search and states are others."""
    folder = make(tmp_path / "llm", *RIGHT["mistral"])
    llm = SpeechLLM(folder)
    assert llm.attention.reach == {"sliding_attention": 6}
    contexts = contexts_of(llm)
    right = llm.encode(contexts, [[5, 6, 7]] * 8)
    llm.attention = EVERYTHING
    assert (
        max(float((a - b).abs().max()) for a, b in zip(right, llm.encode(contexts, [[5, 6, 7]] * 8), strict=True)) > 0.1
    )
    monkeypatch.setattr(internals, "possible_attentions", lambda *_: [EVERYTHING])
    with pytest.raises(UserError, match="failed a trial"):
        SpeechLLM(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_low_precision_is_not_refused(kind, dtype, tmp_path):
    SpeechLLM(make(tmp_path / "llm", *RIGHT[kind]), dtype=dtype, layers=[-1, -2])


ROPE = {"max_position_embeddings": 64, "original_max_position_embeddings": 20}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}  # also known to transformers 4


@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("Phi3", {**GROUPED, **ROPE, "rope_scaling": LONG}, 20),
        (
            "Llama",
            {**GROUPED, "max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            20,
        ),
        ("GPT2", {**OLD, "n_positions": 20}, 20),
        ("OPT", {**RIGHT["opt"][1], "max_position_embeddings": 20}, 20),
        ("GPTJ", {**OLD, "n_positions": 20, "rotary_dim": 8}, 20),
    ],
)
def test_contexts_that_an_llm_cannot_read_are_refused(name, settings, most, tmp_path):
    llm = SpeechLLM(make(tmp_path / "llm", name, settings))
    assert llm.most_positions == most
    contexts = [torch.randn(14, llm.dim)]
    assert len(llm.transcribe(contexts, max_new_tokens=6)) == 1
    for call in (
        lambda: llm.transcribe(contexts, max_new_tokens=7),
        lambda: llm.encode(contexts, [[5] * 7]),
        lambda: answer_loss(llm, contexts, [[5] * 7]),
    ):
        with pytest.raises(UserError, match="more than the 20 that this LLM can read"):
            call()


def test_what_the_search_does_not_follow_is_said(tmp_path, caplog):
    folder = make(tmp_path / "llm", *RIGHT["llama"])
    SpeechLLM(folder)
    assert "does not do that" not in caplog.text
    path = tmp_path / "llm" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.2, "do_sample": False}))
    with caplog.at_level(logging.INFO, "sdumc"):
        SpeechLLM(folder)
    assert "asks for repetition_penalty=1.2; the search does not do that" in caplog.text


@pytest.mark.parametrize("kind", kinds(REFUSED))
def test_refused_at_load(kind, tmp_path):
    name, settings, reason = REFUSED[kind]
    with pytest.raises(UserError, match=reason) as caught:
        SpeechLLM(make(tmp_path / "llm", name, settings))
    assert "\n" not in str(caught.value)


def test_folders_of_another_kind_are_refused(tmp_path):
    whisper, wavlm = tiny_models.whisper(tmp_path / "whisper"), tiny_models.wavlm(tmp_path / "wavlm", ctc=True)
    for folder in (whisper, wavlm):
        with pytest.raises(UserError, match=str(folder)) as caught:
            SpeechLLM(str(folder))
        assert "\n" not in str(caught.value)


def test_an_llm_without_an_end_token_is_refused(tmp_path):
    folder = tmp_path / "llm"
    make(folder, *RIGHT["llama"])
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("eos_token", None)
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": None} if "token" not in name else settings))
    with pytest.raises(UserError, match="names an end-of-sentence token"):
        SpeechLLM(str(folder))
