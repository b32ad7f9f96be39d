"""Corpora as tables: the toolkit's label.csv in its variants, users' own tables, and what is wrong with either."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.recipes import call_recipe, copy_recipes
from helpers.shared import FOLDER

from sdumc.bin import import_table
from sdumc.corpora.table import parse_label_map, parse_pairs
from sdumc.data.kaldi_dir import load_kaldi_dir
from sdumc.data.tables import read_csv, read_dropped, read_table
from sdumc.errors import UserError
from sdumc.scale import SIMS, scale_of


def sound(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(4000, 0.1, np.float32), 16000)
    return path


def run(table: Path, *words: str) -> Path:
    data = table.parent / "data"
    import_table.main(["--table", str(table), "--data-dir", str(data), *words])
    return data


FOLDS = ("train", "valid", "test")
CLIPS = [
    ("video_0001", "0001", "真的 很 好", 0.4, "train"),
    ("video_0001", "0002", 'a "good" film, really', -0.6, "train"),
    ("aqgy3", "0010", "not; so\tgood", 0.0, "valid"),
    ("-_z__Q", "0003", "fine", 1.0, "test"),
]


def make_sims(folder: Path, form: str) -> Path:
    """label.csv and Raw/ in the toolkit's layout, in one of its variants."""
    for video, clip, *_ in CLIPS:
        sound(folder / "Raw" / video / f"{clip}.wav")
    quoted = [(v, c, '"' + t.replace('"', '""') + '"', y, m) for v, c, t, y, m in CLIPS]
    if form == "as handed on":
        lines = ["video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"]
        lines += [f"{v},{c},{t},{y},{y},0.2,,Positive,{m}" for v, c, t, y, m in quoted]
    elif form == "order and case, BOM, spreadsheet":
        lines = ["\ufeffMODE;Label; Clip_ID ;Text;VIDEO_ID"]
        lines += [f"{m};{y};{int(c)};{t};{v}" for v, c, t, y, m in quoted] + [";;;;"]
    else:  # an id for both
        lines = ["id\ttext\tlabel\tmode"]
        lines += [f"{v}$_${c}\t{t}\t{y}\t{m.upper()}" for v, c, t, y, m in CLIPS if "\t" not in t]
        lines += ["aqgy3$_$0010\tnot so good\t0\tdev"]
    (folder / "label.csv").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    return folder / "label.csv"


@pytest.mark.parametrize("form", ["as handed on", "order and case, BOM, spreadsheet", "an id"])
def test_the_toolkits_form(tmp_path, form):
    data = run(make_sims(tmp_path, form), "--label-scale", "sims", "--counts", "sims")
    train, valid, test = (load_kaldi_dir(data / name) for name in ("train", "valid", "test"))
    assert sorted(train.utt2label.values()) == [-0.6, 0.4] and scale_of(data / "test") == SIMS
    assert sorted(train.text.values()) == ['a "good" film, really', "真的 很 好"]
    assert set(train.utt2spk.values()) == {"video_0001"} and list(test.utt2spk.values()) == ["-_z__Q"]
    assert {Path(p).name for p in train.wav.values()} == {"0001.wav", "0002.wav"}
    assert Path(next(iter(valid.wav.values()))).parent.name == "aqgy3" and not train.video
    if form == "as handed on":
        assert read_table(data / "train/utt2label_audio") == dict.fromkeys(train.utterances, "0.2")
        assert read_table(data / "test/utt2annotation") == {"-_z__Q-0003": "Positive"}
        assert not (data / "train/utt2label_video").exists()
        assert "(1368)" in (data / "folds.txt").read_text()


def test_published_splits_that_share_videos(tmp_path, capsys):
    table = make_sims(tmp_path, "as handed on")
    table.write_text(table.read_text().replace("video_0001,0002", "aqgy3,0002"))
    shutil.copytree(tmp_path / "Raw/video_0001", tmp_path / "Raw/aqgy3", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"video 'aqgy3' is in train and in valid .*--shared-speakers"):
        run(table, "--label-scale", "sims")
    run(table, "--label-scale", "sims", "--shared-speakers", "allow")
    assert "NOTE: 1 of 3 speakers or videos are in several sets" in capsys.readouterr().out


def test_a_users_table(tmp_path):
    """Media by name without extension and in folders, words for labels, no sets, other column names."""
    lines = ["clip\twho\tmood\tsaid"]
    for i in range(40):
        sound(tmp_path / f"wav/s{i // 2}/take {i}.wav")
        lines.append(f'wav/s{i // 2}/take {i}\tspeaker {i // 2}\t{["Bad", "so so", "good"][i % 3]}\tit is "{i}"')
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    columns = ["--columns", "speaker=who label=mood text=said"]
    with pytest.raises(UserError, match=r"t.tsv:2: label 'Bad' is no number.*Bad=\? so so=\? good=\?"):
        run(tmp_path / "t.tsv", *columns)
    with pytest.raises(UserError, match=r"t.tsv:3: label 'so so' is not in --label-map"):
        run(tmp_path / "t.tsv", *columns, "--label-map", "bad=-1 good=1")
    data = run(tmp_path / "t.tsv", *columns, "--label-map", "bad=-1 'so so=0' good=1")
    scale = scale_of(data / "train")
    assert scale.scheme == "nearest" and dict(scale.words) == {"bad": -1, "so so": 0, "good": 1}
    sets = {name: load_kaldi_dir(data / name) for name in ("train", "valid", "test")}
    speakers = [set(s.utt2spk.values()) for s in sets.values()]
    assert sum(map(len, speakers)) == len(set().union(*speakers)) == 20
    assert [len(s.utterances) for s in sets.values()] == [28, 6, 6]
    utt = next(u for s in sets.values() for u in s.utterances if u.endswith("take_7"))
    assert utt == "speaker_3-wav_s3_take_7"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, 3, 4, 5], r"whole numbers from 1 to 5 \(1, 2, 3, 4, 5\): classes, or a scale\?.*--label-scale '1 5'"),
        ([0, 1, 2], r"--label-map '0=\? 1=\? 2=\?'"),
        ([1.5, 4.25], r"from 1.5 to 4.25, outside of CMU's scale"),
        ([-0.8, -0.2, 0.1, 0.4, 0.9], r"from -0.8 to 0.9 only: declare the scale: --label-scale sims"),
        (["0,5", 1.5], r"t.csv:2: label '0,5': a decimal comma .* line 3 has '1.5'"),
    ],
)
def test_scales_are_asked_for(tmp_path, labels, message):
    rows = [f"{i}.wav;{labels[i % len(labels)]};{s}" for i, s in enumerate(["train", "valid", "test"] * 4)]
    (tmp_path / "t.csv").write_text("file;rating;split\n" + "\n".join(rows))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "t.csv")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,1.5,hello, there\nb,2,fine", r"t.csv:2: 4 columns, but the header has 3; is there a comma in a text"),
        ("b,2,fine\na,1.5", r"t.csv:3: 2 columns"),
        ('a,1.5,"hello\nb,2,fine\n', r"t.csv:2: cannot be read as CSV .*quotation mark open"),
        ('a,1,x\nb,1.5,"hello\nc,2,fine\nd,2,"ok"', r"t.csv:3: cannot be read as CSV"),
        ('a,1.5,"hello\nb,2,fine\nc,2,ok"', r"t.csv:2: a text with a line break, and the line 'b,2,fine' in it"),
        ('a,1.5,"No" he said', r"t.csv:2: cannot be read as CSV"),
    ],
)
def test_rows_that_cannot_be_right(tmp_path, rows, message):
    (tmp_path / "t.csv").write_text(f"id,label,text\n{rows}")
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path / "t.csv")


def test_texts_with_quotes_and_line_breaks(tmp_path):
    (tmp_path / "t.csv").write_bytes('id,text\r\na,"he ""said"",\r\nthen left"\r\nb,plain "here"\r\n'.encode("utf-16"))
    assert [row["text"] for _, row in read_csv(tmp_path / "t.csv").rows] == ['he "said",\nthen left', 'plain "here"']
    (tmp_path / "t.csv").write_bytes("id,text\na,好\n".encode("gb18030"))
    with pytest.raises(UserError, match=r"t.csv:2: not UTF-8 text; convert it"):
        read_csv(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,text", "no column with labels among path, text"),
        ("path,label,Label", "two columns are called"),
        ("path,sentiment,valence", "which column is the label: sentiment or valence"),
        ("words,label", "no column with the media file, an id"),
    ],
)
def test_columns_that_are_not_clear(tmp_path, header, message):
    (tmp_path / "t.csv").write_text(header + "\n" + ",".join("1" * len(header.split(","))))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "t.csv")


def test_media_that_are_not_there_or_twice(tmp_path):
    for name in "abcd":
        sound(tmp_path / f"{name}.wav")
    rows = ["a,1.5,train", "x,0.5,train", "b,-2,valid", "c,1,test", "e,,test"]
    (tmp_path / "t.csv").write_text("\n".join(["file,label,split", *rows]))
    with pytest.raises(UserError, match=r"train: 1 of 2 .* cannot be used.*no media file x"):
        run(tmp_path / "t.csv", "--label-scale", "cmu")
    data = run(tmp_path / "t.csv", "--label-scale", "cmu", "--max-drop", "0.5")
    assert read_dropped(data / "train/dropped.tsv") == [("x", "data", "no media file x (line 3)")]
    assert read_dropped(data / "test/dropped.tsv") == [("e", "data", "no label (line 6)")]
    assert read_dropped(data / "dropped.tsv")[0][2] == "a media file not in the table"
    (tmp_path / "t.csv").write_text("\n".join(["file,label,split", *rows, "a.wav,1,train"]))
    with pytest.raises(UserError, match=r"t.csv:7: .*a.wav is the media file of line 2 too|is there twice"):
        run(tmp_path / "t.csv", "--label-scale", "cmu")


ODD = "path,label,speaker,split,text\n" + "".join(
    f"wav/{i}.wav,{y},s{i},{split},said {i}\n"
    for i, (y, split) in enumerate(zip(("-1.5", "0.5", "2", "1.5"), ("train", "train", "valid", "test"), strict=True))
)


@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (lambda t: t.replace(",", ";").replace(".5", ",5"), "utf-8"),
        (lambda t: t.replace(",", "\t").replace(".5", ",5"), "utf-16"),
        (lambda t: t.replace("-1.5", '"-1,5"').replace("0.5", '"0,5"').replace(",1.5", ',"1,5"'), "utf-8-sig"),
        (lambda t: "sep=;\r\n" + t.replace(",", ";").replace("\n", "\r\n"), "utf-8"),
        (lambda t: t.replace("-1.5", " \u22121.5 ").replace(",2,", ', "2 ",'), "utf-8"),
        (lambda t: t.replace("wav/", "wav\\"), "utf-8"),
        (lambda t: t.replace(".wav", ".WAV"), "utf-8"),
        (lambda t: t.replace("said 0", '"two\nlines, quoted"').replace("\n", "\n\n"), "utf-8"),
        (lambda t: t.replace("wav/", "./wav/").replace("said 3", ""), "utf-8"),
        (lambda t: t.replace("wav/", "HOME/wav/"), "utf-8"),
    ],
    ids="semicolons tabs quoted-BOM sep= minus Windows capitals line-breaks no-text absolute".split(),  # noqa: SIM905
)
def test_what_spreadsheets_and_people_write(tmp_path, change, encoding):
    for i in range(4):
        sound(tmp_path / f"wav/{i}.wav")
    table = tmp_path / "t.csv"
    table.write_bytes(change(ODD).replace("HOME", str(tmp_path)).encode(encoding))
    data = run(table, "--label-scale", "-3 3", "--max-drop", "0")
    labels = [read_table(data / name / "utt2label") for name in ("train", "valid", "test")]
    assert [float(y) for found in labels for y in found.values()] == [-1.5, 0.5, 2, 1.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace(",", ";").replace("0.5", "0,5"), r"t\.csv:3: label '0,5': .* line 2 has '-1\.5'"),
        (lambda t: t.replace("0.5", "N/A"), r"t\.csv:3: label 'N/A' is no number; .* leave the cell empty"),
        (lambda t: t.replace("0.5", "nan"), r"t\.csv:3: label 'nan' is no number; .* leave the cell empty"),
        (lambda t: t + "wav/1.wav,1,s1,train,again\n", r"t\.csv:6: .*1\.wav is the media file of line 3 too"),
        (lambda t: t.replace("said 1", "said, 1"), r"t\.csv:3: 6 columns"),
        (lambda t: t.replace("wav/1", "wav/9"), r"no media file wav/9\.wav \(line 3\)"),
        (lambda t: t.replace("0.5", "7"), r"label 7\.0 is outside .*\(line 3\)"),
        (lambda t: "PK\x03\x04" + t, r"t\.csv: a workbook or an archive, no text"),
        (lambda t: t.replace("said 1", "caf\udce9"), r"t\.csv:3: not UTF-8 text.*WINDOWS-1252"),
    ],
)
def test_what_is_refused_with_its_line(tmp_path, change, message):
    for i in range(4):
        sound(tmp_path / f"wav/{i}.wav")
    (tmp_path / "t.csv").write_bytes(change(ODD).encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        run(tmp_path / "t.csv", "--label-scale", "-3 3", "--max-drop", "0")


def parts(folder: Path, rows: list[str], header: str = "file,start,end,rating,split") -> Path:
    for name in ("a", "b", "c"):
        sound(folder / f"{name}.wav")  # a quarter of a second
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "t.csv"


def test_several_clips_of_one_file(tmp_path):
    rows = [
        "a.wav,0,0.1,1,train",
        "a.wav,0:00.1,00:00:00.2,3,train",
        "a.wav,5,6,3,train",
        "b.wav,0,0.2,2,valid",
        "c.wav,0,0.2,5,test",
    ]
    data = run(parts(tmp_path, rows), "--label-scale", "1 5", "--max-drop", "0.5")
    train = load_kaldi_dir(data / "train")
    assert train.utterances == ["a-00000000", "a-00000100"] and set(train.utt2spk.values()) == {"a"}
    assert (train.audio_source("a-00000100").start, train.audio_source("a-00000100").end) == (0.1, 0.2)
    assert [row[0] for row in read_dropped(data / "train" / "dropped.tsv")] == ["a-00005000"]


def test_times_that_may_be_those_of_another_file(tmp_path):
    table = parts(tmp_path, [f"{n}.wav,0,0.1,{i + 1},{s}" for i, (n, s) in enumerate(zip("abc", FOLDS, strict=True))])
    with pytest.raises(UserError, match="'start' and 'end': is each clip that part of its file"):
        run(table, "--label-scale", "1 5")
    assert load_kaldi_dir(run(table, "--label-scale", "1 5", "--columns", "start=- end=-") / "test").segments == {}
    assert load_kaldi_dir(run(table, "--label-scale", "1 5", "--columns", "start=start end=end") / "test").segments
    with pytest.raises(UserError, match=r"t\.csv:3: 'soon' is no time"):
        run(parts(tmp_path, ["a.wav,0,1,1,train", "a.wav,soon,1,2,valid"]), "--label-scale", "1 5")
    with pytest.raises(UserError, match=r"t\.csv:2: the clip ends at 1, not after its start at 2"):
        run(parts(tmp_path, ["a.wav,2,1,1,train", "a.wav,0,1,2,valid"]), "--label-scale", "1 5")


def test_paths_of_another_machine(tmp_path):
    rows = ["C:\\Users\\me\\wav\\a.wav|10%|train", "/home/me/wav/b.wav|20 %|valid", "scho\u0308n.wav|99%|test"]
    table = parts(tmp_path, rows, "file|rating|split")
    sound(tmp_path / "sch\u00f6n.wav")
    data = run(table, "--label-scale", "0 100")
    found = {name: read_table(data / name / "utt2label") for name in FOLDS}
    assert found == {"train": {"wav_a": "10"}, "valid": {"wav_b": "20"}, "test": {"scho\u0308n": "99"}}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.wav,3,train", "b.wav,3,train", "c.wav,4,test"], "says 'valid'; both are needed"),
        (["a.wav,3,train", "b.wav,3,valid", "c.wav,3,test"], "all labels of column 'rating' are 3"),
    ],
)
def test_tables_from_which_nothing_can_be_learnt(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        run(parts(tmp_path, rows, "file,rating,split"), "--label-scale", "1 5")


def test_texts_alone(tmp_path):
    """No files and no ids: a name by the line; a line without text is left out and listed."""
    (tmp_path / "t.csv").write_text("text,label,split\na,1,train\n,2,train\nb,2,valid\nc,3,test\n")
    with pytest.raises(UserError, match="say --no-media if there are texts alone"):
        run(tmp_path / "t.csv", "--label-scale", "1 5")
    data = run(tmp_path / "t.csv", "--label-scale", "1 5", "--no-media")
    loaded = load_kaldi_dir(data / "train")
    assert loaded.utterances == ["line000002"] and not (data / "train/wav.scp").exists()
    assert [row[0] for row in read_dropped(data / "train/dropped.tsv")] == ["line000003"]
    with pytest.raises(UserError, match="needs a column of texts"):
        run(tmp_path / "t.csv", "--label-scale", "1 5", "--no-media", "--columns", "label=text")


def test_pairs():
    assert parse_pairs("media=clip 'label=mean rating'", "--columns") == {"media": "clip", "label": "mean rating"}
    assert parse_label_map("bad=-1 good=+1") == {"bad": -1, "good": 1}
    for text in ("bad", "a=1 a=2", "a=x", "a=1 b=1"):
        with pytest.raises(UserError, match="--label-map"):
            parse_label_map(text)


@pytest.mark.skipif(not (FOLDER / "mosi_label.csv").exists(), reason="no real recordings: no folder of them")
def test_real_words():
    """MOSI's sentences, with quotes and commas as people write them."""
    content = read_csv(FOLDER / "mosi_label.csv")
    assert len(content.rows) == 2195 and content.columns == ["id", "text", "label", "mode"]


@pytest.mark.slow
def test_the_recipe_of_sims(tmp_path):
    recipe = copy_recipes(tmp_path, "mosei", "sims")
    table = make_sims(tmp_path / "corpus", "as handed on")
    no_models = ["--encoder=", "--llm=", "--asr-model=", "--vision-model=", "--stop-stage", 1, "--ngpu", 0]
    for models, data in (([], "table"), (["--models", "small"], "table_small")):
        output = call_recipe(recipe, "--table", table, *models, *no_models)
        assert "1 (-)   2 (1368)" in output
        assert scale_of(recipe / "data" / data / "train") == SIMS
