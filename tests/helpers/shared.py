"""Files that are not ours to publish: in a folder `shared` beside the repository, or where SDUMC_TEST_SHARED says."""

import os
from pathlib import Path

FOLDER = Path(os.environ.get("SDUMC_TEST_SHARED", Path(__file__).resolve().parents[3] / "shared"))
MEDIA = FOLDER / "media"  # recordings of people who speak, MPEG video with sound
RELEASED_KEYS = FOLDER / "released_checkpoint_keys.tsv"  # names and shapes of the tensors in the authors' checkpoint
REAL_MODELS = FOLDER / "real_models.py"  # makes folders of real small models out of two Python packages
