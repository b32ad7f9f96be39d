"""Imitations of the commands in sdumc.bin for tests of the stage script: the same files, no work."""

import os
import sys
from pathlib import Path


def option(name: str, default: str = "") -> str:
    words = sys.argv
    return words[words.index(f"--{name}") + 1] if f"--{name}" in words else default


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("u1 1\n")


def main(name: str) -> None:
    with open(Path(os.environ["FAKE"]) / "calls", "a") as f:
        f.write(" ".join([name, *sys.argv[1:]]) + "\n")
    if os.environ.get("FAIL") == name or os.environ.get("FAIL_WITH", "no such words") in " ".join(sys.argv):
        print("this is what went wrong", file=sys.stderr)
        sys.exit(3)
    dump, data, exp = Path(option("dump-dir")), Path(option("data-dir")), Path(option("exp-dir"))
    feature = {"recognize": "asr_hyp", "simulate_text": "text_sim"}.get(name) or option("name", name.rpartition("_")[2])
    if name in ("recognize", "simulate_text", "extract_audio", "extract_text", "extract_video"):
        write(dump / "ark" / f"{feature}.{option('shard').partition('/')[0]}.ark")
    elif name == "finish_dump":
        if feature == "asr_hyp":
            write(data / "text_asr")
        else:
            write(dump / f"{feature}.scp", dump / f"{feature}.frames")
        if feature == "text_sim":
            write(data / "text_sim")
    elif name == "train_projector":
        write(Path(option("output")) / "projector.safetensors")
    elif name == "train":
        write(exp / "model.valid-best.safetensors", exp / "model.averaged.safetensors")
        write(exp / "checkpoint.pt", exp / "metrics.jsonl")
        (exp / "config.yaml").write_text("audio-dim: 1\n")
    elif name == "decode" and "--protocol" in sys.argv:
        for protocol in sys.argv[sys.argv.index("--protocol") + 1 : sys.argv.index("--output-dir")]:
            write(Path(option("output-dir")) / protocol / "protocol.yaml")
    elif name == "decode":
        start = sys.argv.index("--condition") + 1
        conditions = sys.argv[start : sys.argv.index("--output-dir")]
        for condition in conditions:
            output = Path(option("output-dir"))
            write((output / condition if len(conditions) > 1 else output) / "predictions.tsv")
    elif name == "score":
        keys = ("mae", "corr", "acc7", "acc2_has0", "acc2_non0")
        lines = [f'  "{key}": 0.5,' for key in keys]
        Path(option("output")).write_text("\n".join(["{", *lines, '  "n": 1', "}", ""]))
    elif name == "report":
        write(Path(option("results")), Path(option("output-dir")) / "report.html")
