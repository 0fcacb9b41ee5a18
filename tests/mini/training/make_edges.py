"""Writes ``edges.npz``: edges of held-out scenes, for tests where OpenCV is not installed.

python tests/mini/training/make_edges.py
"""

from pathlib import Path

import numpy as np

from mini.training import batches
from mini.training.edges import scene_edges
from sd35_trt.mini.scoring import heldout

if __name__ == "__main__":
    edges = scene_edges(batches.describe(heldout(8)))
    np.savez_compressed(Path(__file__).with_name("edges.npz"), edges=edges)
