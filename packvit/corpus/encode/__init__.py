"""Turn prepared images into packs, packs into features, and features into staged parts."""
