"""What there is to embed: folders, patterns, lists, archives, URLs. No torch."""
