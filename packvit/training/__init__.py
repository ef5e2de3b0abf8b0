"""Functions for training encoders with torch and peft."""
