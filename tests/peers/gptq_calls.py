"""Reads GPTQ checkpoints with a program of others, in its environment: ``gptq_calls.py READER,... FOLDER...``.

Each reader loads FOLDER/checkpoint, is given the tokens [sequences, length] of FOLDER/tokens.npy, and leaves its logits
as float32 in FOLDER/READER.npy, or in FOLDER/READER.error why it could not. Prints as JSON what it ran with.
"""

from __future__ import annotations

import json
import sys
import traceback
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch


def auto_gptq(checkpoint: str, bits: int):
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(checkpoint, device="cpu", torch_dtype=torch.float32).model


def transformers(checkpoint: str, bits: int):
    """With the kernel that it picks itself, which on a CPU multiplies in 16 bits."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, device_map="cpu")


def transformers_exact(checkpoint: str, bits: int):
    """With the kernel that multiplies weights out first, in float32."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    asked = {"dtype": torch.float32, "quantization_config": GPTQConfig(bits=bits, backend="torch")}
    return AutoModelForCausalLM.from_pretrained(checkpoint, device_map="cpu", **asked)


def gptqmodel(checkpoint: str, bits: int):
    from gptqmodel import GPTQModel

    return GPTQModel.load(checkpoint, device="cpu").model


READERS = {
    "auto-gptq": auto_gptq,
    "transformers": transformers,
    "transformers-exact": transformers_exact,
    "gptqmodel": gptqmodel,
}


@torch.inference_mode()
def logits_of(reader: str, folder: Path) -> np.ndarray:
    bits = json.loads((folder / "checkpoint" / "quantize_config.json").read_text())["bits"]
    model = READERS[reader](str(folder / "checkpoint"), bits)
    return model(input_ids=torch.from_numpy(np.load(folder / "tokens.npy"))).logits.float().numpy()


def main(readers: list[str], folders: list[Path]) -> None:
    for folder in folders:
        for reader in readers:
            try:
                np.save(folder / f"{reader}.npy", logits_of(reader, folder))
            except Exception:
                (folder / f"{reader}.error").write_text(traceback.format_exc())
    packages = {"auto-gptq": ["auto-gptq"]}.get(readers[0], ["gptqmodel", "optimum"])
    print(json.dumps({name: version(name) for name in ("torch", "transformers", *packages)}))


if __name__ == "__main__":
    main(sys.argv[1].split(","), [Path(each) for each in sys.argv[2:]])
