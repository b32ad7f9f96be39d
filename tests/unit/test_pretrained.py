"""Pretrained models: encoder, projector, beam search, teacher forcing, versions; tiny models of the real classes."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from helpers import tiny_models

from sdumc.errors import UserError
from sdumc.pretrained import internals
from sdumc.pretrained.beam_search import call_with_cache
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.loading import load_tokenizer, model_folder, weight_files, whole_weights
from sdumc.pretrained.projector import Projector, load_projector, project, save_projector
from sdumc.pretrained.recogniser import load_recogniser
from sdumc.pretrained.speech import SpeechEncoder, SpeechReader, normalise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "layer": tiny_models.wavlm(root / "layer"),
        "group": tiny_models.wavlm(root / "group", norm="group"),
        "whisper": tiny_models.whisper(root / "whisper"),
        "llm": tiny_models.llama(root / "llm", eos_bias=1.5),
    }


@pytest.fixture(scope="module")
def llm(folders):
    return SpeechLLM(str(folders["llm"]), layers=[-3])


def random_contexts(llm, count, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 30, (count,), generator=generator).tolist()
    return llm.contexts([torch.randn(n, llm.dim, generator=generator) for n in lengths])


def generate_alone(llm, context, beam, limit):
    """The plain way: one utterance, every hidden state kept, the winner's picked out through beam_indices."""
    out = llm.model.generate(
        inputs_embeds=context[None],
        attention_mask=torch.ones(1, len(context), dtype=torch.long),
        num_beams=beam,
        max_new_tokens=limit,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_scores=True,
    )
    tokens = out.sequences[0].tolist()
    tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
    steps = (out.beam_indices[0] >= 0).sum()
    states = [
        sum(out.hidden_states[t][layer][out.beam_indices[0, t], -1] for layer in llm.layers) for t in range(steps)
    ]
    return tokens, torch.stack(states)


# ---- encoder


@pytest.mark.parametrize("kind", ["layer", "group", "whisper"])
@pytest.mark.parametrize("layer", [-1, 1, 0])
def test_encoder_batch_equals_single(folders, kind, layer):
    encoder = SpeechEncoder(str(folders[kind]), layer=layer)
    waves = [tiny_models.wave(s, i) for i, s in enumerate([0.9, 0.31, 1.4, 0.05])]
    batch = encoder(waves)
    for wave, frames in zip(waves, batch, strict=True):
        alone = encoder([wave])[0]
        assert frames.shape == alone.shape == (encoder.num_frames(len(wave)), encoder.dim)
        assert torch.allclose(frames, alone, atol=1e-4)


@pytest.mark.parametrize("layer", [-1, 1, 0])
def test_whisper_reads_the_clip_alone(folders, layer):
    """Frames are as many, and the same in a batch as alone; 30 s of sound are read alike with either window."""
    short, whole = (SpeechEncoder(str(folders["whisper"]), layer=layer, window=w) for w in ("clip", "30s"))
    waves = [tiny_models.wave(s, i) for i, s in enumerate([0.9, 0.05, 31.0])]
    batch = short(waves)
    for wave, frames in zip(waves, batch, strict=True):
        assert len(frames) == whole.num_frames(len(wave))
        assert torch.equal(frames, short([wave])[0])
    assert torch.allclose(batch[2][:1500], whole(waves[2:])[0][:1500], atol=1e-4)
    assert not torch.allclose(batch[0], whole(waves[:1])[0], atol=1e-4) or layer == 0


def test_encoder_layers_are_transformers_own(folders):
    from transformers import WavLMModel

    model = WavLMModel.from_pretrained(folders["layer"]).eval()
    wave = tiny_models.wave(0.7)
    x = torch.from_numpy(normalise(wave))[None]
    with torch.no_grad():
        output = model(x, output_hidden_states=True)
    # The last entry is the encoder's output after its layer norm; transformers 5 lists it before that norm.
    hidden = [*output.hidden_states[:-1], output.last_hidden_state]
    for layer in range(-4, 4):
        mine = SpeechEncoder(str(folders["layer"]), layer=layer)([wave])[0]
        assert torch.allclose(mine, hidden[layer][0], atol=1e-5), layer
    with pytest.raises(UserError, match="no layer 4"):
        SpeechEncoder(str(folders["layer"]), layer=4)


def test_normalise():
    wave = np.random.default_rng(0).normal(3, 2, 5000).astype(np.float32)
    assert abs(normalise(wave).mean()) < 1e-5
    assert abs(normalise(wave).std() - 1) < 1e-4
    assert np.isfinite(normalise(np.zeros(100))).all()


# ---- projector


def test_projector_drops_the_rest_and_keeps_frames_in_order():
    projector = Projector(encoder_dim=3, llm_dim=4, k=5, hidden=8)
    x = torch.randn(13, 3)
    expected = torch.stack(
        [projector.linear2(torch.relu(projector.linear1(x[5 * i : 5 * i + 5].flatten()))) for i in range(2)]
    )
    assert torch.allclose(projector(x), expected, atol=1e-6)
    batch = project(projector, [x, x[:7], x[:3]])
    assert [len(b) for b in batch] == [2, 1, 0]
    assert torch.allclose(batch[0], expected, atol=1e-6)
    assert torch.allclose(batch[1], expected[:1], atol=1e-6)


def test_projector_files_are_loaded_strictly(tmp_path):
    projector = Projector(encoder_dim=6, llm_dim=10, k=5, hidden=16)
    save_projector(tmp_path / "projector.safetensors", projector)
    released = {f"encoder_projector.{k}": v for k, v in projector.state_dict().items()}
    torch.save(released, tmp_path / "model.pt")
    for path in (tmp_path, tmp_path / "projector.safetensors", tmp_path / "model.pt"):
        loaded = load_projector(path, encoder_dim=6, llm_dim=10)
        assert loaded.k == 5
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), projector.parameters(), strict=True))
    with pytest.raises(UserError, match="no multiple of the encoder's 7"):
        load_projector(tmp_path, encoder_dim=7, llm_dim=10)
    with pytest.raises(UserError, match="the LLM takes 12"):
        load_projector(tmp_path, encoder_dim=6, llm_dim=12)
    torch.save({**released, "extra": torch.zeros(1)}, tmp_path / "extra.pt")
    with pytest.raises(UserError, match="extra"):
        load_projector(tmp_path / "extra.pt", 6, 10)
    released.pop("encoder_projector.linear1.bias")
    torch.save(released, tmp_path / "less.pt")
    with pytest.raises(UserError, match=r"linear1\.bias"):
        load_projector(tmp_path / "less.pt", 6, 10)
    torch.save(projector, tmp_path / "pickle.pt")  # a whole module needs code to be unpickled
    with pytest.raises(UserError, match="cannot be loaded"):
        load_projector(tmp_path / "pickle.pt", 6, 10)
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "projector.safetensors").read_bytes()[:-50])
    with pytest.raises(UserError, match=r"short\.safetensors"):
        load_projector(tmp_path / "short.safetensors", 6, 10)
    with pytest.raises(UserError, match="no such projector"):
        load_projector(tmp_path / "nothing.pt", 6, 10)


# ---- incomplete checkpoints


@pytest.mark.parametrize("kind", ["wavlm", "vit", "clip", "whisper"])
def test_a_folder_of_another_kind_is_no_llm(kind, tmp_path):
    getattr(tiny_models, kind)(tmp_path / kind)
    with pytest.raises(UserError, match=rf"{kind}: a {kind} model is no causal LLM; give the folder") as e:
        SpeechLLM(str(tmp_path / kind))
    assert "\n" not in str(e.value)


def test_incomplete_folders_are_named(folders, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        model_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="hub cache"):
        model_folder("some/model")
    folder = tmp_path / "llm"
    shutil.copytree(folders["llm"], folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{folder}: incomplete model, cut short"):
        SpeechLLM(str(folder))
    weights.write_bytes(whole[:4])
    with pytest.raises(UserError, match="cut short"):
        whole_weights(folder)
    old = folder / "pytorch_model.bin"
    torch.save({"x": torch.zeros(1000)}, old)
    weights.unlink()
    assert whole_weights(folder) == [old]
    old.write_bytes(old.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"cut short: pytorch_model\.bin"):
        whole_weights(folder)
    old.unlink()
    with pytest.raises(UserError, match="incomplete model"):
        SpeechLLM(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"model-1\.safetensors"):
        weight_files(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        SpeechEncoder(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path / "empty")


def test_missing_weights_are_not_made_up(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "layer"
    shutil.copytree(folders["layer"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("encoder.layers.1.attention.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"encoder\.layers\.1\.attention\.q_proj\.weight"):
        SpeechEncoder(str(folder))


# ---- LLM


def test_prompt_layout(llm):
    words = llm.tokenizer.convert_ids_to_tokens(llm.chat_ids)
    assert words == ["USER", ":", "Transcribe", "speech", "to", "text", ".", "ASSISTANT", ":"]
    audio = torch.randn(3, llm.dim)
    (context,) = llm.contexts([audio])
    assert torch.equal(context[:3], audio)
    assert torch.equal(context[3:], llm.embed([llm.bos_id, *llm.chat_ids]))
    assert llm.tokenizer.convert_ids_to_tokens(llm.answer_ids("the film")) == ["the", "film"]
    assert llm.decode(llm.answer_ids("the film")) == "the film"


@pytest.mark.parametrize("penalty", [1.0, 0.5])
def test_how_sure_the_llm_was(llm, penalty):
    """The mean log-probability of the winner's tokens, its end among them: that of one plain pass over them."""
    contexts = random_contexts(llm, 3, seed=4)
    for context, found in zip(
        contexts, llm.transcribe(contexts, max_new_tokens=30, length_penalty=penalty), strict=True
    ):
        answer = found.tokens + (llm.eos_ids[:1] if found.ended else [])
        with torch.no_grad():
            embeds = torch.cat([context, llm.embed(answer)])[None]
            log_probs = llm.model(inputs_embeds=embeds).logits[0, len(context) - 1 : -1].log_softmax(-1)
        mean = log_probs[torch.arange(len(answer)), torch.tensor(answer)].mean()
        assert found.log_probability == pytest.approx(float(mean), abs=1e-4)


@pytest.mark.parametrize("beam", [1, 4])
def test_beam_search_equals_generate(llm, beam):
    contexts = random_contexts(llm, 12, seed=1)
    batch = llm.transcribe(contexts, beam=beam, max_new_tokens=40)
    lengths = set()
    for context, mine in zip(contexts, batch, strict=True):
        if beam == 1:  # generate() is another search then, with the same outcome
            out = llm.model.generate(inputs_embeds=context[None], max_new_tokens=40, do_sample=False)
            tokens = out[0].tolist()
            assert mine.tokens == (tokens[: tokens.index(2)] if 2 in tokens else tokens)
            continue
        tokens, states = generate_alone(llm, context, beam, 40)
        assert mine.tokens == tokens
        assert mine.states.shape == states.shape
        assert (mine.states - states).abs().max() < 5e-6 * max(1.0, float(states.abs().max()))
        lengths.add(len(tokens))
    assert beam == 1 or len(lengths) > 3  # rows left the batch at different times
    if beam == 4:
        assert 40 in lengths  # ... and unused cache columns were dropped on the way


def test_the_whole_beam_is_that_of_generate(llm):
    contexts = random_contexts(llm, 4, seed=1)
    found = llm.search(llm.read(contexts), 4, 12, 1.0)
    for context, best in zip(contexts, found, strict=True):
        out = llm.model.generate(
            inputs_embeds=context[None], num_beams=4, num_return_sequences=4, max_new_tokens=12, do_sample=False
        )
        rows = [row.tolist() for row in out]
        assert [w.tokens for w in (best, *best.rivals)] == [r[: r.index(2)] if 2 in r else r for r in rows]


def test_another_hypothesis_than_the_best_is_chosen(llm):
    contexts = random_contexts(llm, 3, seed=2)
    seen = []

    def last(texts, scores):
        seen.extend(zip(texts, scores, strict=True))
        return [len(t) - 1 for t in texts]

    best = llm.transcribe(contexts, max_new_tokens=12)
    chosen = llm.transcribe(contexts, max_new_tokens=12, choose=last)
    for context, (texts, scores), first, mine in zip(contexts, seen, best, chosen, strict=True):
        assert len(texts) == 4 and texts[0] == first.text and texts[3] == mine.text and mine.tokens != first.tokens
        states = llm.encode([context], [mine.tokens])[0]
        assert torch.allclose(mine.states, states[: len(mine.states)], atol=1e-4)
        assert scores[3] == pytest.approx(mine.log_probability * (len(mine.tokens) + mine.ended), abs=1e-3)


def test_batch_equals_single(llm):
    contexts = random_contexts(llm, 6, seed=5)
    batch = llm.transcribe(contexts, max_new_tokens=30)
    for context, together in zip(contexts, batch, strict=True):
        alone = llm.transcribe([context], max_new_tokens=30)[0]
        assert alone.tokens == together.tokens
        assert alone.ended == together.ended
        assert torch.allclose(alone.states, together.states, atol=1e-4)


def test_encoding_the_winner_gives_its_states(llm):
    contexts = random_contexts(llm, 6, seed=7)
    for context, mine in zip(contexts, llm.transcribe(contexts, max_new_tokens=30), strict=True):
        again = llm.encode([context], [mine.tokens])[0]
        assert torch.allclose(again[: len(mine.states)], mine.states, atol=1e-4)
        assert len(again) == len(mine.tokens) + 1
        assert len(mine.states) == len(mine.tokens) + mine.ended


def test_layers_are_summed_as_transformers_numbers_them(folders):
    several = SpeechLLM(str(folders["llm"]), layers=[-4, -2, -1, 0])
    context = random_contexts(several, 1, seed=3)[0]
    answer = several.answer_ids("the film was good")
    whole = torch.cat([context, several.embed(answer)])
    with torch.no_grad():
        hidden = several.model(inputs_embeds=whole[None], output_hidden_states=True).hidden_states
    expected = sum(hidden[layer][0] for layer in several.layers)[len(context) - 1 :]
    assert torch.allclose(several.encode([context], [answer])[0], expected, atol=1e-4)
    with pytest.raises(UserError, match="no layer -6"):
        SpeechLLM(str(folders["llm"]), layers=[-6])


def test_encode_without_context(llm):
    states = llm.encode(llm.contexts([None], chat=False), [llm.plain_ids("good film")])[0]
    ids = torch.tensor([[llm.bos_id, *llm.plain_ids("good film")]])
    with torch.no_grad():
        hidden = llm.model(ids, output_hidden_states=True).hidden_states[-3][0]
    assert torch.allclose(states, hidden, atol=1e-4)
    empty = llm.encode(llm.contexts([None, None]), [[], llm.answer_ids("good")])
    assert [len(e) for e in empty] == [1, 2]
    assert torch.allclose(empty[0][0], empty[1][0], atol=1e-5)


def test_low_precision_loads_as_asked(folders):
    low = SpeechLLM(str(folders["llm"]), dtype=torch.bfloat16)
    assert next(low.model.parameters()).dtype == torch.bfloat16
    out = low.transcribe(random_contexts(low, 3, seed=2), max_new_tokens=5)
    assert all(o.states.dtype == torch.float32 and torch.isfinite(o.states).all() for o in out)


def test_folder_with_a_sentencepiece_model_alone(folders, tmp_path):
    """Vicuna's folder has `tokenizer.model` and no `tokenizer.json`; prompt and answer are tokenised together."""
    import io
    import json

    from transformers import AutoModelForCausalLM

    sentencepiece = pytest.importorskip("sentencepiece")
    model, words = io.BytesIO(), tiny_models.WORDS
    text = [" ".join(np.random.default_rng(i).choice(words, 8)) for i in range(100)]
    text += ["USER: Transcribe speech to text. \n ASSISTANT:"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=90,
        model_type="bpe",
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    folder = tmp_path / "llm"
    shutil.copytree(folders["llm"], folder)
    larger = AutoModelForCausalLM.from_pretrained(folder)
    larger.resize_token_embeddings(96)
    larger.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = SpeechLLM(str(folder))
    ids = llm.answer_ids("the film was good")
    pieces = llm.tokenizer.convert_ids_to_tokens(ids)
    assert not pieces[0].startswith("▁")  # follows "ASSISTANT:" directly, unlike the same word alone
    assert llm.tokenizer.convert_ids_to_tokens(llm.plain_ids("the film"))[0].startswith("▁")
    assert llm.decode(ids) == "the film was good"
    assert llm.chat_ids[0] != llm.bos_id


# ---- versions of transformers


def test_no_argument_of_ours_is_deprecated(folders, llm, recwarn, caplog):
    """Neither Python's warnings nor transformers' own log speak of our calls (its logger does not propagate)."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        llm.transcribe(random_contexts(llm, 2, seed=3), beam=2, max_new_tokens=4)
        load_recogniser(str(folders["whisper"]), max_new_tokens=3)([tiny_models.wave(0.4)])
    finally:
        logger.removeHandler(caplog.handler)
    assert [str(w.message) for w in recwarn if "past_key_values" in str(w.message)] == []
    assert caplog.text == ""


def test_cache_argument_of_old_and_new_models():
    class Old(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, use_cache=None):
            return past_key_values, use_cache

    class New(torch.nn.Module):
        def forward(self, input_ids, cache=None, use_cache=None):
            return cache, use_cache

    assert call_with_cache(Old(), "c", input_ids=1) == call_with_cache(New(), "c", input_ids=1) == ("c", True)


@pytest.fixture
def scaled(tmp_path):
    """A Gemma, and the same one that scales its input embeddings as transformers 4 and 5 do."""
    folder = str(tiny_models.gemma(tmp_path / "gemma"))

    def load(factor):
        llm = SpeechLLM(folder, layers=[-1])
        already = llm.embedding_scale

        def scale(_module, args, kwargs):
            if kwargs.get("inputs_embeds") is not None:
                kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * (factor / already)
            return args, kwargs

        llm.base.register_forward_pre_hook(scale, with_kwargs=True)
        del llm.embedding_scale  # measured again
        return llm

    return load(48**0.5), load(1.0)


def test_scaling_of_input_embeddings_is_measured(folders, llm, scaled, tmp_path):
    four, five = scaled
    assert llm.embedding_scale == 1.0 and not llm.scale_depends_on_version
    assert four.embedding_scale == pytest.approx(48**0.5, rel=1e-3) and five.embedding_scale == 1.0
    assert four.scale_depends_on_version
    bf16 = SpeechLLM(str(folders["llm"]), torch.bfloat16)
    assert bf16.embedding_scale == 1.0

    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)
            self.layers = torch.nn.ModuleList([torch.nn.Identity()])

        def forward(self, inputs_embeds, use_cache):
            return self.layers[0](self.norm(inputs_embeds) + 1)

    assert internals.embedding_scale(Normed(), 8, "normed") is None


def test_projector_of_another_transformers_version_is_corrected_or_refused(folders, scaled, tmp_path, caplog):
    four, five = scaled
    encoder = SpeechEncoder(str(folders["layer"]))
    torch.manual_seed(0)
    path = tmp_path / "projector"
    path.mkdir()
    save_projector(path / "projector.safetensors", Projector(encoder.dim, four.dim, 5, 16))
    waves = [tiny_models.wave(0.9, 1)]

    def first_states(llm, **more):  # at the end of the prompt, behind the sound
        reader = SpeechReader.load(encoder, str(path), llm, **more)
        sound = project(reader.projector, encoder(waves))  # behind sound alone: tokens are scaled elsewhere
        return llm.encode(sound, [[]])[0]

    (path / "config.yaml").write_text("embedding_scale: 6.9282\n")
    torch.testing.assert_close(first_states(five), first_states(four), rtol=1e-3, atol=1e-4)
    (path / "config.yaml").write_text("embedding_scale: 1.0\n")
    torch.testing.assert_close(first_states(four), first_states(five), rtol=1e-3, atol=1e-4)
    untouched = first_states(five)
    # What the feature's record says goes before, as a packed projector has no config.yaml.
    assert not torch.allclose(first_states(five, embedding_scale=6.9282), untouched, rtol=1e-2)

    for nonsense in ("null", "-2", "much"):
        (path / "config.yaml").write_text(f"embedding_scale: {nonsense}\n")
        with pytest.raises(UserError, match="scaled its input embeddings by"):
            SpeechReader.load(encoder, str(path), five)

    (path / "config.yaml").write_text("prompt: x\n")
    caplog.clear()
    assert SpeechReader.load(encoder, str(path), four).embedding_scale == four.embedding_scale
    assert "does not say by what the LLM scaled" in caplog.text
