"""Video features and face tracking."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from helpers import tiny_models
from scipy.ndimage import rotate

from mini.clips import write_clip
from mini.face import draw_face, draw_looks
from sdumc.bin import extract_video, finish_dump
from sdumc.data.dump import load_dump, load_matrix
from sdumc.data.media import read_frames
from sdumc.errors import UserError
from sdumc.extraction.faces import FaceDetector, crop, overlap, track_face
from sdumc.pretrained.vision import VisionExtractor


def pictures(count, seed=0, size=(48, 64)):
    return list(np.random.default_rng(seed).integers(0, 255, (count, *size, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["vit", "clip"])
@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_vision_models(tmp_path, kind, pooling):
    folder = getattr(tiny_models, kind)(tmp_path / kind)
    extractor = VisionExtractor(str(folder), pooling=pooling, batch=4)
    frames = pictures(10)
    together = extractor(iter(frames))
    assert together.shape == (10, 24)
    assert together.dtype == np.float32
    alone = np.concatenate([extractor([f]) for f in frames])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-4


def test_random_pooler_is_refused(tmp_path):
    folder = tiny_models.vit(tmp_path / "vit", pooler=False)
    with pytest.raises(UserError, match="no pooler weights"):
        VisionExtractor(str(folder), pooling="pooler")
    assert VisionExtractor(str(folder), pooling="cls")(pictures(2)).shape == (2, 24)


def test_not_a_vision_model(tmp_path):
    with pytest.raises(UserError, match="does not take pictures"):
        VisionExtractor(str(tiny_models.wavlm(tmp_path / "wavlm")))


@pytest.mark.parametrize("kind", ["altclip_text_model", "kind_of_next_year"])
def test_a_kind_without_a_class_is_refused_in_one_plain_line(tmp_path, kind):
    """Not with transformers' list of all the kinds that it has."""
    folder = tiny_models.vit(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(UserError) as found:
        VisionExtractor(str(folder))
    message = str(found.value).removeprefix(str(folder))
    assert f"a {kind} model" in message and len(message) < 250 and "\n" not in message
    assert message.endswith("such as CLIP, SigLIP, ViT, DINOv2, Swin or ConvNeXt")


# Vectors before those of the patches; None: a model in stages, whose output is a map or a list of positions.
PREFIX = {
    "vit_mae": 1,
    "deit": 2,
    "beit": 1,
    "siglip": 0,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "dinov3_convnext": 1,
    "aimv2": 0,
    "resnet": None,
    "convnext": None,
    "swin": 0,
}


@pytest.mark.parametrize("kind", PREFIX)
def test_kinds_of_vision_models(tmp_path, kind):
    """The mean is that of the patches alone, and ``cls`` a class token or refused."""
    from transformers import AutoModel

    folder, frames = tiny_models.vision_model(tmp_path / "model", kind), pictures(8, size=(40, 40))
    extractor = VisionExtractor(str(folder), pooling="mean", batch=3)
    together = extractor(frames)
    assert together.shape == (8, extractor.dim)
    np.testing.assert_allclose(together, np.concatenate([extractor([f]) for f in frames]), atol=1e-5)
    np.testing.assert_array_equal(together, extractor(frames))

    pixels = extractor.processor(images=frames, return_tensors="pt", input_data_format="channels_last").pixel_values
    hides = {"mask_ratio": 0.0} if kind == "vit_mae" else {}
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder, **hides).eval()(pixels).last_hidden_state
    if PREFIX[kind] is None:
        assert states.shape[2:] == (4, 4)
        expected = states.flatten(2).mean(2)
    else:
        expected = states[:, PREFIX[kind] :].mean(1)
    np.testing.assert_allclose(together, expected.numpy(), atol=1e-5)

    if kind in ("vit_mae", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit"):
        first = VisionExtractor(str(folder), pooling="cls")(frames)
        np.testing.assert_allclose(first, states[:, 0].numpy(), atol=1e-5)
    else:
        with pytest.raises(UserError, match="has no class token; use --pooling mean or pooler"):
            VisionExtractor(str(folder), pooling="cls")
        assert VisionExtractor(str(folder), pooling="pooler")(frames).shape == together.shape


@pytest.mark.parametrize("name", ["MetaClip2", "AltCLIP", "Aimv2", "Siglip2"])
def test_vision_towers_of_models_of_pictures_and_texts(tmp_path, name):
    model = tiny_models.two_towers(tmp_path / "model", name)
    if model is None:
        pytest.skip(f"this transformers has no {name}")
    extractor, frames = VisionExtractor(str(tmp_path / "model"), pooling="pooler"), pictures(4, size=(40, 40))
    inputs = extractor.processor(images=frames, return_tensors="pt", input_data_format="channels_last")
    tower = model.eval().vision_model
    takes = inspect.signature(tower.forward).parameters
    with torch.no_grad():  # transformers 4 names the mask otherwise within the model
        output = tower(**{k if k in takes else k.removeprefix("pixel_"): v for k, v in inputs.items()})
    np.testing.assert_allclose(extractor(frames), output.pooler_output.numpy(), atol=1e-5)
    if name == "Siglip2":  # pictures of any shape: the patches of each, padded
        real = inputs.pixel_attention_mask.bool()
        expected = np.stack([s[m].mean(0).numpy() for s, m in zip(output.last_hidden_state, real, strict=True)])
        mean = VisionExtractor(str(tmp_path / "model"), pooling="mean")
        np.testing.assert_allclose(mean(frames), expected, atol=1e-5)
        tiny_models._image_processor(tmp_path / "model", "ViTImageProcessor", {"height": 32, "width": 32})
        with pytest.raises(UserError, match=r"wants more than pixels \(pixel_attention_mask, spatial_shapes\), which"):
            VisionExtractor(str(tmp_path / "model"), pooling="mean")


@pytest.mark.parametrize("kind", ["timesformer", "videomae"])
def test_models_of_video_are_refused(tmp_path, kind):
    folder = tiny_models.vision_model(tmp_path / "model", kind)
    for pooling in ("mean", "cls"):
        with pytest.raises(UserError, match=f"a {kind} model reads clips of [24] pictures, not single ones"):
            VisionExtractor(str(folder), pooling=pooling)


def test_the_trial_refuses_what_no_list_names(tmp_path, monkeypatch):
    yolos = str(tiny_models.vision_model(tmp_path / "yolos", "yolos"))
    with pytest.raises(UserError, match="22 vectors for a picture of 16 patches, where 17 are expected"):
        VisionExtractor(yolos, pooling="mean")
    vit = str(tiny_models.vit(tmp_path / "vit"))
    with monkeypatch.context() as patch:
        patch.setattr(VisionExtractor, "_patches", lambda *_: None)
        with pytest.raises(UserError, match="does not say which of its 5 vectors are patches; use --pooling pooler"):
            VisionExtractor(vit, pooling="mean")
    compute = VisionExtractor._pooled

    def refused(change, reason):
        monkeypatch.setattr(VisionExtractor, "_pooled", lambda self, *a: change(compute(self, *a)))
        with pytest.raises(UserError, match=f"vit: this vit model cannot be used for pictures: {reason}"):
            VisionExtractor(vit)

    refused(lambda x: x[: (len(x) + 1) // 2], "it gives 2 vectors for 3 pictures")
    refused(lambda x: x - x.mean(0) * (len(x) > 1), "a picture's vector depends on the other pictures")
    refused(lambda x: x + torch.randn(1), "the same picture gives another vector each time")
    refused(lambda x: x * torch.nan, "its output is not finite in float32")
    refused(lambda x: x.missing, "'Tensor' object has no attribute 'missing'")


# ---- one face per clip


def boxes(*rows):
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def test_track_fills_gaps_and_ignores_false_alarms():
    detections = []
    for i in range(30):
        found = [] if i in (4, 5, 6, 29) else [[100 + i, 50, 80, 80]]
        if i in (3, 12):
            found.insert(0, [300, 10, 40, 40])  # wallpaper
        detections.append(boxes(*found))
    track = track_face(detections)
    assert track.boxes.shape == (30, 4)
    assert track.seen == pytest.approx(26 / 30)
    np.testing.assert_allclose(track.boxes[2:-3, 0], 100 + np.arange(2, 27), atol=0.7)
    np.testing.assert_allclose(track.boxes[:, 2], 80, atol=1e-3)


def test_track_prefers_the_large_and_persistent_face():
    detections = [boxes([10, 10, 40, 40], [200, 40, 90, 90]) for _ in range(20)]
    assert abs(track_face(detections).boxes[:, 0] - 200).max() < 1
    detections = [boxes([10, 10, 40, 40], *([[200, 40, 90, 90]] if i < 4 else [])) for i in range(40)]
    assert abs(track_face(detections).boxes[:, 0] - 10).max() < 1


def test_track_goes_on_after_a_cut():
    detections = [boxes([10, 10, 60, 60])] * 10 + [boxes([200, 30, 80, 80])] * 12
    track = track_face(detections, smoothing=1)
    assert track.seen == 1
    assert track.boxes[0, 0] == 10
    assert track.boxes[-1, 0] == 200


def test_no_face():
    assert track_face([boxes()] * 5) is None
    assert track_face([]) is None


def test_overlap():
    assert overlap(np.array([0, 0, 10, 10]), np.array([5, 0, 10, 10])) == pytest.approx(50 / 150)
    assert overlap(np.array([0, 0, 10, 10]), np.array([20, 0, 10, 10])) == 0


def test_crop_is_square_and_stays_inside():
    picture = pictures(1, size=(60, 80))[0]
    assert crop(picture, (30, 20, 20, 20), margin=1.0).shape == (20, 20, 3)
    np.testing.assert_array_equal(crop(picture, (30, 20, 20, 20), margin=1.0), picture[20:40, 30:50])
    edge = crop(picture, (-5, -5, 20, 30), margin=1.5)
    assert edge.shape == (45, 45, 3)


# ---- the command


def video_data_dir(folder, clips):
    folder.mkdir(parents=True)
    tables = {"wav.scp": "", "video.scp": "", "utt2spk": "", "utt2label": "", "text": ""}
    for utt, path in sorted(clips.items()):
        for name in ("wav.scp", "video.scp"):
            tables[name] += f"{utt} {path}\n"
        tables["utt2spk"] += f"{utt} {utt[:2]}\n"
        tables["utt2label"] += f"{utt} 1.0\n"
        tables["text"] += f"{utt} words\n"
    for name, text in tables.items():
        (folder / name).write_text(text)
    return folder


def make_clip(path, seconds, seed=0, size=(48, 64)):
    shade = np.linspace(0, 200, int(seconds * 25)).astype(np.uint8)
    frames = [np.full((*size, 3), s, np.uint8) for s in shade]
    write_clip(path, iter(frames), 25, tiny_models.wave(seconds, seed), 16000)
    return path


def test_command(tmp_path):
    model = tiny_models.vit(tmp_path / "vit")
    clips = {f"s{i % 2}-{i}": make_clip(tmp_path / f"{i}.mp4", 1 + 0.4 * i, i) for i in range(3)}
    data = video_data_dir(tmp_path / "data", clips)
    base = ["--data-dir", str(data), "--model", str(model), "--device", "cpu", "--fps", "5"]
    extract_video.main([*base, "--dump-dir", str(tmp_path / "a")])
    finish_dump.main(["--data-dir", str(data), "--dump-dir", str(tmp_path / "a"), "--name", "video"])
    feature = load_dump(tmp_path / "a").features["video"]
    assert feature.dim == 24
    assert {u: feature.frames[u] for u in sorted(clips)} == {"s0-0": 5, "s0-2": 9, "s1-1": 7}
    moving = load_matrix(feature.entries["s0-2"])
    assert np.abs(np.diff(moving, axis=0)).max() > 1e-3
    # No face in grey pictures: absent with the reason, and the rest of the recipe can go on.
    extract_video.main([*base, "--dump-dir", str(tmp_path / "b"), "--detector", "yunet"])
    manifest = json.loads((tmp_path / "b/ark/video.1.json").read_text())
    assert manifest["absent"] == dict.fromkeys(sorted(clips), "a face in 0% of the pictures")
    whole = clips["s0-2"].read_bytes()
    clips["s0-2"].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"2\.mp4"):
        extract_video.main([*base, "--dump-dir", str(tmp_path / "c")])
    extract_video.main([*base, "--dump-dir", str(tmp_path / "d"), "--bad-media", "absent"])
    assert set(json.loads((tmp_path / "d/ark/video.1.json").read_text())["absent"]) == {"s0-2"}


def test_an_error_of_the_model_is_no_bad_media(tmp_path, monkeypatch):
    model = tiny_models.vit(tmp_path / "vit")
    data = video_data_dir(tmp_path / "data", {"s0-0": make_clip(tmp_path / "0.mp4", 1)})

    def failing(self, pictures):
        raise UserError("vit: no pooled output")

    monkeypatch.setattr(VisionExtractor, "_vectors", failing)
    arguments = ["--data-dir", str(data), "--model", str(model), "--device", "cpu", "--bad-media", "absent"]
    with pytest.raises(UserError, match=r"^vit: no pooled output$"):
        extract_video.main([*arguments, "--dump-dir", str(tmp_path / "dump")])


def test_no_video_at_all(tmp_path):
    data = tiny_models.data_dir(tmp_path / "data", [0.5, 0.6])
    model = tiny_models.vit(tmp_path / "vit")
    dump = str(tmp_path / "dump")
    extract_video.main(["--data-dir", str(data), "--dump-dir", dump, "--model", str(model), "--device", "cpu"])
    absent = json.loads((tmp_path / "dump/ark/video.1.json").read_text())["absent"]
    assert set(absent.values()) == {"no video in the data directory"}


def test_former_name_of_the_detector(tmp_path, capfd):
    model = tiny_models.vit(tmp_path / "vit")
    data = video_data_dir(tmp_path / "data", {"s0-0": make_clip(tmp_path / "0.mp4", 1)})
    arguments = ["--data-dir", str(data), "--dump-dir", str(tmp_path / "a"), "--model", str(model), "--device", "cpu"]
    extract_video.main([*arguments, "--detector", "opencv"])
    assert "faces are found by yunet" in capfd.readouterr().err
    assert json.loads((tmp_path / "a/ark/video.1.json").read_text())["settings"]["detector"] == "yunet"


# ---- the detector


def turned(picture, degrees):
    return rotate(picture, degrees, axes=(1, 0), reshape=False, order=1, mode="nearest")


def dark(picture):
    noise = np.random.default_rng(0).normal(0, 3, picture.shape)
    return np.clip(0.1 * picture + noise, 0, 255).astype(np.uint8)


def small(picture):
    """The picture in an eighth of the width of a large one."""
    large = np.full((480, 640, 3), 90, np.uint8)
    small = picture[::2, ::2]
    large[100 : 100 + small.shape[0], 200 : 200 + small.shape[1]] = small
    return large


def covered(picture):
    """Blue cloth over mouth and chin of the largest face."""
    x, y, width, height = max(FaceDetector()(picture), key=lambda box: box[2])
    rows, columns = np.indices(picture.shape[:2])
    inside = ((columns - x - width / 2) / (0.42 * width)) ** 2 + ((rows - y - 0.8 * height) / (0.26 * height)) ** 2 < 1
    return np.where(inside[..., None], np.array((60, 90, 160), np.uint8), picture)


CHANGES = {
    "as it is": lambda p: p,
    "turned left": lambda p: turned(p, 30),
    "turned right": lambda p: turned(p, -30),
    "dark": dark,
    "small": small,
    "mouth covered": covered,
}


@pytest.mark.parametrize("change", ["as it is", "turned left", "turned right"])
def test_drawn_faces_are_found(change):
    """Drawn faces are harder than real ones; the least share is what a detector of frontal faces is far from."""
    looks = [draw_looks(np.random.default_rng(seed)) for seed in (1, 3, 6, 9, 11, 12, 14, 16, 17, 20)]
    detector = FaceDetector()
    found = [detector(CHANGES[change](draw_face(x, np.array([0.2, 0.0, 0.7, 0.2, 0.0]), 192))) for x in looks]
    assert np.mean([len(boxes) > 0 for boxes in found]) >= 0.6


def test_no_face_is_found_in_what_is_none():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (120, 90, 3), dtype=np.uint8)
    checks = np.kron(np.indices((12, 16)).sum(0) % 2, np.ones((20, 20))).astype(np.uint8)[..., None].repeat(3, 2) * 255
    detector = FaceDetector()
    for picture in (noise, checks, np.zeros((1, 1, 3), np.uint8), np.full((2000, 31, 3), 128, np.uint8)):
        assert detector(picture).shape == (0, 4)


def test_boxes_are_in_pixels_of_the_picture_given():
    face = draw_face(draw_looks(np.random.default_rng(1)), np.array([0.2, 0.0, 0.7, 0.2, 0.0]), 192)
    detector = FaceDetector()
    (alone,) = detector(face)
    large = np.full((1080, 1920, 3), 90, np.uint8)
    thrice = face.repeat(3, 0).repeat(3, 1)
    large[300 : 300 + 576, 900 : 900 + 576] = thrice
    (found,) = detector(large)
    assert overlap(found, alone * 3 + np.array([900, 300, 0, 0])) > 0.8


@pytest.mark.parametrize("change", CHANGES)
def test_real_faces_under_hard_conditions(media_dir, change):
    detector = FaceDetector()
    pictures = [p for clip in sorted(media_dir.glob("*.mpg")) for _, p in read_frames(str(clip), 2)]
    found = [detector(CHANGES[change](p)) for p in pictures]
    assert np.mean([len(boxes) == 1 for boxes in found]) >= 0.95


@pytest.mark.parametrize("fps", [5, 25])  # 25: every frame of the recordings
def test_real_faces_are_found(media_dir, fps):
    detector = FaceDetector()
    clips = sorted(media_dir.glob("*.mpg"))
    assert clips
    for clip in clips if fps == 5 else clips[:2]:
        detections = [detector(p) for _, p in read_frames(str(clip), fps)]
        assert len(detections) == pytest.approx(3 * fps, abs=fps / 5)
        track = track_face(detections)
        assert track.seen >= 0.95, clip
        height = 288
        assert 0.3 * height < np.median(track.boxes[:, 2]) < 0.7 * height, clip
        assert np.abs(np.diff(track.boxes, axis=0)).max() < 15, clip
