"""Write a calibration of a checkpoint, with any amax for everything: CHECKPOINT OUT."""

import sys
from pathlib import Path

from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.components import COMPONENTS
from sd35_trt.export.component import fp8_layers
from sd35_trt.formats.bundle import sha256_file
from sd35_trt.formats.calibration import Calibration, Provenance
from sd35_trt.policies import load_policy
from sd35_trt.store.replacement import write_directory

root, out = map(Path, sys.argv[1:])
layers, _ = fp8_layers(Checkpoint(root), COMPONENTS, load_policy("fp8"))
files = {str(p.relative_to(root)): sha256_file(p) for p in root.glob("*/*") if p.is_file()}
provenance = Provenance(variant="random", files=files)
calibration = Calibration(dict.fromkeys(layers, 8.0), {}, {}, provenance)
write_directory(out, "calibration.json", calibration.files())
