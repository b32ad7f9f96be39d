"""Throughput of stages 2 and 3 with models of the paper's dimensions and random weights, for a plan of GPU-hours.

Nothing is compared here: these are the numbers that `egs/mosei/local/plan.py` asks for, on the machine at hand.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sdumc.bench.measure import median, seconds, spread, table
from sdumc.bench.simulation import write_tokenizer

SECONDS, TOKENS, BATCH = 7.3, 26, 16  # a clip of MOSEI on average


def main(repeats: int) -> bool:
    """Print what each model does; without a GPU the two of moderate size, in fewer repeats."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    count = BATCH if cuda else 2
    repeats = repeats if cuda else min(repeats, 3)
    rows, plan = [], []
    parts: list[Callable] = [_audio, _pictures, *([_texts] if cuda else [])]
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="sdumc-bench-") as folder, torch.no_grad():
            for name, unit, done, call, option in part(Path(folder), device, dtype, count):
                call()
                times = [seconds(call) for _ in range(repeats)]
                rate = done / median(times)
                rows.append([name, str(dtype).removeprefix("torch."), f"{rate:.3g} {unit}", spread(times)])
                if option:
                    plan.append(f"--{option} {rate:.3g}")
    print(table(["model", "type", "throughput", "range of a batch (s)"], rows))
    print(f"\negs/mosei/local/plan.py {' '.join(plan)}")
    if not cuda:
        print("The language model of 7 billion weights is measured on a GPU only.")
    return True


def _audio(folder: Path, device: str, dtype: torch.dtype, count: int):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

    from sdumc.pretrained.speech import SpeechEncoder

    config = WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    WavLMModel(config).to(dtype=dtype).save_pretrained(folder)  # type: ignore[call-arg]
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    encoder = SpeechEncoder(str(folder), dtype=dtype, device=device)
    waves = [np.random.default_rng(i).normal(size=int(16000 * SECONDS)).astype(np.float32) for i in range(count)]
    yield "WavLM-large, sound", "hours an hour", count * SECONDS, lambda: encoder(waves), "audio"


def _pictures(folder: Path, device: str, dtype: torch.dtype, count: int):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from sdumc.pretrained.vision import VisionExtractor

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    CLIPVisionModel(config).to(dtype=dtype).save_pretrained(folder)  # type: ignore[call-arg]
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, "crop_size": {"height": 224, "width": 224}})
    )
    extractor = VisionExtractor(str(folder), dtype=dtype, device=device)
    shown = np.random.default_rng(0).integers(0, 256, (4 * count, 224, 224, 3), dtype=np.uint8)
    yield "CLIP ViT-L/14, faces", "pictures a second", len(shown), lambda: extractor(shown), "pictures"


def _texts(folder: Path, device: str, dtype: torch.dtype, count: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    from sdumc.pretrained.llm import SpeechLLM

    write_tokenizer(folder, 32000)
    config = LlamaConfig(vocab_size=32000, bos_token_id=1, eos_token_id=2, pad_token_id=3)  # 4096 wide, 32 layers
    with torch.device(device):  # drawing 7 billion weights takes a GPU a moment
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.lm_head.weight[2] = 0.0  # seldom ends, so that every answer has TOKENS tokens
    model.save_pretrained(folder)
    del model
    llm = SpeechLLM(str(folder), dtype=dtype, device=device, layers=[-4])
    frames = int(SECONDS * 50 / 5)  # the projector joins five frames of 20 ms
    contexts = llm.contexts([0.02 * torch.randn(frames, llm.dim, device=device, dtype=dtype) for _ in range(count)])
    answers = [list(range(10, 10 + TOKENS)) for _ in range(count)]
    written = llm.transcribe(contexts, 4, TOKENS)
    tokens = sum(len(t.tokens) for t in written)

    def simulate():
        llm.transcribe(contexts, 4, TOKENS)

    yield "Llama 7B, simulation with 4 beams", "utterances a second", count, simulate, "simulation"
    yield "the same", "tokens a second", tokens, simulate, ""
    yield "Llama 7B, states of a text", "utterances a second", count, lambda: llm.encode(contexts, answers), "text"
