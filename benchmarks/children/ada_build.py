"""Build a model for Ada: MODEL CALIBRATION OUT CACHE [LOW HIGH], sizes in pixels.

Prints [time, stage, note] at each progress.
"""

import json
import sys
import time
from pathlib import Path

from sd35_trt.build import BuildOptions, build


def progress(stage: str, done: float, total: float, note: str = "", /) -> None:
    print(json.dumps([time.time(), stage, note]), flush=True)


model, calibration, out, cache = sys.argv[1:5]
build(
    BuildOptions(
        model=model,
        target="ada",
        policy="fp8",
        size=(int(sys.argv[5]), int(sys.argv[6])) if sys.argv[5:] else None,
        out=Path(out),
        cache_dir=Path(cache),
        calibration=Path(calibration) if calibration else None,
    ),
    progress,
)
