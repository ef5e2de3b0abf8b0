"""What `make demo` runs besides the `packvit` command."""
