"""What `packvit bench` does not answer, one question a file; and what has been recorded."""
