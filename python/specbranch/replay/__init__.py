"""Decoding without models: records, replays, plans."""
