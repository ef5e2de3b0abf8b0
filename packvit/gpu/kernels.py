"""Triton kernels from the planes of many JPEGs to patches; `reference.py` computes the same.

Each is one launch for all images. An image's facts are a row of a table on the device, so that
sizes differ freely; a program whose tile lies beyond its image does nothing.
"""

import triton  # pyright: ignore[reportMissingImports] # comes with torch for CUDA
import triton.language as tl  # pyright: ignore[reportMissingImports]

TILE = 1024  # pixels a program makes


@triton.jit
def upright_kernel(facts, planes, rgb, fields: tl.constexpr, tile: tl.constexpr):
    """Upsample chroma, turn it to RGB, and write it upright as three planes.

    Facts: Upright in decoder.py, in its order.
    """
    row = facts + tl.program_id(1) * fields
    height = tl.load(row).to(tl.int32)
    width = tl.load(row + 1).to(tl.int32)
    start = tl.program_id(0) * tile
    if start < height * width:
        pixel = start + tl.arange(0, tile)
        inside = pixel < height * width
        swapped = tl.load(row + 2).to(tl.int32)
        upright_width = tl.where(swapped == 1, height, width)
        y, x = pixel // upright_width, pixel % upright_width
        y, x = tl.where(swapped == 1, x, y), tl.where(swapped == 1, y, x)
        y = tl.where(tl.load(row + 3) == 1, height - 1 - y, y)
        x = tl.where(tl.load(row + 4) == 1, width - 1 - x, x)

        luma_pitch = tl.load(row + 8).to(tl.int32)
        luma = tl.load(planes + tl.load(row + 5) + y * luma_pitch + x, mask=inside, other=0)
        luma = luma.to(tl.int32)

        across = tl.load(row + 10).to(tl.int32)  # 0: grey
        down = tl.load(row + 11).to(tl.int32)
        columns = tl.load(row + 12).to(tl.int32)
        rows = tl.load(row + 13).to(tl.int32)
        wide, tall = across == 2, down == 2
        # 3 parts of the nearest sample, 1 of the next; 4 of the same where there is one a pixel.
        near_x = tl.where(wide, x // 2, x)
        next_x = tl.where(wide, tl.minimum(tl.maximum(near_x - 1 + 2 * (x % 2), 0), columns - 1), x)
        near_y = tl.where(tall, y // 2, y)
        next_y = tl.where(tall, tl.minimum(tl.maximum(near_y - 1 + 2 * (y % 2), 0), rows - 1), y)
        bias = tl.where(tall, 4 + 4 * (y % 2), 0)
        bias = tl.where(wide, tl.where(tall, 8 - x % 2, 4 + 4 * (x % 2)), bias)
        pitch = tl.load(row + 9).to(tl.int32)
        coloured = pixel < height * width * tl.minimum(across, 1)
        blue = planes + tl.load(row + 6)
        red = planes + tl.load(row + 7)
        a, b = near_y * pitch + near_x, near_y * pitch + next_x
        c, d = next_y * pitch + near_x, next_y * pitch + next_x
        cb = 9 * tl.load(blue + a, mask=coloured, other=128).to(tl.int32)
        cb += 3 * tl.load(blue + b, mask=coloured, other=128).to(tl.int32)
        cb += 3 * tl.load(blue + c, mask=coloured, other=128).to(tl.int32)
        cb += tl.load(blue + d, mask=coloured, other=128).to(tl.int32)
        cr = 9 * tl.load(red + a, mask=coloured, other=128).to(tl.int32)
        cr += 3 * tl.load(red + b, mask=coloured, other=128).to(tl.int32)
        cr += 3 * tl.load(red + c, mask=coloured, other=128).to(tl.int32)
        cr += tl.load(red + d, mask=coloured, other=128).to(tl.int32)
        cb = ((cb + bias) >> 4) - 128
        cr = ((cr + bias) >> 4) - 128

        out = rgb + tl.load(row + 14) + pixel
        plane = height * width
        value = luma + ((91881 * cr + 32768) >> 16)
        tl.store(out, tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8), mask=inside)
        value = luma + ((-22554 * cb - 46802 * cr + 32768) >> 16)
        tl.store(out + plane, tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8), mask=inside)
        value = luma + ((116130 * cb + 32768) >> 16)
        tl.store(out + 2 * plane, tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8), mask=inside)


@triton.jit
def pass_kernel(
    facts,
    windows,
    source,
    out,
    fields: tl.constexpr,
    tile: tl.constexpr,
    side: tl.constexpr,
    whole: tl.constexpr,
):
    """Resample one side of every image, in Pillow's fixed point.

    Facts: Pass in decoder.py, in its order. Writes planes; or, where `side` is not 0, patches of
    that side, whose pixels read RGB in turn, or all red first where `whole`.
    """
    row = facts + tl.program_id(1) * fields
    height = tl.load(row).to(tl.int32)
    width = tl.load(row + 1).to(tl.int32)
    start = tl.program_id(0) * tile
    if start < height * width:
        pixel = start + tl.arange(0, tile)
        inside = pixel < height * width
        y, x = pixel // width, pixel % width
        step = tl.load(row + 2).to(tl.int32)  # between the pixels of a window
        other = tl.load(row + 3).to(tl.int32)  # between windows
        last = tl.load(row + 4).to(tl.int32)
        plane = tl.load(row + 5).to(tl.int32)
        across = tl.load(row + 6).to(tl.int32) == 1
        taps = tl.load(row + 7).to(tl.int32)
        place = tl.where(across, x, y)
        first = tl.load(windows + tl.load(row + 8) + place, mask=inside, other=0)
        weights = windows + tl.load(row + 9) + place * taps
        pixels = source + tl.load(row + 10) + tl.where(across, y, x) * other
        red = tl.full((tile,), 1 << 21, tl.int32)
        green = tl.full((tile,), 1 << 21, tl.int32)
        blue = tl.full((tile,), 1 << 21, tl.int32)
        for tap in range(taps):
            weight = tl.load(weights + tap, mask=inside, other=0)
            here = pixels + tl.minimum(first + tap, last) * step
            red += weight * tl.load(here, mask=inside, other=0).to(tl.int32)
            green += weight * tl.load(here + plane, mask=inside, other=0).to(tl.int32)
            blue += weight * tl.load(here + 2 * plane, mask=inside, other=0).to(tl.int32)
        to = out + tl.load(row + 11)
        if side == 0:
            to += pixel
            next_channel = height * width
        else:
            patch = (y // side) * (width // side) + x // side
            within = (y % side) * side + x % side
            if whole:
                to += patch * (3 * side * side) + within
                next_channel = side * side
            else:
                to += (patch * (side * side) + within) * 3
                next_channel = 1
        red = tl.minimum(tl.maximum(red >> 22, 0), 255)
        green = tl.minimum(tl.maximum(green >> 22, 0), 255)
        blue = tl.minimum(tl.maximum(blue >> 22, 0), 255)
        tl.store(to, red.to(tl.uint8), mask=inside)
        tl.store(to + next_channel, green.to(tl.uint8), mask=inside)
        tl.store(to + 2 * next_channel, blue.to(tl.uint8), mask=inside)
