"""Search, duplicates, labels and evaluation on finished feature folders."""
