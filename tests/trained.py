"""The trained backbone of the demo: with registers written into it, and run by onnxruntime.

`make soak` installs `onnx` and `onnxruntime`, which is a third opinion.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.trained import CONFIG


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
