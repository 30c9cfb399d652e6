"""Checkpoints at full size that take no room: GLM-4.5, 4.6, 4.7 and Air, and their FP8 forms, with the names, shapes,
dtypes and files of the published ones, as sparse files of zeros.

    PYTHONPATH=. python benchmarks/full_size.py glm-4.6 FOLDER [--fp8]

The number of shards is the published one's; which tensor is in which of them is not: they go in order, as evenly as
they fit. GLM-4.6 has its MTP layer in mtp.safetensors and no copies of embedding and head; the others have both in the
last shards. FP8 is per channel: X.weight in F8_E4M3 and X.weight_scale in F32 [out, 1]."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
SHARDS = {"glm-4.5": 93, "glm-4.6": 92, "glm-4.7": 93, "glm-4.5-air": 47}
UNQUANTISED = ("layernorm", "embed", "router", "mlp.gate.", "norm", "lm_head", "eh_proj")  # as SLIME's script has it


def tensors(name: str, fp8: bool = False) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a published checkpoint."""
    from glm_jax.config import preset
    from glm_jax.convert.table import file_order, tensor_shapes

    found = {}
    shapes = tensor_shapes(preset(name), mtp_copies=name != "glm-4.6")
    if name == "glm-4.6" and fp8:
        shapes["model.layers.92.shared_head.head.weight"] = shapes["lm_head.weight"]
    for tensor, shape in sorted(shapes.items(), key=lambda item: file_order(item[0])):
        small = "weight" not in tensor or any(word in tensor for word in UNQUANTISED)
        if fp8 and not small:
            found[tensor], found[tensor + "_scale"] = ("F8_E4M3", shape), ("F32", (shape[0], 1))
        else:
            found[tensor] = ("F32" if "e_score_correction_bias" in tensor else "BF16", shape)
    return found


def write(name: str, folder: Path, fp8: bool = False) -> int:
    """Makes the folder; returns its bytes, as they are claimed."""
    from glm_jax.config import preset
    from glm_jax.convert.safetensors import DTYPES, header_bytes

    folder.mkdir(parents=True)
    config = preset(name).to_dict()
    if fp8:
        config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    files: list[tuple[str, list]] = []
    size = lambda item: math.prod(item[1][1]) * DTYPES[item[1][0]].itemsize
    everything = list(tensors(name, fp8).items())
    layer = f"model.layers.{preset(name).num_hidden_layers}."
    apart = [item for item in everything if item[0].startswith(layer)] if name == "glm-4.6" else []
    rest = [item for item in everything if item not in apart] if apart else everything
    count, total, used, shard = SHARDS[name], sum(map(size, rest)), 0, -1
    for item in rest:
        if (at := min(count - 1, used * count // total)) != shard:
            shard = at
            files.append((f"model-{len(files) + 1:05}-of-{count:05}.safetensors", []))
        files[-1][1].append(item)
        used += size(item)
    files += [("mtp.safetensors", apart)] if apart else []
    where, claimed = {}, 0
    for file, held in files:
        header = header_bytes([(n, d, s) for n, (d, s) in held], {"format": "pt"}, folder / file)
        with open(folder / file, "wb") as out:
            out.write(header)
            out.truncate(len(header) + sum(map(size, held)))
        claimed += os.path.getsize(folder / file)
        where |= {n: file for n, _ in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return claimed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=SHARDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    print(f"{write(args.model, args.folder, args.fp8):,} bytes in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
