"""The cache of the source's keys and values: laid out, stored in tiers, planned, and safe on disk."""
