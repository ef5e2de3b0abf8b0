"""Where shards are embedded: here, in processes of this host, or on a Ray cluster. No torch."""
