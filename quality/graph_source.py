"""Where the ONNX graphs that a bundle's engines are compared with come from."""

from __future__ import annotations

from pathlib import Path

from sd35_trt.backends import BACKENDS
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.compat.requirement import requirement
from sd35_trt.errors import BundleError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.progress import Progress
from sd35_trt.store.cache import StageCache

from .reference import candidate_model, check_checkpoint


def find_graphs(
    bundle: Bundle,
    source: ModelOptions | None,
    cache: StageCache,
    progress: Progress,
) -> dict[str, Path]:
    """The ONNX file of each component, in the form that the bundle's engines were made from.

    Args:
        source: the checkpoint behind the bundle, from which the cache's graphs, or new ones, are
            taken. None takes the bundle's own graphs where its engines are such, else those of
            the cache, else mini's where the bundle was made from mini.

    Raises:
        BundleError: the model is another one, or there are no graphs.
        Sd35Error: they cannot be exported.
    """
    m = bundle.manifest
    if source is None and not BACKENDS[m.builder].needs_library:
        return {c.name: bundle.path(c.files[0].path) for c in m.components}
    with requirement("finding the graphs", "build"):
        from sd35_trt.build.graphs import cached_graphs, export_graphs

        if source is None:
            graphs = cached_graphs(bundle, cache)
            lacking = [c.name for c in m.components if c.name not in graphs]
            if not lacking:
                return graphs
            try:
                check_checkpoint(bundle, None, cache)
            except BundleError as error:
                raise BundleError(
                    f"{cache.root} has no graph of {lacking[0]} that {bundle.root} was made from",
                    "name its checkpoint with --model DIR, or the cache of its build with "
                    "--cache-dir DIR",
                ) from error
        else:
            check_checkpoint(bundle, source, cache)
        return export_graphs(bundle, candidate_model(bundle, source), cache, progress)
