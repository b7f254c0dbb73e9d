"""Drafting for a target that another engine runs: that engine asks for tokens and verifies them, step by step."""
