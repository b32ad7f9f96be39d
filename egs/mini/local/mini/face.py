"""A drawn face: its looks, its expression over time, and one picture of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# What an expression is made of, in the order of the columns of :func:`expression_track`:
# smile    -1 frown, mouth corners down .. +1 smile, corners up
# brows    -1 lowered and drawn together .. +1 raised
# eyes      0 shut .. 1 wide open
# mouth     0 closed .. 1 wide open (speech)
# turn     -1 head to its left and down .. +1 to its right and up
PARAMETERS = ("smile", "brows", "eyes", "mouth", "turn")
_OVERSAMPLING = 2  # pictures are drawn larger and shrunk, for smooth edges

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Looks:
    """What a speaker looks like: colours, the face's breadth over its height, and half the fringe's arc in degrees."""

    skin: Colour
    hair: Colour
    eyes: Colour
    shirt: Colour
    background: Colour
    width: float
    fringe: float


_SKINS = ((244, 214, 190), (228, 184, 148), (198, 146, 106), (160, 108, 76), (112, 74, 52))
_HAIRS = ((36, 28, 24), (84, 54, 34), (150, 104, 54), (206, 172, 104), (128, 128, 132), (140, 52, 34))
_EYES = ((70, 48, 30), (60, 96, 140), (70, 110, 76), (96, 96, 100))


def draw_looks(rng: np.random.Generator) -> Looks:
    """Draw a speaker's looks."""

    def near(colours: tuple[Colour, ...]) -> Colour:
        base = np.array(colours[rng.integers(len(colours))])
        red, green, blue = np.clip(base + rng.integers(-10, 11, 3), 0, 255)
        return int(red), int(green), int(blue)

    def any_colour(low: int, high: int) -> Colour:
        red, green, blue = rng.integers(low, high, 3)
        return int(red), int(green), int(blue)

    return Looks(
        skin=near(_SKINS),
        hair=near(_HAIRS),
        eyes=near(_EYES),
        shirt=any_colour(30, 200),
        background=any_colour(120, 240),
        width=round(float(rng.uniform(0.72, 0.86)), 3),
        fringe=round(float(rng.uniform(30, 56)), 1),
    )


def expression_track(rng: np.random.Generator, peak: float, speech: np.ndarray, fps: float) -> np.ndarray:
    """How an expression moves through a clip: (frames, 5), columns as in :data:`PARAMETERS`.

    ``peak`` in [-1, 1] is reached once, by a short expression (0.8 to 1.4 s) somewhere in the clip, on top of a resting
    face and a slow drift that are independent of it. The mean over the clip therefore predicts it poorly.

    Args:
        rng: source of everything but the peak.
        peak: how glad (+1) or upset (-1) the face looks at its peak.
        speech: (frames,) loudness from 0 to 1, which opens the mouth.
        fps: frames per second.
    """
    frames = len(speech)
    time = np.arange(frames) / fps
    length = frames / fps
    width = rng.uniform(0.8, 1.4)
    centre = rng.uniform(min(0.3, length / 2), max(length - 0.3, length / 2))
    bump = peak * np.cos(np.clip((time - centre) / width, -0.5, 0.5) * np.pi) ** 0.5

    def drift(size: float) -> np.ndarray:
        phase, period = rng.uniform(0, 2 * np.pi), rng.uniform(1.5, 4.0)
        return size * np.sin(2 * np.pi * time / period + phase)

    rest = rng.uniform(-0.25, 0.25)
    smile = rest + drift(0.12) + bump * (1 - abs(rest))
    brows = rng.uniform(-0.3, 0.3) + drift(0.2) + 0.6 * bump
    eyes = 0.65 + drift(0.08) + 0.2 * np.abs(bump)
    blink = rng.uniform(0, 3.0)
    while blink < length:
        eyes = eyes * (1 - np.exp(-(((time - blink) / 0.06) ** 2)))
        blink += rng.uniform(1.5, 4.0)
    turn = rng.uniform(-0.3, 0.3) + drift(0.4)
    track = np.stack([smile, brows, eyes, 0.9 * speech, turn], axis=1)
    return np.clip(track, [-1, -1, 0, 0, -1], [1, 1, 1, 1, 1])


def draw_face(looks: Looks, values: np.ndarray, size: int) -> np.ndarray:
    """Draw one picture: RGB uint8 (size, size, 3). ``values`` (5,) are ordered as :data:`PARAMETERS`."""
    smile, brows, eyes, mouth, turn = (float(v) for v in values)
    n = size * _OVERSAMPLING
    image = Image.new("RGB", (n, n), looks.background)
    draw = ImageDraw.Draw(image)

    def box(x: float, y: float, half_width: float, half_height: float) -> tuple[float, float, float, float]:
        return (x - half_width) * n, (y - half_height) * n, (x + half_width) * n, (y + half_height) * n

    # Head and shoulders; the features move a little further than the head, as they would on a turning one.
    x, y = 0.5 + 0.03 * turn, 0.5 - 0.015 * turn
    half_height = 0.37
    half_width = half_height * looks.width
    draw.ellipse(box(0.5, 1.08, 0.42, 0.24), looks.shirt)
    draw.ellipse(box(x, y - 0.04, half_width + 0.045, half_height + 0.03), looks.hair)
    draw.ellipse(box(x, y, half_width, half_height), looks.skin)
    draw.chord(box(x, y - 0.03, half_width, half_height), 270 - looks.fringe, 270 + looks.fringe, looks.hair)
    x += 0.025 * turn

    shade = tuple(int(0.55 * c) for c in looks.skin)
    line = max(1, round(0.028 * n))
    for side in (-1, 1):
        eye_x, eye_y = x + side * 0.125, y - 0.055
        opening = 0.008 + 0.05 * eyes
        draw.ellipse(box(eye_x, eye_y, 0.062, opening), (250, 250, 250), outline=shade, width=max(1, line // 3))
        pupil = min(0.032, opening)
        draw.ellipse(box(eye_x + 0.008 * turn, eye_y, pupil, pupil), looks.eyes)
        # Raised brows go up and arch; lowered ones come down towards the nose.
        brow_y = eye_y - 0.095 - 0.028 * brows
        inner, outer = brow_y - 0.032 * brows, brow_y + 0.012 * brows
        ends = [((eye_x - side * 0.065) * n, inner * n), ((eye_x + side * 0.065) * n, outer * n)]
        draw.line(ends, looks.hair if sum(looks.hair) < sum(looks.skin) - 90 else shade, width=line)
    draw.line(
        [(x * n, (y + 0.0) * n), ((x - 0.02) * n, (y + 0.075) * n), ((x + 0.012) * n, (y + 0.08) * n)], shade, line // 2
    )

    # The mouth: two arcs through the same corners, parted by speech.
    t = np.linspace(-1, 1, 15)
    curve = 1 - t**2
    middle = y + 0.19
    half = 0.105 + 0.02 * abs(smile) - 0.02 * mouth
    upper = middle + 0.075 * smile * (curve - 0.5) - 0.018 * mouth * curve
    lower = middle + 0.075 * smile * (curve - 0.5) + (0.008 + 0.085 * mouth) * curve
    outline = [((x + half * a) * n, b * n) for a, b in zip(t, upper, strict=True)]
    outline += [((x + half * a) * n, b * n) for a, b in zip(t[::-1], lower[::-1], strict=True)]
    draw.polygon(outline, fill=(92, 24, 30))
    draw.line([*outline, outline[0]], fill=(168, 62, 66), width=max(1, line // 2), joint="curve")
    return np.asarray(image.reduce(_OVERSAMPLING))
