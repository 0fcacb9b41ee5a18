"""Models on the hub: which of a repository's files are fetched, and what is said of others."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from sd35_trt.checkpoints.hub import model_files, part_files, resolve_model
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ControlNet, ModelOptions
from sd35_trt.errors import CheckpointError
from sd35_trt.mini import checkpoint_path, controlnet_paths
from sd35_trt.store.model_names import hub_origin, model_name

REVISION = "b940f670f0eda2d07fbb75229e779da1ad11eb80"


class Hub:
    """A hub of repositories in memory; a snapshot is laid out as in the library's cache.

    Attributes:
        fetched: names of the files that were asked for, in their order.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []
        self.online = True
        self._answer: Any = SimpleNamespace(headers={}, status_code=404, request=None)

    def list_repo_files(self, name: str, revision: str | None = None) -> list[str]:
        self.revisions.append(revision)
        if not self.online:
            raise ConnectionError("Name or service not known")
        if name not in self.repositories:
            raise RepositoryNotFoundError(
                "404 Client Error. Repository Not Found", response=self._answer
            )
        return list(self.repositories[name])

    def snapshot_download(
        self,
        name: str,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        folder = self.root / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION
        if local_files_only:
            if not folder.is_dir():
                raise LocalEntryNotFoundError("not in the cache")
            return str(folder)
        for file, data in self.repositories[name].items():
            if any(fnmatchcase(file, pattern) for pattern in allow_patterns or ["*"]):
                self.fetched.append(file)
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(data)
        return str(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def _mini() -> dict[str, bytes]:
    root = checkpoint_path()
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_a_diffusers_model(hub: Hub) -> None:
    """What a build reads, and no gigabytes beside it."""
    mini = _mini()
    beside = [
        "README.md", "sd3.5_large.safetensors", "text_encoders/t5xxl_fp16.safetensors",
        "text_encoder_3/model.fp16.safetensors", "text_encoder_3/pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16.safetensors", "controlnet/config.json",
    ]  # fmt: skip
    hub.repositories["someone/sd35-turbo"] = mini | dict.fromkeys(beside, b"x")
    root = resolve_model("someone/sd35-turbo")
    assert not set(hub.fetched) & set(beside)
    assert {name for name in mini if name.endswith(".safetensors")} <= set(hub.fetched)
    model = look(ModelOptions("someone/sd35-turbo"))
    assert model.name == "sd35-turbo"
    assert model.origin == f"someone/sd35-turbo@{REVISION}"
    assert model_name(root) == "sd35-turbo"
    # Given by its folder, it is the same model.
    assert look(ModelOptions(str(root))).origin == model.origin
    assert hub_origin(checkpoint_path()) is None


NET = ("config.json", "diffusion_pytorch_model.safetensors")


def _net(*names: str) -> dict[str, bytes]:
    """Files of mini's ControlNet, by these names."""
    data = ((controlnet_paths()["canny"] / name).read_bytes() for name in NET)
    return dict(zip(names, data, strict=True))


@pytest.mark.parametrize(
    ("model", "files"),
    [
        ("someone/net-canny", NET),
        ("someone/net-canny@v1", NET),
        ("someone/net-canny/nets/own.safetensors", ("nets/config.json", "nets/own.safetensors")),
    ],
)
def test_a_net(hub: Hub, model: str, files: tuple[str, ...]) -> None:
    """Its configuration and one file of weights, or the file that is named with what is beside."""
    beside = ("README.md", "diffusion_pytorch_model.fp16.safetensors", "other.bin", "edges.png")
    repository = _net(*NET) | dict.fromkeys(beside, b"x")
    repository |= _net("nets/config.json", "nets/own.safetensors")
    hub.repositories["someone/net-canny"] = repository
    (net,) = look(ModelOptions(controlnets=(ControlNet("own", model),))).nets
    assert sorted(hub.fetched) == sorted(files)
    assert net.kind == "canny"
    hub.online, hub.fetched = False, []
    assert look(ModelOptions(controlnets=(ControlNet("own", model),))).nets == (net,)


def test_nets_that_are_not_to_be_had(hub: Hub) -> None:
    """Each is told, in its line."""
    # Stability's repository of three nets, each in one file.
    files = [f"sd3.5_large_controlnet_{kind}.safetensors" for kind in ("blur", "canny", "depth")]
    hub.repositories["someone/nets"] = dict.fromkeys(["README.md", *files], b"x")
    hub.repositories["someone/pictures"] = {"README.md": b"x"}
    words = {
        "someone/none": "someone/none is not a directory here and cannot be fetched.*Not Found",
        "someone/nets": f"3 single files — name .*: --controlnet NAME=someone/nets/{files[0]}",
        "someone/pictures": "has no config.json at its top — give a local directory",
        "someone/nets/own.safetensors": f"has no file own.safetensors — it has {files[0]}",
    }
    for model, message in words.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            look(ModelOptions(controlnets=(ControlNet("own", model),)))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("revision", ["v1.0", "main", REVISION, "refs/pr/7"])
def test_a_revision(hub: Hub, revision: str) -> None:
    hub.repositories["someone/sd35"] = _mini()
    resolve_model(f"someone/sd35@{revision}")
    assert hub.revisions == [revision]


def test_without_a_network(hub: Hub) -> None:
    """What was fetched before is read again; else the line says why."""
    hub.repositories["someone/sd35"] = _mini()
    first = resolve_model("someone/sd35")
    hub.online = False
    assert resolve_model("someone/sd35") == first
    with pytest.raises(CheckpointError, match="cannot be fetched from the hub: Name or service"):
        resolve_model("someone/other")


def test_only_a_variant(hub: Hub) -> None:
    """A repository of FP16 files alone: those are what is meant."""
    files = {
        name.replace(".safetensors", ".fp16.safetensors"): data for name, data in _mini().items()
    }
    hub.repositories["someone/fp16-only"] = files
    assert look(ModelOptions("someone/fp16-only")).components == look(ModelOptions()).components


def test_shards() -> None:
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "diffusion_pytorch_model.safetensors.index.json"
    variant = [name.replace(".safetensors", ".fp16.safetensors") for name in shards]
    names = [f"transformer/{name}" for name in ("config.json", index, *shards, *variant)]
    assert set(model_files(names)) == {f"transformer/{n}" for n in ("config.json", index, *shards)}


def test_a_repository_of_single_files(hub: Hub) -> None:
    """One is taken; of several, the line names them; and each with the parts that it lacks."""
    header = json.dumps({}).encode()
    empty = len(header).to_bytes(8, "little") + header
    parts = ["text_encoders/clip_l.safetensors", "text_encoders/clip_g.safetensors",
             "text_encoders/t5xxl_fp16.safetensors",
             "text_encoders/t5xxl_fp8_e4m3fn.safetensors"]  # fmt: skip
    hub.repositories["someone/one"] = dict.fromkeys(["sd3.5_medium.safetensors", *parts], empty)
    assert resolve_model("someone/one").name == "sd3.5_medium.safetensors"
    assert hub.fetched == ["sd3.5_medium.safetensors", *parts[:3]]
    several = ["sd3.5_large.safetensors", "fp8/sd3.5_large_fp8.safetensors"]
    hub.repositories["someone/several"] = dict.fromkeys([*several, *parts], empty)
    with pytest.raises(CheckpointError, match="2 single files") as caught:
        resolve_model("someone/several")
    assert "--model someone/several/fp8/sd3.5_large_fp8.safetensors" in str(caught.value)
    hub.fetched.clear()
    path = resolve_model("someone/several@main/sd3.5_large.safetensors")
    assert path.name in hub.fetched
    assert several[1] not in hub.fetched
    with pytest.raises(CheckpointError, match=r"has no file sd3\.safetensors") as caught:
        resolve_model("someone/several/sd3.safetensors")
    assert "sd3.5_large.safetensors" in str(caught.value)


def test_parts_in_the_file_are_not_fetched() -> None:
    names = ["model.safetensors", "clip_l.safetensors", "tokenizer/vocab.json"]
    anchor = "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight"
    assert part_files("model.safetensors", names, []) == [names[2], names[1]]
    assert part_files("model.safetensors", names, [anchor]) == [names[2]]


@pytest.mark.parametrize("model", ["someone/nothing", "someone/nothing@v1", "someone/no/a.gguf"])
def test_no_such_repository(hub: Hub, model: str) -> None:
    with pytest.raises(CheckpointError, match="Repository Not Found") as caught:
        resolve_model(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["models/sd.safetensors", "./a/b", "here/sd3/a.safetensors"])
def test_a_path_stays_one(hub: Hub, tmp_path: Path, model: str) -> None:
    (tmp_path / "here").mkdir()
    assert resolve_model(model) == Path(model)
    assert hub.revisions == []


_SITE = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
_ID = "the hub id: stabilityai/stable-diffusion-3.5-medium"


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        (_SITE, _ID),
        (f"{_SITE}/", _ID),
        (f"{_SITE}/tree/main", _ID),
        (f"{_SITE}/tree/fp16", f"{_ID}@fp16"),
        (f"{_SITE}/resolve/main/a/sd3.5.safetensors?download=true", f"{_ID}/a/sd3.5.safetensors"),
        (f"{_SITE}/blob/v1/sd3.5.gguf", f"{_ID}@v1/sd3.5.gguf"),
        (f"{_SITE}/blob/main/README.md", _ID),
        ("https://hf.co/a/b?x=1", "the hub id: a/b"),
        ("https://civitai.com/models/1", "a path, after downloading it, or a hub id"),
        ("s3://bucket/model", "a path, after downloading it, or a hub id"),
    ],
)
def test_an_address(address: str, instead: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_model(address)
    assert str(caught.value) == f"{address} is an address — give {instead}"


def test_a_home_that_there_is_not() -> None:
    with pytest.raises(CheckpointError, match=r"no home directory for ~nobody-here/sd3\.5 — give"):
        resolve_model("~nobody-here/sd3.5")
