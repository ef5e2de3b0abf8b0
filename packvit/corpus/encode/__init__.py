"""Prepared images to packs, packs to features, features to staged parts."""
