"""What `fetch` asks of huggingface_hub, and what each of its failures becomes. Nothing here touches the network."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from glm_jax import load
from glm_jax.cli import main
from glm_jax.config import tiny
from glm_jax.convert.hub import SMALL, fetch
from glm_jax.convert.safetensors import read_folder, write
from glm_jax.convert.table import tensor_shapes
from glm_jax.errors import BadInput, GLMError, MissingInput, NoSpace, UsageError

GB = 10**9
ALL = ["*.safetensors"]
REPO = {"config.json": 1000, "model-00001-of-00002.safetensors": 5 * GB, "mtp.safetensors": GB}


class Hub:
    """Stands for snapshot_download: records its calls, and answers or fails as the test says."""

    def __init__(self, folder: Path, files=None, cached=(), plan_error=None, error=None):
        self.calls = []
        self.folder, self.files, self.cached = folder, REPO if files is None else files, cached
        self.plan_error, self.error = plan_error, error

    def __call__(self, repo, **kwargs):
        self.calls.append((repo, kwargs))
        if kwargs.get("dry_run"):
            if self.plan_error:
                raise self.plan_error
            return [
                SimpleNamespace(filename=name, file_size=size, will_download=name not in self.cached)
                for name, size in self.files.items()
            ]
        if self.error:
            raise self.error
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def install(free=1000 * GB, online=True, **kwargs) -> Hub:
        made = Hub(tmp_path, **kwargs)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not online)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet" / "hub"))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        return made

    return install


def failure(kind: type[Exception], *parts: str, **kwargs) -> str:
    with pytest.raises(kind) as error:
        fetch("zai-org/GLM-4.6", weights=ALL, **kwargs)
    text = str(error.value)
    assert text.isprintable() and text.startswith("zai-org/GLM-4.6")
    for part in parts:
        assert part in text
    return text


def http(status: int) -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=status)


# ---- a folder here, or a name there


def test_a_path_that_exists_wins(hub, tmp_path, monkeypatch):
    made = hub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "zai-org" / "GLM-4.6").mkdir(parents=True)
    here = Path("zai-org/GLM-4.6")
    assert fetch("zai-org/GLM-4.6") == fetch(here) == here
    assert fetch("~/zai-org/GLM-4.6") == tmp_path / here
    assert fetch(str(tmp_path)) == fetch(tmp_path) == tmp_path
    assert fetch(".") == Path(".")
    assert made.calls == []
    with pytest.raises(UsageError, match="zai-org/GLM-4.6: a folder on this machine has no revision 'v1'"):
        fetch("zai-org/GLM-4.6", revision="v1")


@pytest.mark.parametrize(
    "name",
    ["./a", "../a", "/a", "/a/b", "~/a", "~nobody-of-this-name/a", "a/", "a/b/", "a/b/c", "a", "glm-4.6"]
    + ["", "a\\b", "a/b c", "a/..", "a/.b", "-a/b", "a//b", "a/b\n", "http://x", "a/b.git", "a/b-", "a/b--c"]
    + ["a/" + "b" * 97, "\0/a", "x" * 5000, Path("zai-org/GLM-4.6")],
)  # fmt: skip
def test_what_is_no_hub_id_is_never_downloaded(name, hub, tmp_path, monkeypatch):
    made = hub()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(MissingInput, match="no such folder") as error:
        fetch(name)
    assert str(error.value).isprintable()
    assert made.calls == []


# ---- a download


def test_the_plan_comes_first_and_then_the_download(hub, tmp_path):
    made = hub()
    assert fetch("zai-org/GLM-4.6", revision="v1", token="secret", weights=ALL) == tmp_path
    (repo, plan), (again, call) = made.calls
    assert repo == again == "zai-org/GLM-4.6"
    for kwargs in (plan, call):
        assert kwargs["revision"] == "v1" and kwargs["token"] == "secret"
        assert not kwargs.get("local_files_only")
    assert plan["dry_run"] and not call.get("dry_run")
    call.pop("local_files_only")
    assert {**plan, "dry_run": 0} == {**call, "dry_run": 0}


def test_only_weights_configuration_and_tokenizer_are_wanted(hub):
    made = hub()
    fetch("zai-org/GLM-4.6")
    fetch("zai-org/GLM-4.6", weights=["model-00001-of-00093.safetensors", "mtp.safetensors"])
    small = ["config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer.json"]
    small += ["tokenizer_config.json", "chat_template.jinja", "merges.txt"]
    weights = ["model-00001-of-00093.safetensors", "mtp.safetensors"]
    refused = ["pytorch_model.bin", "model.pt", "x.pth", "x.pkl", "x.gguf", "modeling_glm.py", "tokenization_glm.py"]
    refused += ["README.md", "original/model.safetensors", "fp8/config.json", "run.sh", "resources/x.jpeg"]
    refused += ["model-00002-of-00093.safetensors"]
    for (_, call), wanted in zip(made.calls[1::2], (small, small + weights), strict=True):
        patterns = {key: call[key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects(small + weights + refused, **patterns)) == wanted
        assert patterns["allow_patterns"][: len(SMALL)] == SMALL


MISTAKES = {  # kind: (what load is given, what config.json has, what it says)
    "another model": ({}, {"model_type": "llama"}, "model_type is 'llama'"),
    "fp8": ({}, {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    "layers": ({"layers": 99}, {}, "--layers 99"),
    "mesh": ({"mesh": "tensor=8"}, {}, "does not divide"),
    "dtype": ({"dtype": "int3"}, {}, "--dtype int3"),
    "memory": ({"mesh": "data=1"}, {"num_hidden_layers": 4000, "hidden_size": 8192}, "--layers"),
}


@pytest.mark.parametrize("given, fields, says", MISTAKES.values(), ids=MISTAKES)
def test_nothing_large_is_downloaded_for_a_mistake(given, fields, says, hub, tmp_path):
    made = hub()
    (tmp_path / "config.json").write_text(json.dumps(tiny(num_attention_heads=4).to_dict() | fields))
    with pytest.raises(GLMError, match=says):
        load("zai-org/GLM-4.6", **given)
    assert len(made.calls) == 2 and not any("safetensors" in p for p in made.calls[1][1]["allow_patterns"])


@pytest.mark.parametrize(
    "name, kept, says",
    [
        ("model.layers.0.self_attn.q_proj.weight", False, "1 tensors are missing: model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.z_proj.weight", True, "1 tensors have no place in this model"),
    ],
)
def test_the_index_is_checked_before_a_shard_comes(name, kept, says, hub, tmp_path):
    made, config = hub(), tiny()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    index = dict.fromkeys({*tensor_shapes(config), name} - (set() if kept else {name}), "model-0.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(BadInput, match=says):
        load("zai-org/GLM-4.6")
    assert len(made.calls) == 2


def test_layers_downloads_the_files_that_hold_them(hub, tmp_path):
    made, config = hub(), tiny()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    layer = lambda name: name.split(".")[2] if "layers" in name else "0"
    index = {name: f"model-{layer(name)}.safetensors" for name in tensor_shapes(config)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(MissingInput, match="model-0.safetensors"):  # this Hub has no bytes
        load("zai-org/GLM-4.6", layers=2)
    assert made.calls[-1][1]["allow_patterns"] == [*SMALL, "model-0.safetensors", "model-1.safetensors"]
    assert made.calls[-1][1]["revision"] == tmp_path.name  # the commit that the small files were of


def test_space_counts_what_is_not_in_the_cache(hub, tmp_path):
    made = hub(free=6 * GB)
    text = failure(
        NoSpace, "6,000,001,000 bytes are to be downloaded (6.0 GB)", "6,000,000,000 are free", "1,000 short"
    )
    assert "HF_HOME" in text and str(tmp_path / "not" / "yet" / "hub") in text
    assert len(made.calls) == 1  # nothing was downloaded
    hub(free=6 * GB, cached=["config.json"])
    assert fetch("zai-org/GLM-4.6", weights=ALL) == tmp_path
    hub(free=0, cached=list(REPO))
    assert fetch("zai-org/GLM-4.6") == tmp_path
    hub(free=GB, files={"model.safetensors": None})  # a size that the Hub does not say
    assert fetch("zai-org/GLM-4.6") == tmp_path


def test_a_repository_without_safetensors(hub):
    made = hub(files={"config.json": 1})
    failure(BadInput, "(revision v1)", "no .safetensors files", revision="v1")
    assert len(made.calls) == 1


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_asks_the_cache_alone(by, hub, tmp_path):
    made = hub(online=by == "argument", free=0)
    assert fetch("zai-org/GLM-4.6", offline=by == "argument") == tmp_path
    assert [kwargs["local_files_only"] for _, kwargs in made.calls] == [True]
    hub(online=by == "argument", error=errors.LocalEntryNotFoundError("long\nstory"))
    failure(MissingInput, "not complete in the cache, and offline", "HF_HUB_OFFLINE", offline=by == "argument")


def test_without_a_network_a_complete_cache_will_do(hub, tmp_path):
    made = hub(plan_error=errors.DryRunError("no network"))
    assert fetch("zai-org/GLM-4.6") == tmp_path
    assert len(made.calls) == 2
    hub(plan_error=errors.DryRunError("no network"), error=errors.LocalEntryNotFoundError("long\nstory"))
    failure(MissingInput, "the Hub cannot be reached, and the cache has no complete copy")


def status(code: int):
    return errors.HfHubHTTPError(f"{code}\nfor https://x?Signature=s", response=http(code))


def gated():
    return errors.GatedRepoError("403\nlong", response=http(403))


def refused():
    error = errors.LocalEntryNotFoundError("long\nstory")
    error.__cause__ = status(403)
    return error


FAILURES = {
    "no such repository": (
        lambda: errors.RepositoryNotFoundError("404\nx", response=http(404)),
        "none of that name on",
    ),
    "gated": (gated, "accept its terms at https://huggingface.co/zai-org/GLM-4.6"),
    "no such revision": (lambda: errors.RevisionNotFoundError("404\nx", response=http(404)), "this revision is not"),
    "token refused": (lambda: status(401), "HTTP 401: the token is wrong"),
    "token refused, as the cache sees it": (refused, "HTTP 403: the token is wrong"),
    "the Hub is down": (
        lambda: errors.HfHubHTTPError("503 https://x?Signature=s", response=http(503)),
        "HTTP 503: try",
    ),
    "cut off": (lambda: ConnectionResetError(104, "Connection reset by peer"), "(ConnectionResetError: [Errno 104]"),
    "timed out": (lambda: TimeoutError("read\ntimed out"), "the download failed (TimeoutError: read)"),
    "something of a library below": (lambda: RuntimeError(""), "the download failed (RuntimeError: ): run it again"),
}


@pytest.mark.parametrize("error, says", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("when", ["plan_error", "error"])
def test_every_failure_is_one_line(error, says, when, hub):
    hub(**{when: error()})
    text = failure(MissingInput, says)
    assert "Signature" not in text


def test_a_disk_that_fills_up_on_the_way(hub):
    hub(error=OSError(errno.ENOSPC, "No space left on device"))
    failure(NoSpace, "is full: make room or set HF_HOME")


def test_ctrl_c_is_not_swallowed(hub):
    hub(error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fetch("zai-org/GLM-4.6")


def test_the_real_library_finds_a_cached_snapshot_that_the_reader_accepts(tmp_path, monkeypatch):
    """Not mocked: huggingface_hub in offline mode, on a cache as it lays it out."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    failure(MissingInput, "not complete in the cache, and offline")
    repo, commit, blob = tmp_path / "models--zai-org--GLM-4.6", "c" * 40, "1" * 64
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    write(repo / "blobs" / blob, {"x": np.arange(4, dtype=np.float32)})
    huggingface_hub.file_download._create_symlink(
        str(repo / "blobs" / blob), str(repo / "snapshots" / commit / "model.safetensors")
    )
    folder = fetch("zai-org/GLM-4.6")
    assert folder == repo / "snapshots" / commit and (folder / "model.safetensors").is_symlink()
    np.testing.assert_array_equal(read_folder(folder)["x"].read(), range(4))
    failure(MissingInput, "(revision v2)", "not complete in the cache", revision="v2")


def test_inspect_downloads_no_shards(hub, tmp_path, capsys):
    made = hub()
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    index = dict.fromkeys(tensor_shapes(tiny()), "model-0.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert main(["inspect", "zai-org/GLM-4.6", "--mesh", "data=1"]) == 0
    assert "moe.mlp.gate_up" in capsys.readouterr().out
    assert not any("safetensors" in p and "index" not in p for _, call in made.calls for p in call["allow_patterns"])
