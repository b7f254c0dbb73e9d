"""What to draft and what to verify: pure decisions, and what they are based on."""
