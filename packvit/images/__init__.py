"""Bytes to RGB pixels to patches, as the references' processors have them. No torch."""
