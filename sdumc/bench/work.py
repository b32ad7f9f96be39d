"""The works of `sdumc.bench neighbours`, each in processes of its own: python -m sdumc.bench.work NAME

Prints "ready", then answers each line of input, a number of seconds, with how many seconds a call took on average in
that time (rank 0 of several prints). Ends with its input.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sdumc.bench.simulation import write_tokenizer
from sdumc.bench.step import Step
from sdumc.conditions import COMPLETE
from sdumc.hyperparameters import ModelConfig, ObjectiveWeights
from sdumc.losses.objective import sdumc_objective
from sdumc.machine import die_with
from sdumc.model.network import SDUMC
from sdumc.training.distributed import Ranks, gather_objects, gather_rows, join, leave, sum_gradients

Call = Callable[[], object]
TEXT_DIM, SENTENCES, WORDS = 576, 32, 12.0  # of SmolLM2-135M, a batch, words of MOSI's sentences on average


class SentenceStep:
    """A training step on sentences alone: one batch of text features through the complete flow."""

    def __init__(self, ranks: Ranks):
        generator = torch.Generator().manual_seed(0)
        words = torch.empty(SENTENCES).exponential_(1 / WORDS, generator=generator).long() + 2
        mine = words.sort().values[ranks.rank :: ranks.size]  # batches are of similar lengths, up to about 50 words
        torch.manual_seed(0)
        self.ranks, self.lengths = ranks, {"text": mine}
        self.x = {"text": torch.randn(len(mine), int(mine.max()), TEXT_DIM, generator=generator)}
        self.labels = (torch.randint(-9, 10, (len(mine),), generator=generator) / 3).float()
        self.model = SDUMC(ModelConfig(audio_dim=0, text_dim=TEXT_DIM, video_dim=0)).train()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)

    def __call__(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        output = self.model(self.x, self.lengths, (COMPLETE,))[COMPLETE]
        rows = {n: gather_rows(x, SENTENCES, self.ranks) for n, x in output.loss_inputs().items()}
        labels = gather_rows(self.labels, SENTENCES, self.ranks)
        has_text = torch.ones(SENTENCES, dtype=torch.bool)
        sdumc_objective(rows, None, labels, has_text, ObjectiveWeights())["loss"].backward()
        sum_gradients(self.model.parameters(), False, self.ranks)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()


def sound(folder: Path) -> Call:
    """Features of two clips of 4 and 5 s with an encoder of WavLM-base's dimensions, random weights."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

    from sdumc.pretrained.speech import SpeechEncoder

    WavLMModel(WavLMConfig()).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    encoder = SpeechEncoder(str(folder))
    waves = [np.random.default_rng(i).normal(size=16000 * (4 + i)).astype(np.float32) for i in range(2)]
    return lambda: encoder(waves)


def text(folder: Path) -> Call:
    """States of 16 sentences with a language model of SmolLM2-135M's dimensions, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sdumc.pretrained.llm import SpeechLLM

    write_tokenizer(folder, 2000)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=TEXT_DIM,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    llm = SpeechLLM(str(folder), layers=[-8])
    contexts = llm.contexts([None] * 16, chat=False)
    answers = [llm.plain_ids(" ".join(f"w{j}" for j in range(4 + i))) for i in range(len(contexts))]
    return lambda: llm.encode(contexts, answers)


def prepare(name: str, ranks: Ranks) -> Call:
    """What a work calls again and again."""
    if name == "sentences":
        return SentenceStep(ranks)
    if name == "released":
        return Step("ours", device="cpu")
    with tempfile.TemporaryDirectory(prefix="sdumc-bench-") as folder:
        return {"sound": sound, "text": text}[name](Path(folder))


def average(call: Call, seconds: float, ranks: Ranks) -> float:
    """Seconds of a call on average, over at least ``seconds`` seconds."""
    total, calls = 0.0, 0
    while True:
        start = time.perf_counter()
        call()
        total, calls = total + time.perf_counter() - start, calls + 1
        if any(gather_objects(total >= seconds, ranks)):
            return total / calls


def main(name: str) -> None:
    die_with()
    ranks = join("cpu")
    call = prepare(name, ranks)
    average(call, 0.5, ranks)
    print("ready", flush=True)
    for line in sys.stdin:
        result = average(call, float(line), ranks)
        print(result if ranks.is_main else "done", flush=True)
    leave(ranks)


if __name__ == "__main__":
    main(sys.argv[1])
