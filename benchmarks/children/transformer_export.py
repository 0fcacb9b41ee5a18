"""Export the conditioner and the denoiser of a checkpoint: CHECKPOINT OUT POLICY.

Prints [time, stage, note] where a stage begins.
"""

import json
import sys
import time
from pathlib import Path

from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.export.component import ExportOptions, export_component, fp8_layers
from sd35_trt.export.scales import Scales
from sd35_trt.policies import load_policy

checkpoint, out, policy = Checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), load_policy(sys.argv[3])
# Any amax will do: only the bytes written depend on it.
linears, _ = fp8_layers(checkpoint, ["denoiser"], policy)
scales = Scales(inputs=dict.fromkeys(linears, 8.0))
for name in ("conditioner", "denoiser"):

    def progress(fraction: float, note: str, name: str = name) -> None:
        print(json.dumps([time.time(), f"{name} {note}", ""]), flush=True)

    (out / name).mkdir(parents=True)
    options = ExportOptions(clip_tokens=77)
    export_component(name, checkpoint, policy, options, out / name, progress, scales)
