"""A model's folder by name: one on this machine, or a repository of the Hugging Face Hub, downloaded at first use."""

import errno
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from glm_jax.convert.native import hf_folder
from glm_jax.convert.safetensors import read_index
from glm_jax.errors import BadInput, MissingInput, NoSpace, UsageError

# Configuration, tokenizer, templates and the weights' index. No pickles, which run code when loaded, and no code.
SMALL = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_SUBFOLDERS = ["*/*"]  # other forms of the same weights
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")


def fetch(
    name: str | Path,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    weights: Sequence[str] = (),
) -> Path:
    """Returns the folder of a model: `name` itself if that exists, else the Hub's "owner/name", downloaded once.

    Of the Hub's files it takes the small ones, and of the weights those that `weights` names or is a pattern of, so
    that what cannot be loaded is known before hundreds of gigabytes have come.

    The download is that of huggingface_hub: into its cache (HF_HOME), file by file, so that the same call again goes on
    where one was cut off. `offline`, or HF_HUB_OFFLINE=1, takes what the cache has. Raises MissingInput if there is no
    such folder or repository, or it cannot be reached; NoSpace before anything is downloaded; BadInput for a repository
    without safetensors.
    """
    text = str(name)
    path = os.path.expanduser(text)
    if os.path.exists(path):
        if revision is not None:
            raise UsageError(f"{text}: a folder on this machine has no revision {revision!r}; that is for Hub ids")
        return hf_folder(Path(path))  # the one inside, of a folder that `convert` made
    if isinstance(name, Path) or not _is_id(text):
        shown = text if text and text.isprintable() else repr(text)
        raise MissingInput(
            f"{shown}: no such folder (a model of the Hub is owner/name: zai-org/GLM-4.6; `inspect glm-4.6` needs none)"
        )
    return _download(text, revision, token, offline, weights)


def fetch_weights(
    path: "str | Path", folder: Path, indexed: Mapping[str, str] | None, revision=None, **options
) -> None:
    """Downloads the files of the tensors in `indexed`, all without it, of the Hub's snapshot `folder`; a folder on this
    machine has them."""
    if not os.path.exists(os.path.expanduser(str(path))):
        weights = ["*.safetensors"] if indexed is None else sorted(set(indexed.values()))
        fetch(path, revision=folder.name, weights=weights, **options)  # that commit, though the branch may have moved


def fetch_whole(name: "str | Path", **options) -> Path:
    """The folder of a model, as by `fetch`, with all its weights."""
    folder = fetch(name, **options)
    if not os.path.exists(os.path.expanduser(str(name))):
        fetch_weights(name, folder, read_index(folder), **options)
    return folder


def _is_id(text: str) -> bool:
    return bool(_ID.fullmatch(text)) and ".." not in text and "--" not in text and not text.endswith((".git", "-", "."))


def _download(name: str, revision: str | None, token: str | None, offline: bool, weights: Sequence[str]) -> Path:
    import huggingface_hub  # here, since it takes a second and most folders are local
    from huggingface_hub import constants, errors

    offline = offline or constants.HF_HUB_OFFLINE
    cache = Path(constants.HF_HUB_CACHE)

    def snapshot(**kwargs):
        return huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=[*SMALL, *weights],
            ignore_patterns=_SUBFOLDERS,
            **kwargs,
        )

    at = f"{name} (revision {revision})" if revision else name
    try:
        if not offline:
            try:
                files = snapshot(dry_run=True)
            except errors.DryRunError:
                pass  # the Hub is out of reach: the call below finds a complete copy in the cache or says what is wrong
            else:
                if weights and not any(file.filename.endswith(".safetensors") for file in files):
                    raise BadInput(f"{at}: this repository has no .safetensors files, and nothing else is read")
                _check_space(at, sum(file.file_size or 0 for file in files if file.will_download), cache)
        return Path(snapshot(local_files_only=offline))
    except (BadInput, NoSpace):
        raise
    except errors.GatedRepoError as error:
        raise MissingInput(
            f"{at}: gated: accept its terms at https://huggingface.co/{name}, then give a token (`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingInput(f"{at}: the repository is there, this revision is not") from error
    except errors.RepositoryNotFoundError as error:
        raise MissingInput(
            f"{at}: no such folder here and none of that name on the Hub (a private one needs a token: `hf auth login`)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            why = _http(error.__cause__.response.status_code)
        elif offline:
            why = "not complete in the cache, and offline: run once without --offline and HF_HUB_OFFLINE"
        else:
            why = "the Hub cannot be reached, and the cache has no complete copy: check the connection and run it again"
        raise MissingInput(f"{at}: {why} (cache: {cache})") from error
    except errors.HfHubHTTPError as error:  # its text may hold a signed address
        raise MissingInput(f"{at}: {_http(error.response.status_code)}") from error
    except Exception as error:  # httpx, requests, xet: what huggingface_hub lets through is not its interface
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"{at}: the disk of {cache} is full: make room or set HF_HOME, and run it again") from error
        lines = str(error).splitlines() or [""]
        raise MissingInput(
            f"{at}: the download failed ({type(error).__name__}: {lines[0][:160]}): run it again to go on"
        ) from error


def _http(status: int) -> str:
    hint = "the token is wrong or may not read it (`hf auth login`)" if status in (401, 403) else "try again later"
    return f"the Hub answered HTTP {status}: {hint}"


def _check_space(at: str, needed: int, cache: Path) -> None:
    place = next(folder for folder in (cache, *cache.absolute().parents) if os.path.isdir(folder))
    free = shutil.disk_usage(place).free
    if needed > free:
        raise NoSpace(
            f"{at}: {needed:,} bytes are to be downloaded ({needed / 1e9:.1f} GB), {free:,} are free in {cache}: "
            f"{needed - free:,} short; make room or set HF_HOME to a folder on a larger disk"
        )
