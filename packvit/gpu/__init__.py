"""JPEGs to patches on the GPU, bit for bit what `images.decode` and `preprocessing` give.

`jpeg.py` says on the host which files can be decoded so; `decoder.py` decodes those on the device.
"""
