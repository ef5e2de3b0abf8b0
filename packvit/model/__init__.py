"""What an encoder is made of, as the papers say it; it knows nothing of what makes it fast."""
