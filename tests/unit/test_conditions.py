"""The names that everything shares, and the answers that shell scripts get."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdumc import conditions as c
from sdumc.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def dump(folder: Path, *features: str, absent: str = "") -> Path:
    folder.mkdir()
    for name in features:
        (folder / f"{name}.scp").write_text("" if name == absent else f"u1 ark/{name}.1.ark:3\n")
    return folder


def test_each_condition_reads_what_its_flow_takes():
    for condition in c.CONDITIONS.values():
        texts = [f for f in condition.features if f in c.TEXTS]
        assert condition.flow == (c.COMPLETE if texts in (["text"], ["text_asr"]) else c.MISSING)
        assert list(condition.inputs.values()) == list(condition.features)
        assert [c.modality(f) for f in condition.features] == [
            m for m in c.MODALITIES if m in map(c.modality, condition.features)
        ]
        # A text reaches the flow that is asked under the name that this flow reads.
        assert all(c.TEXT_OF_FLOW[condition.flow] in condition.inputs for _ in texts)
    assert c.CONDITIONS["asr"].inputs == {"audio": "audio", "text": "text_asr", "video": "video"}
    assert c.CONDITIONS["missing"].inputs["text_sim"] == "text_sim"


def test_missing_reads_what_the_missing_flow_has_learned_with():
    asr, none = (c.condition_of("missing", text) for text in ("asr", "none"))
    assert asr.inputs == {"audio": "audio", "text_sim": "text_asr", "video": "video"} and asr.flow == c.MISSING
    assert asr.required is None and "ASR text" in asr.given and asr.given != c.CONDITIONS["asr"].given
    assert none.inputs == c.CONDITIONS["none"].inputs and none.flow == c.MISSING
    for name, known in c.CONDITIONS.items():
        for text in c.MISSING_TEXTS:
            assert c.condition_of(name, text) == known or (name == "missing" and text != c.SIMULATED)


def test_every_subset_of_the_true_modalities_is_a_condition_once():
    plain = [x.features for x in c.CONDITIONS.values() if set(x.features) <= set(c.MODALITIES)]
    assert len(set(plain)) == 7 and len(plain) == 8  # audio+video is none, by another name


@pytest.mark.parametrize(
    "features, possible",
    [
        (c.FEATURES, "full missing asr none audio text"),
        (("audio", "text"), "full missing none audio text"),
        (("audio", "text_asr"), "missing asr none audio"),
        (("text",), "full text"),
        (("text_sim",), "missing"),
        ((), ""),
    ],
)
def test_what_a_dump_allows(tmp_path, features, possible):
    asked = ["full", "missing", "asr", "none", "audio", "text"]
    assert c.possible_conditions(dump(tmp_path / "d", *features), asked) == possible.split()


def test_what_a_dump_allows_depends_on_the_missing_flows_text(tmp_path):
    folder = dump(tmp_path / "d", "text_asr")
    found = {text: c.possible_conditions(folder, ["missing", "asr"], text) for text in c.MISSING_TEXTS}
    assert found == {"simulated": ["asr"], "asr": ["missing", "asr"], "none": ["asr"]}


def test_a_feature_that_all_utterances_lack_is_not_there(tmp_path):
    folder = dump(tmp_path / "d", "audio", "text", absent="text")
    assert c.possible_conditions(folder, ["full", "none"]) == ["none"]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"no condition 'fulll'; the conditions are: full, missing, asr, none, audio,"):
        c.known(["none", "fulll"], c.CONDITIONS, "condition")


def ask(*words: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "sdumc.conditions", *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_shell_is_answered(tmp_path):
    folder = str(dump(tmp_path / "d", "audio", "text"))
    assert ask("possible", folder, "asr none full") == (0, "none\nfull\n", "")
    assert ask("possible", folder, "asr") == (0, "", "")
    assert ask("possible", folder, "missing", "none") == (0, "missing\n", "")
    assert ask("possible", folder, "missing", "real")[0] == 2
    assert ask("check", "full none") == (0, "", "")
    code, out, err = ask("check", "full", "fulll")
    assert code == 2 and not out and err.startswith("error: there is no condition 'fulll'") and "audio+text" in err
    assert ask("possible", folder, "fulll")[0] == 2
    assert ask()[0] == 2 and "possible DUMP_DIR" in ask("what")[2]


def test_asking_loads_neither_torch_nor_numpy():
    code = "import sys, sdumc.conditions; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'configargparse')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_network_is_built_on_these_names():
    import torch

    from sdumc.hyperparameters import ModelConfig
    from sdumc.model.network import SDUMC

    model = SDUMC(ModelConfig(audio_dim=2, text_dim=2, video_dim=2, dim=4, content_dim=2))
    assert torch.equal(model.fusions, torch.tensor([[1.0, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]))
    assert c.QUERIES == ("fused", "audio+text", "text+video", "audio+video", "audio", "text", "video")


def test_the_stage_script_uses_these_names():
    script = (ROOT / "egs/TEMPLATE/sdumc.sh").read_text()
    (default,) = re.findall(r'^conditions="([^"]*)"', script, re.M)
    assert tuple(default.split()) == c.MAIN_CONDITIONS
    lists = re.findall(r"\{(audio,[a-z_,]+)\}", script)
    assert len(lists) >= 2 and all(set(names.split(",")) == set(c.FEATURES) for names in lists)


def test_protocols_are_checked_for_the_stage_script():
    assert c.answer(["check-protocols", "patterns frames modalities"]) and c.answer(["check-protocols", ""])
    with pytest.raises(UserError, match="no protocol 'frame'; the protocols are: patterns, frames, modalities"):
        c.answer(["check-protocols", "frame"])
    # The seven patterns are the seven sets of modalities.
    assert {frozenset(c.CONDITIONS[p].features) for p in c.PATTERNS} == {
        frozenset(x.features) for x in c.CONDITIONS.values() if set(x.features) <= set(c.MODALITIES)
    }
