"""Find the inputs of a job: folders, patterns, lists, archives, URLs. No torch."""
