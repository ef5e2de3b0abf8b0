"""Files to configuration and tensors, and back: downloads, layouts, rules of names."""
