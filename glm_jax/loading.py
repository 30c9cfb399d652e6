"""From a Hugging Face folder to a model on a mesh, and back."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.config import Config
from glm_jax.convert import hf, table
from glm_jax.convert.hub import fetch, fetch_weights
from glm_jax.convert.safetensors import Tensor, read_folder, read_index
from glm_jax.errors import BadInput, DestinationError, UsageError
from glm_jax.model import GLM, check_kernels, check_mesh
from glm_jax.planner import default_mesh, first_layers, refuse_if_too_large
from glm_jax.processes import agreed, count, exchange, index
from glm_jax.sharding import Rules, describe
from glm_jax.sharding import mesh as make_mesh
from glm_jax.sharding import rules as make_rules
from glm_jax.tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"


def load(
    path: "str | Path",
    mesh=None,
    rules: "str | Rules" = "ep",
    dtype: str | None = None,
    layers: int | None = None,
    *,
    kernels: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    memory: int = hf.MEMORY,
    progress: "Callable[[int, int], None] | None" = None,
) -> "tuple[GLM, Tokenizer | None]":
    """The model and the tokenizer (None if there is none) of a folder or a Hub id.

    `mesh` as in "expert=4,tensor=2", default: all devices, experts spread as far as they go. `dtype` ("bfloat16" or
    "float32") of weights and compute, default as stored; the router bias stays float32. `layers=N` reads the first N
    layers only. `kernels` of the experts' matmuls: one of `kernels.IMPLEMENTATIONS`. `memory` is how many bytes of
    the host's may hold weights on their way to devices; for devices that are the host each is read where it stays.
    `progress(done, total)` is told bytes. Everything is checked, the devices' memory too, before a weight is read.
    Raises BadInput, MissingInput, NoSpace or UsageError, each with one line that says what to change."""
    options: dict[str, Any] = {"revision": revision, "token": token, "offline": offline}
    devices = jax.devices()  # of several processes the first to ask waits for the others
    with agreed():
        folder = fetch(path, **options)
        config, indexed, wanted = read_config(folder, dtype, layers)
        rules, chosen = make_rules(rules), mesh is None
        if chosen:
            here = jax.process_index()  # also of processes that did not meet by processes.start
            mesh = default_mesh(config, rules, sorted(devices, key=lambda d: d.process_index != here))
    defaults = exchange(mesh if chosen else None)
    if all(defaults):  # what is free differs between hosts, and so may the default
        mesh = defaults[0]
    with agreed():
        mesh = make_mesh(mesh)
        check_mesh(config, mesh, rules)
        check_kernels(config, mesh, rules, kernels)
        _check_all_take_part(mesh)
        tokenizer = Tokenizer.read(folder)
        if tokenizer and tokenizer.size > config.vocab_size:
            raise BadInput(f"{folder}: the tokenizer has {tokenizer.size} ids, the model only {config.vocab_size}")
        name = f"{path} in {config.dtype.name}"
        # There may be no MTP layer.
        sure = config if indexed else dataclasses.replace(config, num_nextn_predict_layers=0)
        refuse_if_too_large(sure, mesh, rules, name)
        fetch_weights(path, folder, indexed, **options)
        config, tensors = read_tensors(folder, config, wanted)
        refuse_if_too_large(config, mesh, rules, name)
    if count() > 1:
        shapes = sorted((t.name, t.dtype, t.shape, t.offset) for t in tensors.values())
        _check_same(config, shapes, describe(mesh), rules)
    model = GLM(config, mesh, rules, seed=None, kernels=kernels)
    if tokenizer:
        tokenizer.stop_ids = config.eos_token_id
        model.token_limit = tokenizer.size
    total = hf.bytes_to_read(model, tensors)
    done = 0

    def report(nbytes: int):
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total)

    with agreed():
        return hf.load_weights(model, tensors, report, memory=memory), tokenizer


def _check_same(*what: Any) -> None:
    """Processes that load different models would wait for each other for ever."""
    digests = exchange(hashlib.sha256(repr(what).encode()).hexdigest())
    if others := [i for i, digest in enumerate(digests) if digest != digests[0]]:
        raise BadInput(
            f"process {others[0]} was given another model, --mesh, --rules, --dtype or --layers than process 0: "
            "give all the same"
        )


def _check_all_take_part(mesh) -> None:
    """Each of several processes must have a device of the mesh, or it could neither work nor wait."""
    idle = sorted({d.process_index for d in jax.devices()} - {d.process_index for d in mesh.devices.flat})
    if idle and count() > 1:
        raise UsageError(
            f"--mesh {describe(mesh)} takes {mesh.size} of {jax.device_count()} devices, and none of process "
            f"{', '.join(map(str, idle))}: take a mesh of all devices, or start fewer processes"
        )


def read_tensors(folder: Path, config: Config, wanted: Callable[[str], bool]) -> tuple[Config, dict[str, Tensor]]:
    """The Config, without an MTP layer if the folder has none, and the tensors that are `wanted`, checked against each
    other; reads headers only, and none of files that hold nothing wanted."""
    tensors = {name: t for name, t in read_folder(folder, wanted).items() if wanted(name)}
    config = table.without_missing_mtp(config, tensors, folder)
    table.check(config, tensors, folder)
    return config, tensors


def read_config(
    folder: Path, dtype: str | None = None, layers: int | None = None
) -> tuple[Config, dict[str, str] | None, Callable[[str], bool]]:
    """The Config of a folder's model, or of its first layers, with the stop ids of generation_config.json if that has
    any to say; the file of each tensor by the folder's index, checked against it, or None; and which tensors are
    wanted, by name. Reads no weights' file."""
    if folder.is_file():
        raise BadInput(f"{folder}: this is a file; give the folder that holds the checkpoint")
    config, quantised = Config.read(folder), quantization(folder)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise BadInput(
            f"{folder}: the weights are quantised ({method}), which cannot be loaded yet; take the BF16 model"
        )
    if dtype is not None:
        if dtype not in ("bfloat16", "float32", jnp.bfloat16, jnp.float32):
            raise UsageError(f"--dtype {dtype}: weights are loaded in bfloat16 or float32")
        config = dataclasses.replace(config, dtype=jnp.dtype(dtype))
    config, wanted = dataclasses.replace(config, eos_token_id=_stop_ids(folder, config)), lambda name: True
    if layers is not None:
        config = first_layers(config, layers)
        wanted = set(table.tensor_shapes(config)).__contains__
    indexed = read_index(folder)
    if indexed is not None:
        indexed = {name: file for name, file in indexed.items() if wanted(name)}
        config = table.without_missing_mtp(config, indexed, folder)
        table.check(config, dict.fromkeys(indexed), folder)
    return config, indexed, wanted


def quantization(path: Path) -> Any:
    """What a folder's config.json, or this file, says of weights that are stored quantised; None of others."""
    return read_json(path / "config.json" if path.is_dir() else path).get("quantization_config")


def _stop_ids(folder: Path, config: Config) -> tuple[int, ...]:
    generation = generation_defaults(folder)
    if "eos_token_id" not in generation:
        return config.eos_token_id
    eos = generation["eos_token_id"]
    stop_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in stop_ids):
        raise BadInput(
            f"{folder / 'generation_config.json'}: eos_token_id is {eos!r}, not an id, a list of ids, or null"
        )
    return stop_ids


def generation_defaults(folder: Path) -> dict[str, Any]:
    """What generation_config.json says; nothing if there is none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or BadInput."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise BadInput(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def save(model: GLM, folder: "str | Path", tokenizer: "Tokenizer | None" = None) -> None:
    """Writes a Hugging Face folder that `load` and transformers read: the weights as they are now, in the model's
    dtype (the router bias in float32), config.json, generation_config.json, and the tokenizer's files.

    The folder may exist, but not with a model in it (DestinationError). Of several processes all must call it, and
    process 0 writes."""
    folder = Path(folder)
    if count() == 1 and getattr(model.mesh, "is_multi_process", False):
        raise UsageError(
            "save: the processes know nothing of each other: call glm_jax.processes.start() in each, in place of "
            "jax.distributed.initialize()"
        )
    with agreed():
        if index() == 0:
            _check_destination(folder)
    with agreed():
        hf.save_weights(model, folder)
    with agreed():
        if index() == 0:
            _save_the_rest(model, folder, tokenizer)


def _check_destination(folder: Path):
    if folder.is_file() or (folder / "config.json").exists():
        raise DestinationError(f"{folder}: is a file or holds a model already; give another folder, or remove it first")
    folder.mkdir(parents=True, exist_ok=True)


def _save_the_rest(model: GLM, folder: Path, tokenizer: "Tokenizer | None"):
    config = model.config.to_dict()
    generation = generation_defaults(tokenizer.folder) if tokenizer else {}  # temperature and the like
    generation |= {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    if tokenizer:
        tokenizer.save(folder)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", config)  # last: with it the folder is a model


def _write_json(path: Path, value: dict[str, Any]):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
