"""Tiny checkpoints of the real transformers classes, with random weights, and tiny data directories."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch

WORDS = ["the", "film", "was", "good", "bad", "very", "really", "and", "not", "i", "liked", "it", "so", "much", "hm"]
_LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]


def wavlm(folder: Path, norm: str = "layer", ctc: bool = False, seed: int = 0, layers: int = 3) -> Path:
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForCTC, WavLMModel

    torch.manual_seed(seed)
    config = WavLMConfig(
        vocab_size=len(_LETTERS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16, 16, 16),
        conv_kernel=(10, 8, 4),
        conv_stride=(8, 8, 5),
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_buckets=16,
        initializer_range=0.2,
    )
    model = WavLMForCTC(config) if ctc else WavLMModel(config)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return ctc_tokenizer(folder) if ctc else folder


def _word_tokenizer(special: list[str], words: list[str], **names: str):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **names)


def llm_tokenizer():
    """Words of the prompt and :data:`WORDS`; 1 is BOS, 2 EOS, 3 padding."""
    chat = ["USER", ":", "ASSISTANT", "Transcribe", "speech", "to", "text", "."]
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    return _word_tokenizer(special, chat + WORDS, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _causal_lm(folder: Path, model_class, config_class, seed: int, layers: int, eos_bias: float, hidden: int, **more):
    tokenizer = llm_tokenizer()
    torch.manual_seed(seed)
    model = model_class(
        config_class(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            **more,
        )
    )
    with torch.no_grad():
        model.lm_head.weight[2] *= eos_bias
        model.lm_head.weight[[0, 1, 3]] = 0.0  # the other special tokens are (almost) never written
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama(folder: Path, seed: int = 0, layers: int = 4, eos_bias: float = 1.0, hidden: int = 48) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _causal_lm(folder, LlamaForCausalLM, LlamaConfig, seed, layers, eos_bias, hidden)


def gemma(folder: Path, seed: int = 0) -> Path:
    """A model that scales its embeddings: in transformers 4 also ``inputs_embeds``, in transformers 5 only tokens."""
    from transformers import GemmaConfig, GemmaForCausalLM

    return _causal_lm(folder, GemmaForCausalLM, GemmaConfig, seed, 2, 1.0, 48, head_dim=12, tie_word_embeddings=False)


def whisper(folder: Path, seed: int = 0) -> Path:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    # As in the real one, special tokens stand behind the words, and nospeech before notimestamps.
    special = ["<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>"]
    special += ["<|nospeech|>", "<|notimestamps|>"]
    tokenizer = _word_tokenizer(["<unk>", "<|endoftext|>"], WORDS + special, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=32,
        decoder_start_token_id=2 + len(WORDS),
        eos_token_id=1,
        bos_token_id=1,
        pad_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.5,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    generation = {
        "is_multilingual": True,
        "suppress_tokens": [0, *range(2 + len(WORDS), len(tokenizer))],
        "begin_suppress_tokens": [1],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def vit(folder: Path, pooler: bool = True, seed: int = 0) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    (ViTModel(config) if pooler else ViTForImageClassification(config)).save_pretrained(folder)
    _image_processor(folder, "ViTImageProcessor", {"height": 32, "width": 32})
    return folder


def clip(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    _image_processor(folder, "CLIPImageProcessor", {"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return folder


def two_towers(folder: Path, name: str):
    """A model of pictures and texts with classes of that name, or None; its image processor beside it."""
    import transformers

    if (model_class := getattr(transformers, f"{name}Model", None)) is None:
        return None
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**small, "vocab_size": 20, "max_position_embeddings": 8, "project_dim": 16, "projection_size": 24}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    vision = {**small, "image_size": 32, "patch_size": 8, "num_patches": 16, "initializer_range": 0.2}
    config = getattr(transformers, f"{name}Config")(text_config={**text, **special}, vision_config=vision)
    model = model_class(config)
    model.save_pretrained(folder)
    if name == "Siglip2":
        _image_processor(folder, "Siglip2ImageProcessor", {"height": 32, "width": 32}, patch_size=8, max_num_patches=16)
    else:
        _image_processor(folder, "CLIPImageProcessor", {"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model


def _image_processor(folder: Path, kind: str, size: dict, **more) -> None:
    settings = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": size,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        **more,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def wave(seconds: float, seed: int = 0, rate: int = 16000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (150 + 100 * rng.random()) * t * (1 + 0.2 * np.sin(3 * t)))
    return (0.3 * tone + 0.05 * rng.standard_normal(len(t))).astype(np.float32)


def data_dir(folder: Path, seconds: list[float], seed: int = 0) -> Path:
    """A Kaldi data directory of noise-like clips with random words and labels."""
    rng = np.random.default_rng(seed)
    (folder / "wav").mkdir(parents=True)
    tables: dict[str, list[str]] = {n: [] for n in ("wav.scp", "text", "utt2spk", "utt2label", "utt2dur")}
    for i, length in enumerate(seconds):
        utt = f"spk{i % 2}-{i:03d}"
        path = folder / "wav" / f"{utt}.wav"
        soundfile.write(path, wave(length, seed * 1000 + i), 16000)
        words = rng.choice(WORDS, size=int(rng.integers(2, 7)))
        tables["wav.scp"].append(f"{utt} {path}")
        tables["text"].append(f"{utt} {' '.join(words)}")
        tables["utt2spk"].append(f"{utt} spk{i % 2}")
        tables["utt2label"].append(f"{utt} {rng.integers(-9, 10) / 3:.4f}")
        tables["utt2dur"].append(f"{utt} {length:.3f}")
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(sorted(lines)) + "\n")
    return folder


# Speech encoders and CTC models whose frames depend, or seem to depend, on the other clips of a batch: name of the
# classes in transformers, and settings beside those of `speech_model`.
SPEECH_KINDS: dict[str, tuple[str, dict]] = {
    "wav2vec2": ("Wav2Vec2", {}),
    "hubert": ("Hubert", {}),
    "hubert, batch norm": ("Hubert", {"conv_pos_batch_norm": True}),
    "data2vec-audio": ("Data2VecAudio", {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}),
    "conformer": ("Wav2Vec2Conformer", {"conv_depthwise_kernel_size": 5, "feat_extract_norm": "layer"}),
    "sew": ("SEW", {"squeeze_factor": 2}),
    "wav2vec2, adapter": ("Wav2Vec2", {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 24}),
}


def speech_model(folder: Path, kind: str, ctc: bool = False) -> Path:
    """A model of ``SPEECH_KINDS``, with statistics of batch norms that are not those of the start."""
    import transformers

    name, more = SPEECH_KINDS[kind]
    settings = {
        "vocab_size": len(_LETTERS),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 8, 4),
        "conv_stride": (8, 8, 5),
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "initializer_range": 0.2,
        **more,
    }
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{'ForCTC' if ctc else 'Model'}")(
        getattr(transformers, f"{name}Config")(**settings)
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                for tensor in (module.running_mean, module.bias):
                    tensor.normal_()
    model.save_pretrained(folder)
    return ctc_tokenizer(folder) if ctc else folder


def wav2vec2_bert_ctc(folder: Path, features: bool = True) -> Path:
    """A CTC model that reads spectrograms, with or without the settings of its feature extractor."""
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertForCTC

    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=len(_LETTERS),
        initializer_range=0.5,
    )
    Wav2Vec2BertForCTC(config).save_pretrained(folder)
    if features:
        SeamlessM4TFeatureExtractor().save_pretrained(folder)
    return ctc_tokenizer(folder)


def parakeet_ctc(folder: Path) -> Path:
    """Another one; ImportError if transformers does not know it."""
    from transformers import ParakeetCTCConfig, ParakeetFeatureExtractor, ParakeetForCTC

    torch.manual_seed(0)
    encoder = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "subsampling_conv_channels": 16,
    }
    config = ParakeetCTCConfig(vocab_size=len(_LETTERS), pad_token_id=0, encoder_config=encoder)
    ParakeetForCTC(config).save_pretrained(folder)
    settings = {"feature_extractor_type": ParakeetFeatureExtractor.__name__, "feature_size": 80}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return ctc_tokenizer(folder)


def ctc_tokenizer(folder: Path) -> Path:
    """Add a tokenizer of letters to a folder."""
    from transformers import Wav2Vec2CTCTokenizer

    vocab = folder / "vocab.json"
    vocab.write_text(json.dumps({c: i for i, c in enumerate(_LETTERS)}))
    Wav2Vec2CTCTokenizer(str(vocab)).save_pretrained(folder)
    return folder


_PICTURES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}

# Vision models: name of the classes in transformers, and their settings.
VISION_KINDS: dict[str, tuple[str, dict]] = {
    "vit_mae": ("ViTMAE", {**_PICTURES, "decoder_hidden_size": 8, "decoder_num_attention_heads": 2}),
    "deit": ("DeiT", _PICTURES),
    "beit": ("Beit", _PICTURES),
    "siglip": ("SiglipVision", _PICTURES),
    "dinov2": ("Dinov2", _PICTURES),
    "dinov2_with_registers": ("Dinov2WithRegisters", {**_PICTURES, "num_register_tokens": 4}),
    "dinov3_vit": ("DINOv3ViT", {**_PICTURES, "num_register_tokens": 4}),
    "dinov3_convnext": ("DINOv3ConvNext", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}),
    "aimv2": ("Aimv2Vision", _PICTURES),
    "resnet": ("ResNet", {**_STAGES, "embedding_size": 8, "layer_type": "basic"}),
    "convnext": ("ConvNext", {**_STAGES, "num_stages": 2}),
    "yolos": ("Yolos", {**_PICTURES, "image_size": [32, 32], "num_detection_tokens": 5}),
    "swin": ("Swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32}),
    "timesformer": ("Timesformer", {**_PICTURES, "num_frames": 2}),
    "videomae": ("VideoMAE", {**_PICTURES, "num_frames": 4, "tubelet_size": 2}),
}


def vision_model(folder: Path, kind: str) -> Path:
    """A model of ``VISION_KINDS`` for pictures of 32 by 32 pixels."""
    import transformers

    name, settings = VISION_KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("token") or parameter_name.endswith("tokens"):
                parameter.normal_()
    model.save_pretrained(folder)
    processor = "DINOv3ViTImageProcessorFast" if kind.startswith("dinov3") else "ViTImageProcessor"
    if kind in ("timesformer", "videomae"):
        _image_processor(folder, "VideoMAEImageProcessor", {"height": 32, "width": 32}, do_center_crop=False)
    else:
        _image_processor(folder, processor, {"height": 32, "width": 32})
    return folder
