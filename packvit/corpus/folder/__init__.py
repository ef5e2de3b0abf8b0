"""The feature folder: its parts, how it is written whole, resumed, checked, exported. No torch."""
