"""Instructions that a rule can check: reading them with their prompts, and checking answers."""
