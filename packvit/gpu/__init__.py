"""Decode JPEGs to patches on the GPU, bit for bit equal to `images/`.

`jpeg.py` decides on the host which files can be decoded; `decoder.py` decodes them on the device.
"""
