"""Compile the kernels that an encoder's job will use, so that they are found in the caches."""

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from packvit.encoder import Encoder
from packvit.fast.caches import keep_kernels
from packvit.gpu.decoder import JpegDecoder
from packvit.gpu.jpeg import JpegPlan, plan_jpeg

# (height, width) of photographs: of many shapes, of one shape, and one by itself. Kernels are
# compiled anew where sequences are of one length, and where a count is no multiple of 16.
PACKS = (((480, 640), (333, 500), (640, 427), (224, 224)), ((448, 448),) * 4, ((333, 500),))


@dataclass(frozen=True, slots=True)
class Warmed:
    """What was compiled, or found compiled."""

    model: str
    gpu: str
    attention: str
    folder: Path | None  # None: nothing can be kept there
    jpegs: bool  # whether this machine decodes JPEGs on the GPU
    seconds: float


def warm_up(encoder: Encoder) -> Warmed:
    """Run an encoder, and the JPEG decoder, on packs of all kinds that a job makes.

    Raises: ValueError for an encoder on another device than a GPU, which compiles nothing.
    """
    if encoder.device.type != "cuda":
        raise ValueError(
            f"The model is on {encoder.device}, where no kernel is compiled. Run this on a machine "
            "with the GPU that the job will use."
        )
    began, folder = time.perf_counter(), keep_kernels()
    draw = np.random.default_rng(0)
    with torch.inference_mode():
        for sizes in PACKS:
            images = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
            encoder.encode(encoder.pack(images))
    jpegs = decode_one(encoder)
    torch.cuda.synchronize(encoder.device)
    name = encoder.checkpoint.name if encoder.checkpoint else type(encoder).__name__
    gpu = torch.cuda.get_device_name(encoder.device)
    seconds = time.perf_counter() - began
    return Warmed(name, gpu, encoder.attention, folder, jpegs, seconds)


def decode_one(encoder: Encoder) -> bool:
    """Decode a JPEG on the encoder's GPU; return whether that is possible there."""
    file = io.BytesIO()
    Image.new("RGB", (640, 480), (90, 120, 60)).save(file, "JPEG")
    plan = plan_jpeg(file.getvalue(), encoder.images)
    try:
        decoder = JpegDecoder(encoder.images, encoder.patch_order, encoder.device)
    except (ImportError, RuntimeError):
        return False
    assert isinstance(plan, JpegPlan)
    decoder.decode([file.getvalue()], [plan])
    return True
