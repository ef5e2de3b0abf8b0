"""The layers of an encoder as the papers describe them, without what only makes them faster."""
