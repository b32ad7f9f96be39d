"""Text simulation, prompts to transcripts and states, against the plain way: one utterance at a time, `generate` with
all hidden states kept, the winner's picked out through `beam_indices`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdumc.bench.measure import goal, interleaved, median, peak_memory, ratio, spread, table
from sdumc.pretrained.llm import SpeechLLM

BATCH, BEAM, NEW_TOKENS = 16, 4, 40


@dataclass(frozen=True)
class Size:
    """An LLM to measure: a Llama of random weights; ``utterances`` are as many as take some seconds."""

    width: int
    layers: int
    utterances: int = 32
    heads: int = 4
    key_heads: int = 4
    vocabulary: int = 512
    name: str = ""

    @property
    def title(self) -> str:
        return f"{self.width} x {self.layers}{f' ({self.name})' if self.name else ''}"


SMALL = (Size(128, 4), Size(256, 6))
REAL = Size(576, 30, utterances=8, heads=9, key_heads=3, vocabulary=49152, name="SmolLM2-135M")


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer of ``size`` made-up words: 1 is BOS, 2 EOS, 3 padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", *["USER", ":", "ASSISTANT", "Transcribe", "speech", "to", "text", "."]]
    words += [f"w{i}" for i in range(size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_llm(folder: Path, size: Size) -> SpeechLLM:
    """A Llama with random weights (from a fixed seed) and a word tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, size.vocabulary)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=(8 * size.width // 3) if size.name else 2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        initializer_range=1.2 / size.width**0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[2] *= 2.0  # so that answers end at different lengths
    model.save_pretrained(folder)
    return load_llm(folder)


def load_llm(folder: str | Path) -> SpeechLLM:
    """The LLM in a folder, on the GPU where there is one."""
    return SpeechLLM(str(folder), device="cuda" if torch.cuda.is_available() else "cpu", layers=[-4])


def make_contexts(llm: SpeechLLM, count: int) -> list[Tensor]:
    """Prompts of 2 to 8 s of sound, longest first as the stage orders them."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(20, 80, (count,), generator=generator).sort(descending=True).values.tolist()
    return llm.contexts([0.3 * torch.randn(n, llm.dim, generator=generator).to(llm.device) for n in lengths])


@torch.no_grad()
def plain(llm: SpeechLLM, context: Tensor, limit: int) -> tuple[list[int], Tensor]:
    """Token ids without EOS and the states (N, D) of one utterance."""
    out = llm.model.generate(
        inputs_embeds=context[None],
        attention_mask=torch.ones(1, len(context), dtype=torch.long, device=context.device),
        num_beams=BEAM,
        max_new_tokens=limit,
        do_sample=False,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_scores=True,
        pad_token_id=llm.eos_ids[0],
        eos_token_id=llm.eos_ids,
    )
    tokens = out.sequences[0].tolist()
    beams = [int(b) for b in out.beam_indices[0] if b >= 0]
    states = [sum(out.hidden_states[t][layer][b, -1].float() for layer in llm.layers) for t, b in enumerate(beams)]
    end = next((i for i, token in enumerate(tokens) if token in llm.eos_ids), len(tokens))
    return tokens[:end], torch.stack(states)


def ours(llm: SpeechLLM, contexts: list[Tensor], limit: int, beam: int = BEAM) -> list:
    """The same for all, in batches."""
    found = []
    for i in range(0, len(contexts), BATCH):
        found += llm.transcribe(contexts[i : i + BATCH], beam, limit)
    return found


class _Peak:
    """One side of the memory comparison, made whole in its own process."""

    def __init__(self, limit: int, beam: int | None = None):
        self.limit, self.beam = limit, beam  # no beam: the plain way

    def __call__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            llm = make_llm(Path(folder), SMALL[-1])
            with torch.no_grad():
                llm.model.lm_head.weight[2] = 0.0  # seldom ends
            contexts = make_contexts(llm, BATCH)
            if self.beam:
                ours(llm, contexts, self.limit, self.beam)
            else:
                plain(llm, contexts[0], self.limit)


def main(repeats: int, llm: str | None = None) -> bool:
    """Print speed, agreement with the plain way, and peak memory; whether the goals are reached.

    Args:
        llm: folder of a real LLM, in place of random weights in SmolLM2-135M's dimensions.
    """
    ratios, agree = show_speed(repeats, llm)
    show_memory()
    same_everywhere = goal("share of sizes with the same tokens and states", sum(agree) / len(agree), least=1)
    # The larger size is near what the processor can multiply; how near, decides its ratio.
    return goal(f"times as fast as plain at width {SMALL[0].width}", ratios[0], least=6) and same_everywhere


def show_speed(repeats: int, real: str | None) -> tuple[list[float], list[bool]]:
    """Print utterances per second of both ways at each size; the ratios, and whether tokens and states agree."""
    rows, ratios, agree = [], [], []
    for size in (*SMALL, REAL):
        with tempfile.TemporaryDirectory() as folder:
            is_real = bool(real) and size is REAL
            llm = load_llm(real) if real and is_real else make_llm(Path(folder), size)
            contexts = make_contexts(llm, size.utterances)
            reference = [plain(llm, c, NEW_TOKENS) for c in contexts]
            found = ours(llm, contexts, NEW_TOKENS)
            same = [f.tokens == r[0] for f, r in zip(found, reference, strict=True)]
            pairs = [(f.states, r[1]) for f, r, s in zip(found, reference, same, strict=True) if s]
            apart = max((float((a - b).abs().max() / b.abs().max()) for a, b in pairs), default=float("nan"))
            calls = {
                "plain": lambda m=llm, c=contexts: [plain(m, x, NEW_TOKENS) for x in c],
                "ours": lambda m=llm, c=contexts: ours(m, c, NEW_TOKENS),
            }
            times = interleaved(calls, min(repeats, 3), warm_up=0)
        ratios.append(ratio(times["plain"], times["ours"]))
        agree.append(all(same) and apart < 1e-4)
        width = f"{llm.dim} x {llm.num_layers} ({Path(real).name})" if real and is_real else size.title
        rows.append(
            [
                width,
                f"{size.utterances / median(times['plain']):.2f}",
                f"{size.utterances / median(times['ours']):.2f}",
                spread(times["ours"]),
                f"{ratios[-1]:.1f}",
                f"{sum(same)} of {len(same)}",
                f"{apart:.1e}",
            ]
        )
    header = ["width x layers", "plain (utt/s)", "ours (utt/s)", "ours, range (s)", "times as fast", "same tokens"]
    print(table([*header, "states apart (relative)"], rows))
    return ratios, agree


def show_memory() -> None:
    """Print the peak memory of both ways at several answer lengths."""
    memory = []
    for limit in (25, 50, 100, 200):
        memory.append([str(limit), *(f"{peak_memory(_Peak(limit, beam)):.0f}" for beam in (None, BEAM, 2 * BEAM))])
    print("\nPeak memory in MiB, the model's own included:\n")
    header = [f"plain, 1 utterance, {BEAM} beams", *(f"ours, {BATCH} utterances, {b} beams" for b in (BEAM, 2 * BEAM))]
    print(table(["most new tokens", *header], memory))
    print()
