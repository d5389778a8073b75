"""Instructions that a rule can check: reading them with their prompts, and checking answers.

Used by `data_building`, `evaluation` and the commands; it uses `system`.
"""
